"""Operations: endpoints as data. Router, validation, OpenAPI, reference docs and scope tests are made of them."""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import msgspec
from aiohttp import web

from opsentry.application.caller import Permission

Audience: TypeAlias = Literal["tenant", "operator", "anyone"]
"""The tokens that an operation accepts: a tenant's API token, an operator's token, or none."""

Handler: TypeAlias = Callable[..., Awaitable[web.StreamResponse]]


class ErrorBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The body of every error. `field` names the one that is at fault; `request_id` is there for 5xx."""

    error: str
    field: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Declare one endpoint.

    Attributes:
        id: The operation's name; the handler has the same.
        method: The HTTP method. `HEAD` follows from `GET`.
        path: The whole path with its parameters in braces, such as `/api/v1/incidents/{id}`.
        tag: The resource that the reference lists it under.
        summary: One line for the reference.
        description: Further paragraphs for the reference; may be empty.
        audience: The kind of token.
        scopes: The scopes that a tenant's token needs.
        query: The query parameters; `None` accepts none.
        body: The JSON body; `None` ignores it.
        is_body_optional: Whether an empty body means `{}`.
        status: The status of success.
        results: The schemas that a successful body may have; empty for a body without JSON.
        media_type: The media type of a successful body.
        is_idempotent: Whether it takes an `Idempotency-Key`.
        is_conditional: Whether it takes `If-Match` (writes) or `If-None-Match` (reads).
        errors: Further error statuses, besides those that follow from the above.
        example: A request body for the reference.
        handler: The function that serves it.
    """

    id: str
    method: str
    path: str
    tag: str
    summary: str
    description: str
    audience: Audience
    scopes: Sequence[Permission]
    query: type[msgspec.Struct] | None
    body: type[msgspec.Struct] | None
    is_body_optional: bool
    status: int
    results: Sequence[Any]
    media_type: str
    is_idempotent: bool
    is_conditional: bool
    errors: Sequence[int]
    example: Mapping[str, Any] = field(default_factory=dict)
    handler: Handler

    @property
    def error_statuses(self) -> Sequence[int]:
        """All statuses that are no success, ascending."""
        found = {500, *self.errors}
        if self.audience != "anyone":
            found |= {400, 401, 429, 503}
        if self.scopes:
            found.add(403)
        if "{" in self.path:
            found.add(404)
        if self.body is not None:
            found |= {400, 408, 413, 415}
        if self.is_idempotent:
            found.add(422)
        if self.is_conditional:
            found.add(304 if self.method == "GET" else 412)
        return sorted(found)


def operation(
    method: str,
    path: str,
    *,
    tag: str,
    audience: Audience = "tenant",
    scopes: Sequence[Permission] = (),
    status: int = 200,
    result: Any = None,
    media_type: str = "application/json",
    body_optional: bool = False,
    idempotent: bool = False,
    conditional: bool = False,
    errors: Sequence[int] = (),
    example: Mapping[str, Any] | None = None,
) -> Callable[[Handler], Operation]:
    """Return a decorator that makes an `Operation` of its handler.

    The handler's name becomes the id, its docstring summary and description. The types of query and body are read
    from the annotation of its parameter, `RequestContext[Query, Body]`.
    """

    def declare(handler: Handler) -> Operation:
        doc = inspect.cleandoc(handler.__doc__ or "")
        summary, _, description = doc.partition("\n\n")
        (context,) = [hint for name, hint in get_type_hints(handler).items() if name != "return"]
        query, body = get_args(context) or (None, None)
        return Operation(
            id=handler.__name__,
            method=method,
            path=path,
            tag=tag,
            summary=" ".join(summary.split()).rstrip("."),
            description=description,
            audience=audience,
            scopes=scopes,
            query=_struct(query),
            body=_struct(body),
            is_body_optional=body_optional,
            status=status,
            results=result if isinstance(result, tuple) else () if result is None else (result,),
            media_type=media_type,
            is_idempotent=idempotent,
            is_conditional=conditional,
            errors=errors,
            example=example or {},
            handler=handler,
        )

    return declare


def _struct(type_: Any) -> type[msgspec.Struct] | None:
    """Return the struct that an annotation names; a struct without fields stands for nothing."""
    is_struct = isinstance(type_, type) and issubclass(type_, msgspec.Struct)
    return type_ if is_struct and msgspec.structs.fields(type_) else None

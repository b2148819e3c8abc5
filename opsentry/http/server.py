"""The HTTP server: every request takes the way below, from its route to its response."""

import os
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence

import structlog
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from opsentry.application.caller import Caller, MissingPermission
from opsentry.application.errors import NotFound
from opsentry.events.codec import Actor
from opsentry.http.auth import admit
from opsentry.http.body import MAX_BODY_BYTES, BodyDecoder, NoBody, read_body
from opsentry.http.conditional import expected_versions, idempotency_key, min_position, not_modified
from opsentry.http.context import Dependencies, RequestContext
from opsentry.http.errors import error_response, rate_headers
from opsentry.http.operation import Operation
from opsentry.http.params import MAX_INTEGER, NoQuery, parse_query, parsers_of

_log = structlog.get_logger()

REQUEST_ID = web.RequestKey("request_id", str)

_CLIENT_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_ID = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)
_REQUEST_ID_BYTES = 12
_REQUEST_IDS_PER_READ = 256


def create_app(
    dependencies: Dependencies, operations: Sequence[Operation], pages: Mapping[str, Mapping[str, Handler]]
) -> web.Application:
    """Return the HTTP application of `operations`; `pages` are handlers for people, by path and method.

    Handlers are wrapped where they are registered: a middleware of aiohttp costs every request, probes above all, more
    than the wrapping itself.
    """
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    routes: dict[str, dict[str, Handler]] = {path: dict(handlers) for path, handlers in pages.items()}
    for operation in operations:
        routes.setdefault(operation.path, {})[operation.method] = _handler(dependencies, operation)
    resources = []
    for path, handlers in routes.items():
        resource = app.router.add_resource(path)
        resources.append(resource)
        methods = {**handlers, **({"HEAD": handlers["GET"]} if "GET" in handlers else {})}
        for method, handler in methods.items():
            resource.add_route(method, _bounded(handler), expect_handler=_expect)
    # Only requests that match no resource above arrive here.
    app.router.add_route("*", "/{path:.*}", _bounded(_unrouted(resources)), expect_handler=_expect)
    return app


def _request_ids() -> Iterator[str]:
    """Yield random request ids: a client learns nothing about the number of other requests.

    One read of the system's random source serves many ids, because each read is a system call.
    """
    length = 2 * _REQUEST_ID_BYTES
    while True:
        digits = os.urandom(_REQUEST_ID_BYTES * _REQUEST_IDS_PER_READ).hex()
        for start in range(0, len(digits), length):
            yield digits[start : start + length]


_new_request_ids = _request_ids()


def _bounded(handler: Handler) -> Handler:
    """Return a handler that gives the request its id and turns every error into a response."""

    async def handle(request: web.Request) -> web.StreamResponse:
        given = request.headers.get("X-Request-ID")
        request_id = given if given and _CLIENT_REQUEST_ID.fullmatch(given) else next(_new_request_ids)
        request[REQUEST_ID] = request_id
        try:
            response = await handler(request)
        except Exception as error:  # noqa: BLE001 - the outermost place, where all errors end
            response = error_response(error, request, request_id)
        response.headers["X-Request-ID"] = request_id
        return response

    return handle


def _handler(dependencies: Dependencies, operation: Operation) -> Handler:
    match operation.audience:
        case "anyone":
            return operation.handler
        case "operator":
            return _operator_handler(dependencies, operation)
        case "tenant":
            return _tenant_handler(dependencies, operation)


def _tenant_handler(dependencies: Dependencies, operation: Operation) -> Handler:
    """Return a handler that serves `operation` to API tokens with its scopes."""
    limiter, failures = dependencies.request_limiter, dependencies.failure_limiter
    settings = dependencies.settings
    query_type = operation.query or NoQuery
    parsers = parsers_of(query_type)
    decoder = BodyDecoder(operation.body or NoBody, is_optional=operation.is_body_optional or operation.body is None)
    reads_body = operation.body is not None
    takes_key = operation.is_idempotent
    has_id = "{id}" in operation.path
    scopes = operation.scopes
    serve = operation.handler

    async def handle(request: web.Request) -> web.StreamResponse:
        token, status = await admit(dependencies.api_tokens, request, limiter, failures, settings.trusted_proxies)
        rate = rate_headers(status)
        request_id = request[REQUEST_ID]
        actor = Actor("token", token.token_id)
        try:
            _require(token.scopes, scopes)
            octets = await read_body(request, settings.request_body_timeout_seconds) if reads_body else b""
            context = RequestContext(
                request=request,
                application=dependencies.application,
                caller=Caller(
                    tenant_id=token.tenant_id,
                    actor=actor,
                    permissions=token.scopes,
                    request_id=request_id,
                    name=token.name,
                    idempotency_key=idempotency_key(request, actor, octets) if takes_key else None,
                    expected_versions=expected_versions(request),
                    min_position=min_position(request),
                ),
                token_prefix=token.prefix,
                id=_path_id(request) if has_id else 0,
                query=parse_query(query_type, parsers, request.query),
                body=decoder.decode(octets, request.content_type) if reads_body else NoBody(),
                headers={**rate, "X-Request-ID": request_id},
            )
            response = not_modified(request, await serve(context))
            if reads_body and (ignored := decoder.ignored_fields(octets)):
                response.headers["Opsentry-Ignored-Fields"] = _header_list(ignored)
        except Exception as error:  # noqa: BLE001 - answered here, so that the response shows the rate limit as well
            response = error_response(error, request, request_id)
        response.headers.update(rate)
        return response

    return handle


def _operator_handler(dependencies: Dependencies, operation: Operation) -> Handler:
    """Return a handler that serves `operation` to operators' tokens, and logs who asked."""
    limiter, failures = dependencies.request_limiter, dependencies.failure_limiter
    proxies = dependencies.settings.trusted_proxies
    serve: Callable[[web.Request], Awaitable[web.StreamResponse]] = operation.handler

    async def handle(request: web.Request) -> web.StreamResponse:
        token, status = await admit(dependencies.operator_tokens, request, limiter, failures, proxies)
        rate = rate_headers(status)
        request_id = request[REQUEST_ID]
        _log.info("operator_request", request_id=request_id, path=request.path, token_prefix=token.prefix)
        try:
            parse_query(NoQuery, {}, request.query)
            response = not_modified(request, await serve(request))
        except Exception as error:  # noqa: BLE001 - as above
            response = error_response(error, request, request_id)
        response.headers.update(rate)
        return response

    return handle


def _require(granted: Collection[str], scopes: Sequence[str]) -> None:
    for scope in scopes:
        if scope not in granted:
            raise MissingPermission(scope)


def _path_id(request: web.Request) -> int:
    """Return the path's id. An id that cannot exist gives the response of a missing one."""
    raw = request.match_info["id"]
    if not _ID.fullmatch(raw) or int(raw) > MAX_INTEGER:
        raise NotFound
    return int(raw)


def _header_list(names: Sequence[str]) -> str:
    """Return at most 20 field names as a header value, without those that a header cannot carry."""
    return ", ".join(name for name in names[:20] if re.fullmatch(r"[\x21-\x2b\x2d-\x7e]{1,64}", name))


async def _expect(request: web.Request) -> None:
    """Ask for the body where the client waits for it. No other expectation binds a server."""
    if request.version == HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the response itself has not begun


def _unrouted(resources: Sequence[web.Resource]) -> Handler:
    """Return the handler of unknown paths and methods."""

    async def handle(request: web.Request) -> web.StreamResponse:
        allowed: set[str] = set()
        for resource in resources:
            _, methods = await resource.resolve(request)
            allowed |= methods
        if allowed:
            raise web.HTTPMethodNotAllowed(request.method, allowed)
        raise NotFound

    return handle

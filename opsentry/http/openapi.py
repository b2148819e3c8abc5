"""OpenAPI 3.1, generated from declared operations (https://spec.openapis.org/oas/v3.1.1)."""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web

from opsentry import __version__
from opsentry.http.operation import ErrorBody, Operation, operation
from opsentry.http.params import EnumOf
from opsentry.http.responses import json_response

DOCUMENT = web.AppKey("openapi_document", bytes)

_REF = "#/components/schemas/{name}"
_JSON = "application/json"

_SECURITY: Mapping[str, list[dict[str, list[str]]]] = {
    "tenant": [{"apiToken": []}],
    "operator": [{"operatorToken": []}],
    "anyone": [],
}

_REQUEST_HEADERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Idempotency-Key": (
        "Makes the request safe to send again for at least 24 hours.",
        {"type": "string", "maxLength": 255},
    ),
    "If-Match": ("The entity tag that the resource must have.", {"type": "string"}),
    "If-None-Match": ("The entity tag that the client has.", {"type": "string"}),
    "Opsentry-Min-Position": (
        "The ledger position that the response must show.",
        {"type": "integer", "minimum": 0},
    ),
}

_RESPONSE_HEADERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "X-Request-ID": ("The id of the request; a client's own is kept.", {"type": "string"}),
    "RateLimit": ("The rest of the token's rate limit.", {"type": "string"}),
    "RateLimit-Policy": ("The token's rate limit.", {"type": "string"}),
    "Retry-After": ("Seconds to wait before the next request.", {"type": "integer"}),
    "ETag": ("The entity tag of the resource.", {"type": "string"}),
    "Location": ("The address of the resource.", {"type": "string"}),
    "Link": ("The addresses of other pages (RFC 8288).", {"type": "string"}),
    "Allow": ("The methods of the resource.", {"type": "string"}),
    "WWW-Authenticate": ("The authentication scheme.", {"type": "string"}),
    "Opsentry-Position": ("The ledger position that the response shows.", {"type": "integer"}),
    "Opsentry-Lag-Events": ("The number of events that the response lacks.", {"type": "integer"}),
    "Opsentry-Ignored-Fields": ("Unknown fields of the body, which were ignored.", {"type": "string"}),
    "Idempotency-Replayed": ("`true` for the response of an earlier request with the same key.", {"type": "string"}),
    "Content-Disposition": ("The name of the file.", {"type": "string"}),
    "Vary": ("The request headers that the response depends on.", {"type": "string"}),
}

_ERRORS = {
    400: "The request is invalid. `field` names the part at fault.",
    401: "The token is missing, unknown, expired or revoked.",
    403: "The token lacks a scope.",
    404: "The tenant has no such resource.",
    408: "The body did not arrive in time.",
    409: "The resource's present state forbids the change.",
    412: "The resource has another entity tag than `If-Match` names.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "The idempotency key belongs to another request.",
    429: "The rate limit is exceeded.",
    500: "The server has a defect.",
    503: "A dependency is down; nothing was changed unless the message says otherwise.",
}


class OpenApiDocument(msgspec.Struct, kw_only=True):
    """An OpenAPI 3.1 document."""

    openapi: str
    info: dict[str, Any]
    servers: Sequence[dict[str, Any]]
    tags: Sequence[dict[str, Any]]
    paths: dict[str, Any]
    components: dict[str, Any]


@operation("GET", "/api/v1/openapi.json", tag="API description", audience="anyone", result=OpenApiDocument)
async def get_openapi_document(request: web.Request) -> web.StreamResponse:
    """Get this document.

    It is generated from the operations that the server routes.
    """
    return json_response(request.app[DOCUMENT])


OPERATIONS = (get_openapi_document,)


def build_document(operations: Sequence[Operation]) -> dict[str, Any]:
    """Return the OpenAPI document of `operations` as JSON values."""
    results = [result for each in operations for result in each.results]
    bodies = [each.body for each in operations if each.body is not None]
    types = [*results, *bodies, *_query_types(operations), ErrorBody]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = dict(zip(map(_key, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, by_type)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Opsentry",
            "version": __version__,
            "description": "Incidents, maintenance and service status of many tenants.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in operations)],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": _error_responses(by_type[_key(ErrorBody)]),
            "headers": {
                name: {"description": description, "required": False, "schema": schema}
                for name, (description, schema) in _RESPONSE_HEADERS.items()
            },
            "securitySchemes": {
                "apiToken": {"type": "http", "scheme": "bearer", "description": "A tenant's API token, `ops_…`."},
                "operatorToken": {"type": "http", "scheme": "bearer", "description": "An operator's token, `opo_…`."},
            },
        },
    }
    # Only JSON values: defaults of structs are tuples.
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    return values


def _key(type_: Any) -> str:
    return repr(type_)


def _query_types(operations: Sequence[Operation]) -> list[Any]:
    return [hint for each in operations if each.query for hint in _hints(each.query).values()]


def _hints(query: type[msgspec.Struct]) -> Mapping[str, Any]:
    """Return the type of each parameter. One with values that are known at run time is a plain string here."""
    names = {info.name: info.encode_name for info in msgspec.structs.fields(query)}
    hints = get_type_hints(query, include_extras=True)
    return {names[name]: _plain(hint) for name, hint in hints.items() if name in names}


def _plain(hint: Any) -> Any:
    return str if _enum(hint) else hint


def _enum(hint: Any) -> EnumOf | None:
    parts = [hint, *get_args(hint)] if get_origin(hint) is not Annotated else [hint]
    found = [meta for part in parts for meta in getattr(part, "__metadata__", ()) if isinstance(meta, EnumOf)]
    return found[0] if found else None


def _operation(operation: Operation, by_type: Mapping[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [operation.tag],
        "security": _SECURITY[operation.audience],
        "parameters": [*_path_parameters(operation), *_query_parameters(operation, by_type), *_headers(operation)],
        "responses": _responses(operation, by_type),
    }
    if operation.description:
        described["description"] = operation.description
    if operation.scopes:
        described["x-required-scopes"] = list(operation.scopes)
    if operation.body is not None:
        content: dict[str, Any] = {"schema": by_type[_key(operation.body)]}
        if operation.example:
            content["example"] = operation.example
        described["requestBody"] = {"required": not operation.is_body_optional, "content": {_JSON: content}}
    return described


def _path_parameters(operation: Operation) -> list[dict[str, Any]]:
    schemas: dict[str, Mapping[str, Any]] = {"id": {"type": "integer", "minimum": 1}}
    return [
        {"name": name, "in": "path", "required": True, "schema": schemas.get(name, {"type": "string"})}
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ]


def _query_parameters(operation: Operation, by_type: Mapping[str, Any]) -> list[dict[str, Any]]:
    if operation.query is None:
        return []
    defaults = {info.encode_name: info.default for info in msgspec.structs.fields(operation.query)}
    enums = {
        info.encode_name: _enum(get_type_hints(operation.query, include_extras=True)[info.name])
        for info in msgspec.structs.fields(operation.query)
    }
    parameters = []
    for name, hint in _hints(operation.query).items():
        schema = _without_null(by_type[_key(hint)])
        if (enum := enums[name]) is not None:
            schema = {"type": "string", "enum": list(enum.values)}
        if defaults[name] is not None:
            schema = {**schema, "default": defaults[name]}
        parameters.append({"name": name, "in": "query", "required": False, "schema": schema})
    return parameters


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter, which is absent rather than null."""
    found = {key: value for key, value in schema.items() if key != "default"}
    if "anyOf" in found:
        rest = [each for each in found["anyOf"] if each != {"type": "null"}]
        found = {**found, "anyOf": rest} if len(rest) > 1 else {**found, **rest[0]}
        if len(rest) == 1:
            del found["anyOf"]
    if "enum" in found:
        found["enum"] = [value for value in found["enum"] if value is not None]
    return found


def _headers(operation: Operation) -> list[dict[str, Any]]:
    names = []
    if operation.audience == "tenant":
        names.append("Opsentry-Min-Position")
    if operation.is_idempotent:
        names.append("Idempotency-Key")
    if operation.is_conditional:
        names.append("If-None-Match" if operation.method == "GET" else "If-Match")
    return [
        {"name": name, "in": "header", "required": False, "description": description, "schema": schema}
        for name, (description, schema) in ((name, _REQUEST_HEADERS[name]) for name in names)
    ]


def _responses(operation: Operation, by_type: Mapping[str, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": HTTPStatus(operation.status).phrase, "headers": _response_headers()}
    if operation.results:
        success["content"] = {operation.media_type: {"schema": _result(operation, by_type)}}
    elif operation.status != HTTPStatus.NO_CONTENT:
        success["content"] = {operation.media_type: {"schema": {"type": "string"}}}
    responses = {str(operation.status): success}
    for status in operation.error_statuses:
        responses[str(status)] = {"$ref": f"#/components/responses/{status}"}
        if status == HTTPStatus.SERVICE_UNAVAILABLE and operation.audience == "anyone":
            # Readiness reports its checks with this status.
            responses["503"] = {**success, "description": _ERRORS[503]}
    return dict(sorted(responses.items()))


def _error_responses(schema: Mapping[str, Any]) -> dict[str, Any]:
    common = {"headers": _response_headers(), "content": {_JSON: {"schema": schema}}}
    responses: dict[str, Any] = {
        str(status): {"description": description, **common} for status, description in _ERRORS.items()
    }
    return {**responses, "304": {"description": "The client has the present state.", "headers": _response_headers()}}


def _result(operation: Operation, by_type: Mapping[str, Any]) -> Mapping[str, Any]:
    schemas: list[Mapping[str, Any]] = [by_type[_key(result)] for result in operation.results]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _response_headers() -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in _RESPONSE_HEADERS}

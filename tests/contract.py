"""The contract: every response that tests receive is held to the OpenAPI document."""

import json
import re
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from opsentry.bootstrap import OPERATIONS
from opsentry.http.openapi import build_document

# Headers of HTTP itself, of the framework, and those that concern no client.
STANDARD_HEADERS = {
    "cache-control", "connection", "content-encoding", "content-length", "content-type", "date", "keep-alive", "server",
    "transfer-encoding",
}  # fmt: skip


@cache
def document() -> dict[str, Any]:
    return build_document(OPERATIONS)


@cache
def _paths() -> list[tuple[re.Pattern[str], str]]:
    # Literal paths come before those with parameters.
    ordered = sorted(document()["paths"], key=lambda path: "{" in path)
    return [(re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), path) for path in ordered]


def _strict(schema: Any) -> Any:
    """Refuse fields that the schema does not name."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _strict(value) for name, value in schema.items()}
    if found.get("type") == "object" and "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


@cache
def _registry() -> Any:
    strict = {"components": _strict(document()["components"])}
    return Registry().with_resource("urn:api", Resource.from_contents(strict, default_specification=DRAFT202012))


@cache
def _validator(path: str, method: str, status: str) -> Draft202012Validator | None:
    response = resolve(document()["paths"][path][method]["responses"][status])
    content = response.get("content", {}).get("application/json")
    if content is None:
        return None
    schema = json.loads(json.dumps(content["schema"]).replace('"#/', '"urn:api#/'))
    return Draft202012Validator(schema, registry=_registry())


def resolve(value: dict[str, Any]) -> dict[str, Any]:
    """Return what a `$ref` of the document names, or the value itself."""
    if "$ref" not in value:
        return value
    found: Any = document()
    for part in value["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return resolve(found)


def check_response(method: str, url: str, status: int, headers: Any, octets: bytes) -> None:
    """Hold one response to the document: its status, its headers, its body.

    Responses of pages, and of paths that no operation has, are not described.
    """
    path = re.sub(r"^https?://[^/]*", "", url).partition("?")[0]
    known = next((template for pattern, template in _paths() if pattern.fullmatch(path)), None)
    method = "get" if method == "HEAD" else method.lower()
    described = {} if known is None else document()["paths"][known].get(method)
    if not described:
        return
    context = f"{method} {known} -> {status}"
    assert str(status) in described["responses"], f"{context}: status is not documented"
    response = resolve(described["responses"][str(status)])
    named = {name.lower() for name in response.get("headers", {})} | STANDARD_HEADERS
    assert {name.lower() for name in headers} <= named, f"{context}: {set(headers)}"
    validator = _validator(known, method, str(status)) if known else None
    if validator is not None and octets:
        assert octets.endswith(b"\n"), f"{context}: the body does not end its line"
        problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(json.loads(octets))]
        assert not problems, f"{context}: {problems[:3]}"

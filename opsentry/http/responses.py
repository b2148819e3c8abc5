"""Responses: results of use cases as HTTP."""

from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from opsentry import __version__
from opsentry.application.results import Listing, Resource
from opsentry.projections.page_request import PageRequest

_JSON = CIMultiDict({"Content-Type": "application/json; charset=utf-8"})
NO_STORE = {"Cache-Control": "no-store"}


def json_response(body: bytes, *, status: int = HTTPStatus.OK) -> web.Response:
    """Return encoded JSON as a line, so that a terminal shows the next prompt below it."""
    return web.Response(status=status, body=body + b"\n", headers=_JSON)


def encoded_response(value: Any, *, position: int | None = None, lag_events: int = 0) -> web.Response:
    """Return a value as JSON, with an entity tag made of its octets."""
    response = json_response(msgspec.json.encode(value))
    _add_digest(response)
    if position is not None:
        _add_position(response, position, lag_events)
    return response


def resource_response(
    resource: Resource, *, status: int = HTTPStatus.OK, collection: str | None = None
) -> web.Response:
    """Return a resource; with a `collection`, also its address there."""
    has_body = status != HTTPStatus.NO_CONTENT
    response = json_response(resource.body, status=status) if has_body else web.Response(status=status)
    if has_body and resource.etag is not None:
        response.headers["ETag"] = f'"{resource.etag}"'
    elif has_body:
        _add_digest(response)
    if collection is not None:
        response.headers["Location"] = f"/api/v1/{collection}/{resource.id}"
    if resource.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return _add_position(response, resource.position, resource.lag_events)


def list_response(request: web.Request, name: str, listing: Listing, page: PageRequest | None = None) -> web.Response:
    """Return a list. Its items are joined as they are stored, never decoded.

    Args:
        request: The request, for the addresses of other pages.
        name: The name of the array.
        listing: The items.
        page: The page; without one the array stands alone.
    """
    opening = f'{{"{name}":['.encode()
    if page is None or page.limit is None:
        response = json_response(b"".join((opening, listing.items, b"]}")))
    else:
        closing = f'],"total":{listing.total},"limit":{page.limit},"offset":{page.offset}}}'.encode()
        response = json_response(b"".join((opening, listing.items, closing)))
        links: dict[str, dict[str, int | str]] = {}
        if page.offset + page.limit < (listing.total or 0):
            links["next"] = {"limit": page.limit, "offset": page.offset + page.limit}
        if page.offset > 0:
            links["prev"] = {"limit": page.limit, "offset": max(0, page.offset - page.limit)}
        add_links(request, response, links)
    if listing.tag is None:
        _add_digest(response)
    else:
        response.headers["ETag"] = f'W/"{__version__}-{listing.tag}"'
    return _add_position(response, listing.position, listing.lag_events)


def add_links(request: web.Request, response: web.Response, links: Mapping[str, Mapping[str, int | str]]) -> None:
    """Add a `Link` header (RFC 8288): for each relation, the query parameters that differ from this request's."""
    values = [_link(request.path_qs, relation, tuple(query.items())) for relation, query in links.items()]
    if values:
        response.headers["Link"] = ", ".join(values)


# Clients read the same few pages again and again, and building a link takes about 3 % of a list's time.
@lru_cache(maxsize=256)
def _link(url: str, relation: str, query: tuple[tuple[str, int | str], ...]) -> str:
    return f'<{URL(url, encoded=True).update_query(dict(query))}>; rel="{relation}"'


def _add_position(response: web.Response, position: int, lag_events: int) -> web.Response:
    response.headers["Opsentry-Position"] = str(position)
    # Seen only where a read model could not be brought up to date in time.
    if lag_events > 0:
        response.headers["Opsentry-Lag-Events"] = str(lag_events)
    return response


def _add_digest(response: web.Response) -> None:
    if isinstance(response.body, bytes):
        response.headers["ETag"] = f'"{blake2b(response.body, digest_size=12).hexdigest()}"'

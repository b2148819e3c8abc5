"""The shapes of answers: single things, lists, and `304 Not Modified`."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from opsentry import __version__
from opsentry.api.context import RequestContext
from opsentry.api.errors import NotFound
from opsentry.projections.as_of import RenderedPage, RenderedResource
from opsentry.projections.engine.projector import PositionNotReached

_JSON = CIMultiDict({"Content-Type": "application/json; charset=utf-8"})

# What a 304 repeats of the answer that it stands for (RFC 9110, section 15.4.5), and what is ours.
_KEPT = ("ETag", "Link", "Opsentry-Position", "Opsentry-Lag-Events")


def object_response(body: bytes, *, status: int = 200, etag: str | None = None) -> web.Response:
    """Return a single thing; `etag` is the inside of its strong entity tag."""
    response = web.Response(status=status, body=body, headers=_JSON)
    if etag is not None:
        response.headers["ETag"] = f'"{etag}"'
    return response


def list_response(
    call: RequestContext,
    name: str,
    row: Mapping[str, Any],
    page: tuple[int, int] | None = None,
    *,
    timeless: bool = True,
) -> web.Response:
    """Return a list of stored answers: joined, never decoded.

    Args:
        call: The request.
        name: What the array is called.
        row: With `items`, the inside of a JSON array in UTF-8 or NULL, and `total` where there are pages.
        page: (limit, offset); without, the array stands alone.
        timeless: Whether the list changes by events alone, so that the position it shows can stand for all of it.
    """
    opening, items = f'{{"{name}":['.encode(), row["items"] or b""
    if page is None:
        response = object_response(b"".join((opening, items, b"]}")))
    else:
        limit, offset = page
        total = row["total"]
        closing = f'],"total":{total},"limit":{limit},"offset":{offset}}}'.encode()
        response = object_response(b"".join((opening, items, closing)))
        links: dict[str, dict[str, int | str]] = {}
        if offset + limit < total:
            links["next"] = {"limit": limit, "offset": offset + limit}
        if offset > 0:
            links["prev"] = {"limit": limit, "offset": max(0, offset - limit)}
        add_links(call, response, links)
    if timeless and row["tag"] is not None:
        response.headers["ETag"] = f'W/"{__version__}-{row["tag"]}"'
    else:
        add_digest(response)
    return with_position(response, row)


def page_as_of(
    call: RequestContext, name: str, found: RenderedPage, page: tuple[int, int] | None = None
) -> web.Response:
    """Return a list as it was; see `list_response`."""
    positions = dict.fromkeys(("head_position", "trusted_position", "projected_position"), found.position)
    row = {**positions, "total": found.total, "items": found.items, "tag": f"as-of-{found.position}"}
    return list_response(call, name, row, page)


def one_response(row: Mapping[str, Any]) -> web.Response:
    """Return the thing in `row`.

    Raises:
        NotFound: There is none.
        PositionNotReached: The row lags, so there may be one.
    """
    if row["body"] is None:
        if (row["trusted_position"] or 0) < row["head_position"]:
            raise PositionNotReached("what was recorded last cannot be shown yet")
        raise NotFound
    return with_position(object_response(row["body"], etag=row["etag"]), row)


async def one_or_recorded(
    row: Mapping[str, Any], recorded: Callable[[int], Awaitable[RenderedResource | None]]
) -> web.Response:
    """Return the thing in `row` or, where the row is not up to date and has none, what is `recorded` of it.

    What a command answered is never denied, however far behind read models are.

    Raises:
        NotFound: There is none.
    """
    if row["body"] is None and (row["projected_position"] or 0) < row["head_position"]:
        return one_as_of(await recorded(row["head_position"]), row["head_position"])
    return one_response(row)


def one_as_of(found: RenderedResource | None, position: int) -> web.Response:
    """Return the thing as it was at `position`.

    Raises:
        NotFound: There was none.
    """
    if found is None:
        raise NotFound
    response = object_response(found.body, etag=found.etag)
    response.headers["Opsentry-Position"] = str(position)
    return response


def with_position(response: web.Response, row: Mapping[str, Any]) -> web.Response:
    """Return `response` saying which position it shows, and how many events it lacks if it does."""
    response.headers["Opsentry-Position"] = str(row["projected_position"] or 0)
    # Seen only where a read model could not be brought up to date in time: better old than nothing, but said.
    if (lag := row["head_position"] - (row["trusted_position"] or 0)) > 0:
        response.headers["Opsentry-Lag-Events"] = str(lag)
    return response


def add_digest(response: web.Response) -> web.Response:
    """Return `response` with an entity tag made of its octets."""
    body = response.body
    if isinstance(body, bytes):
        response.headers["ETag"] = f'"{blake2b(body, digest_size=12).hexdigest()}"'
    return response


def add_links(call: RequestContext, response: web.Response, links: Mapping[str, Mapping[str, int | str]]) -> None:
    """Add a `Link` header (RFC 8288): for each relation, the query parameters that differ from this request's."""
    url = call.request.rel_url
    values = [f'<{url.update_query(dict(query))}>; rel="{relation}"' for relation, query in links.items()]
    if values:
        response.headers["Link"] = ", ".join(values)


def unless_known(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Return `304 Not Modified` in place of `response` if the client has it already (RFC 9110, section 13.1.2)."""
    known = request.headers.getall("If-None-Match", ())
    if not known or response.status != 200 or request.method not in {"GET", "HEAD"}:  # noqa: PLR2004
        return response
    current = response.headers.get("ETag")
    if current is None or not _names(known, current):
        return response
    kept = {name: response.headers[name] for name in _KEPT if name in response.headers}
    return web.Response(status=304, headers=kept)


def _names(values: Iterable[str], current: str) -> bool:
    # Compared weakly, as the specification has it for this field.
    tags = entity_tags(values)
    return "*" in tags or current.removeprefix("W/") in [tag.removeprefix("W/") for tag in tags]


def entity_tags(values: Iterable[str]) -> Sequence[str]:
    """Return the entity tags in the values of a field; ours have no comma inside."""
    return [tag.strip() for value in values for tag in value.split(",")]

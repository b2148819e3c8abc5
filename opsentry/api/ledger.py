"""`/events…`, the tenant's ledger for auditors, and what incidents and windows share of it: history and erasure."""

import asyncio
from collections.abc import Sequence

import msgspec
import structlog
from aiohttp import web

from opsentry.api.context import Id, RequestContext
from opsentry.api.errors import BadRequest, NotFound
from opsentry.api.responses import add_digest, add_links, object_response
from opsentry.domain.events import EVENT_TYPES
from opsentry.domain.redaction import RedactionPlan, plan
from opsentry.events import audit, export
from opsentry.events.audit import Entry
from opsentry.events.codec import RecordedEvent, written

_log = structlog.get_logger()

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000

# A client that takes nothing of an export for so long is given up.
_STALLED_SECONDS = 30
_BATCH = 1000


class RedactionBody(msgspec.Struct):
    """Body of `POST /incidents/:id/redactions` and the same of windows: which words, and why."""

    reason: str
    fields: tuple[str, ...] = ()
    events: tuple[Id, ...] = ()


def erasure(history: Sequence[RecordedEvent], own: Sequence[str], body: RedactionBody) -> RedactionPlan:
    """Return what `body` asks to erase of a stream; raises as `redaction.plan`."""
    return plan(written(history), own, body.fields, body.events)


async def stream_history(call: RequestContext, kind: str) -> web.Response:
    """Answer with the events of the stream that the path names.

    Raises:
        NotFound: There is none.
    """
    stream_id, after, limit = call.id(), call.number("after", 0), _limit(call)
    head = await call.head()
    async with call.parts.database.connection() as connection:
        entries, more = await audit.read_stream_page(
            connection, call.tenant_id, kind, stream_id, after=after, limit=limit
        )
        found = entries
        if not found:  # past the end of it, or is there none?
            found, _ = await audit.read_stream_page(connection, call.tenant_id, kind, stream_id, after=0, limit=1)
    if not found:
        raise NotFound
    return _page(call, entries, more, after, limit, head.position)


async def page(call: RequestContext) -> web.Response:
    """`GET /events`."""
    after, limit = call.number("after", 0), _limit(call)
    type_ = call.choice("type", sorted(EVENT_TYPES))
    head = await call.head()
    async with call.parts.database.connection() as connection:
        entries, more = await audit.read_ledger_page(connection, call.tenant_id, after=after, limit=limit, type_=type_)
    return _page(call, entries, more, after, limit, head.position)


async def head(call: RequestContext) -> web.Response:
    """`GET /events/head`."""
    found = await call.head()
    response = add_digest(object_response(msgspec.json.encode(found)))
    response.headers["Opsentry-Position"] = str(found.position)
    return response


async def export_lines(call: RequestContext) -> web.StreamResponse:
    """`GET /events/export`: the ledger as lines of JSON, read and sent some at a time."""
    first = call.number("from_position", 1, lowest=1)
    ends = (await call.head()).position
    last = min(call.number("to_position", ends), ends)
    if first > last + 1:
        raise BadRequest(f"from_position: the export ends at position {last}")
    headers = {
        **call.headers,
        "Content-Type": "application/x-ndjson",
        "Content-Disposition": f'attachment; filename="ledger-{call.tenant_id}-{first}-{last}.ndjson"',
        "Opsentry-Position": str(last),
        "Vary": "Accept-Encoding",
    }
    if call.request.method == "HEAD":
        return web.Response(headers=headers)
    async with call.parts.database.connection() as connection:
        chunk = await export.chunk(connection, call.tenant_id, first - 1, min(first - 1 + _BATCH, last))
    response = web.StreamResponse(headers=headers)
    if "gzip" in call.request.headers.get("Accept-Encoding", "").lower():
        response.enable_compression(web.ContentCoding.gzip)
    await response.prepare(call.request)
    try:
        after = first - 1
        while after < last:
            after = min(after + _BATCH, last)
            async with asyncio.timeout(_STALLED_SECONDS):
                await response.write(chunk)
            if after < last:
                async with call.parts.database.connection() as connection:
                    chunk = await export.chunk(connection, call.tenant_id, after, min(after + _BATCH, last))
        await response.write_eof()
    except Exception as error:  # noqa: BLE001 - the answer has begun: what is left is to let it break off visibly
        _log.warning("export broken off", request_id=call.request_id, error=type(error).__name__)
        if call.request.transport is not None:
            call.request.transport.abort()
    return response


def _limit(call: RequestContext) -> int:
    return min(call.number("limit", DEFAULT_LIMIT, lowest=1), MAX_LIMIT)


def _page(
    call: RequestContext, entries: Sequence[Entry], more: int | None, after: int, limit: int, head: int
) -> web.Response:
    answer = {"events": entries, "after": after, "limit": limit, "next": more}
    response = add_digest(object_response(msgspec.json.encode(answer)))
    if more is not None:
        add_links(call, response, {"next": {"after": more}})
    response.headers["Opsentry-Position"] = str(head)
    return response

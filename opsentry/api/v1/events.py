"""`/api/v1/events`: the tenant's ledger for auditors; and the parts that streams share with it."""

import asyncio
from typing import Annotated

import msgspec
import structlog
from aiohttp import web
from msgspec import Meta

from opsentry.api.v1.schemas import EventPage
from opsentry.application import ledger
from opsentry.application.ledger import LedgerPage
from opsentry.domain.events import EVENT_TYPES
from opsentry.events.audit import LedgerHead
from opsentry.http.body import NoBody
from opsentry.http.context import RequestContext
from opsentry.http.operation import operation
from opsentry.http.params import EnumOf, Id, NoQuery, Position
from opsentry.http.responses import add_links, encoded_response

_log = structlog.get_logger()

# A client that takes nothing of an export for this long is disconnected.
EXPORT_STALL_TIMEOUT_SECONDS = 30

_TAG = "Ledger"

EventLimit = Annotated[int, Meta(ge=1, le=1000, description="Entries on the page; a higher number is clamped.")]


class RedactionBody(msgspec.Struct):
    """The text to erase, and the reason."""

    reason: str
    fields: tuple[str, ...] = ()
    events: tuple[Id, ...] = ()


class StreamEventsQuery(msgspec.Struct, kw_only=True):
    """A page of events after a position."""

    after: Position = 0
    limit: EventLimit = 100


class ListEventsQuery(StreamEventsQuery, kw_only=True):
    """The same, of one type."""

    type: Annotated[str, EnumOf(tuple(sorted(EVENT_TYPES)))] | None = None


class ExportQuery(msgspec.Struct, kw_only=True):
    """The part of the ledger to export."""

    from_position: Id = 1
    to_position: Position | None = None


@operation("GET", "/api/v1/events", tag=_TAG, scopes=("read:audit",), result=EventPage, conditional=True)
async def list_events(context: RequestContext[ListEventsQuery, NoBody]) -> web.StreamResponse:
    """List the events of the tenant's ledger after a position.

    A page may be short, even empty, and yet not be the last one: `next` is null at the end.
    """
    query = context.query
    page = await ledger.list_events(
        context.application, context.caller, after=query.after, limit=query.limit, event_type=query.type
    )
    return events_response(context.request, page, query)


@operation("GET", "/api/v1/events/head", tag=_TAG, scopes=("read:audit",), result=LedgerHead, conditional=True)
async def get_ledger_head(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Get the end of the ledger.

    Store it elsewhere as an anchor: it proves later that nothing was truncated.
    """
    head = await ledger.get_ledger_head(context.application, context.caller)
    return encoded_response(head, position=head.position)


@operation("GET", "/api/v1/events/export", tag=_TAG, scopes=("read:audit",), media_type="application/x-ndjson")
async def export_events(context: RequestContext[ExportQuery, NoBody]) -> web.StreamResponse:
    """Export the ledger as lines of JSON, compressed if the client accepts gzip."""
    query, request = context.query, context.request
    export = await ledger.export_events(
        context.application, context.caller, first=query.from_position, last=query.to_position
    )
    name = f"ledger-{context.caller.tenant_id}-{export.first}-{export.last}.ndjson"
    headers = {
        **context.headers,
        "Content-Type": "application/x-ndjson",
        "Content-Disposition": f'attachment; filename="{name}"',
        "Opsentry-Position": str(export.last),
        "Vary": "Accept-Encoding",
    }
    if request.method == "HEAD":
        return web.Response(headers=headers)
    chunk = await anext(export.chunks, b"")
    response = web.StreamResponse(headers=headers)
    if "gzip" in request.headers.get("Accept-Encoding", "").lower():
        response.enable_compression(web.ContentCoding.gzip)
    await response.prepare(request)
    try:
        while chunk:
            async with asyncio.timeout(EXPORT_STALL_TIMEOUT_SECONDS):
                await response.write(chunk)
            chunk = await anext(export.chunks, b"")
        await response.write_eof()
    except Exception as error:  # noqa: BLE001 - the response has begun: it must break off visibly
        _log.warning("export_aborted", request_id=context.caller.request_id, error=type(error).__name__)
        if request.transport is not None:
            request.transport.abort()
    return response


async def stream_events_response(context: RequestContext[StreamEventsQuery, NoBody], kind: str) -> web.StreamResponse:
    """Return the events of the stream that the path names."""
    query = context.query
    page = await ledger.list_stream_events(
        context.application, context.caller, kind, context.id, after=query.after, limit=query.limit
    )
    return events_response(context.request, page, query)


def events_response(request: web.Request, page: LedgerPage, query: StreamEventsQuery) -> web.Response:
    """Return a page of events, with a link to the next one."""
    body = EventPage(events=page.entries, after=query.after, limit=query.limit, next=page.next_position)
    response = encoded_response(body, position=page.head_position)
    if page.next_position is not None:
        add_links(request, response, {"next": {"after": page.next_position}})
    return response


OPERATIONS = (list_events, get_ledger_head, export_events)

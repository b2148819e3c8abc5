"""Use cases of the ledger: pages for auditors, the history of one stream, the export."""

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.errors import NotFound
from opsentry.application.queries import read_head
from opsentry.domain.decider import InvalidField
from opsentry.events import audit, export, store
from opsentry.events.audit import Entry, LedgerHead
from opsentry.events.codec import RecordedEvent

EXPORT_BATCH_EVENTS = 1000
HISTORY_PAGE_EVENTS = 1000


class LedgerPage(NamedTuple):
    """Entries of the ledger; `next_position` is where the next page begins, `None` at the end."""

    entries: Sequence[Entry]
    next_position: int | None
    head_position: int


class StreamHistory(NamedTuple):
    """All events of one stream: as the domain folds them, and as an auditor sees them."""

    recorded: Sequence[RecordedEvent]
    entries: Sequence[Entry]


class LedgerExport(NamedTuple):
    """A part of the ledger as lines of JSON; `chunks` reads them from the database as they are asked for."""

    first: int
    last: int
    chunks: AsyncIterator[bytes]


async def list_events(
    app: Application, caller: Caller, *, after: int, limit: int, event_type: str | None
) -> LedgerPage:
    """Return entries of the tenant's ledger after a position.

    Raises:
        MissingPermission: The caller may not read the ledger.
        PositionNotReached, DatabaseUnavailable: See `read_head`.
    """
    caller.require("read:audit")
    head = await read_head(app, caller)
    async with app.database.connection() as connection:
        entries, more = await audit.read_ledger_page(
            connection, caller.tenant_id, after=after, limit=limit, type_=event_type
        )
    return LedgerPage(entries, more, head.position)


async def list_stream_events(
    app: Application, caller: Caller, kind: str, stream_id: int, *, after: int, limit: int
) -> LedgerPage:
    """Return entries of one incident or window after a position; raises `NotFound`, and as `list_events`."""
    caller.require("read:status")
    head = await read_head(app, caller)
    async with app.database.connection() as connection:
        entries, more = await audit.read_stream_page(
            connection, caller.tenant_id, kind, stream_id, after=after, limit=limit
        )
        found = entries
        if not found:  # beyond the stream's end, or without a stream?
            found, _ = await audit.read_stream_page(connection, caller.tenant_id, kind, stream_id, after=0, limit=1)
    if not found:
        raise NotFound
    return LedgerPage(entries, more, head.position)


async def get_stream_history(
    app: Application, caller: Caller, kind: str, stream_id: int, *, until: int | None = None
) -> StreamHistory:
    """Return the events of one stream up to position `until` (`None`: all); raises `NotFound`, and as `list_events`.

    A stream that began after `until` has an empty history.
    """
    caller.require("read:audit")
    async with app.database.connection() as connection:
        recorded = await store.read_stream(connection, caller.tenant_id, kind, stream_id)
        entries: list[Entry] = []
        after: int | None = 0
        while after is not None:
            page, after = await audit.read_stream_page(
                connection, caller.tenant_id, kind, stream_id, after=after, limit=HISTORY_PAGE_EVENTS
            )
            entries += page
    if not recorded:
        raise NotFound
    # Events that were appended between the two reads are left out.
    last = recorded[-1].position if until is None else min(until, recorded[-1].position)
    return StreamHistory(
        [event for event in recorded if event.position <= last], [entry for entry in entries if entry.position <= last]
    )


async def get_ledger_head(app: Application, caller: Caller) -> LedgerHead:
    """Return the end of the tenant's ledger; raises as `list_events`."""
    caller.require("read:audit")
    return await read_head(app, caller)


async def export_events(app: Application, caller: Caller, *, first: int, last: int | None) -> LedgerExport:
    """Export the ledger from position `first` to `last` (`None`: to its end); raises as `list_events`."""
    caller.require("read:audit")
    end = (await read_head(app, caller)).position
    last = end if last is None else min(last, end)
    if first > last + 1:
        raise InvalidField("from_position", f"the export ends at position {last}")
    return LedgerExport(first, last, _chunks(app, caller.tenant_id, first - 1, last))


async def _chunks(app: Application, tenant_id: int, after: int, last: int) -> AsyncIterator[bytes]:
    while after < last:
        until = min(after + EXPORT_BATCH_EVENTS, last)
        async with app.database.connection() as connection:
            chunk = await export.chunk(connection, tenant_id, after, until)
        yield chunk
        after = until

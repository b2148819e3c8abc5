"""Parts that all queries share: fresh rows, past positions, rendered results."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.errors import NotFound
from opsentry.application.results import Listing, Resource
from opsentry.domain.decider import InvalidField
from opsentry.events import audit
from opsentry.events.audit import LedgerHead
from opsentry.infrastructure.postgres import Connection, Record
from opsentry.projections.as_of import RenderedPage, RenderedResource
from opsentry.projections.engine.projector import PositionNotReached

HEAD_POLL_SECONDS = 0.05


async def read_row(app: Application, caller: Caller, query: Callable[[Connection], Awaitable[Record]]) -> Record:
    """Return the row of a read model's query. It shows every change that was answered before.

    Raises:
        PositionNotReached: The read model does not reach the caller's `min_position` in time.
        DatabaseUnavailable: The database was lost.
    """
    return await app.projector.read(caller.tenant_id, query, at_least=caller.min_position)


async def read_head(app: Application, caller: Caller) -> LedgerHead:
    """Return the end of the tenant's ledger, once it has reached the caller's `min_position`.

    Raises:
        PositionNotReached: It has not, within a bounded time.
        DatabaseUnavailable: The database was lost.
    """
    end = time.monotonic() + app.database.timeout_seconds
    while True:
        async with app.database.connection() as connection:
            head = await audit.read_ledger_head(connection, caller.tenant_id)
        if head.position >= caller.min_position:
            return head
        if time.monotonic() > end:
            raise PositionNotReached(f"position {caller.min_position} cannot be shown yet")
        await asyncio.sleep(HEAD_POLL_SECONDS)


async def resolve_as_of(app: Application, caller: Caller, as_of: int | datetime) -> int:
    """Return the ledger position that `as_of` means: itself, or the last one recorded by then.

    Raises:
        InvalidField: The position lies beyond the ledger's end, or the time in the future.
        PositionNotReached, DatabaseUnavailable: See `read_head`.
    """
    head = await read_head(app, caller)
    if isinstance(as_of, int):
        if as_of > head.position:
            raise InvalidField("as_of", f"the ledger ends at position {head.position}")
        return as_of
    async with app.database.connection() as connection:
        found = await audit.position_at(connection, caller.tenant_id, as_of)
    if found is None:
        raise InvalidField("as_of", "must not be in the future")
    return found


def resource_of_row(resource_id: int, row: Record) -> Resource:
    """Return the resource in a row of a read model.

    Raises:
        NotFound: There is none.
        PositionNotReached: The read model lags, so there may be one.
    """
    if row["body"] is None:
        if is_behind(row):
            raise PositionNotReached("the last changes cannot be shown yet")
        raise NotFound
    return Resource(resource_id, row["body"], row["etag"], row["projected_position"] or 0, lag_events(row))


def resource_as_of(resource_id: int, found: RenderedResource | None, position: int) -> Resource:
    """Return a resource as it was at `position`.

    Raises:
        NotFound: There was none.
    """
    if found is None:
        raise NotFound
    return Resource(resource_id, found.body, found.etag, position)


async def resource_of_row_or_ledger(
    resource_id: int, row: Record, from_ledger: Callable[[int], Awaitable[RenderedResource | None]]
) -> Resource:
    """Return the resource in a row or, where the read model lags, from the ledger: an answered command is never denied.

    Raises:
        NotFound: There is none.
    """
    if row["body"] is None and (row["projected_position"] or 0) < row["head_position"]:
        return resource_as_of(resource_id, await from_ledger(row["head_position"]), row["head_position"])
    return resource_of_row(resource_id, row)


def listing_of_row(row: Record, *, has_pages: bool = True, changes_with_time: bool = False) -> Listing:
    """Return the list in a row; one that `changes_with_time` has no tag, because events alone do not change it."""
    tag = None if changes_with_time else row["tag"]
    total = row["total"] if has_pages else None
    return Listing(row["items"] or b"", total, row["projected_position"] or 0, lag_events(row), tag)


def listing_as_of(page: RenderedPage, *, has_pages: bool = True) -> Listing:
    """Return a list as it was."""
    return Listing(page.items, page.total if has_pages else None, page.position, 0, f"as-of-{page.position}")


def lag_events(row: Record) -> int:
    """Return how many answered events a row lacks."""
    missing: int = row["head_position"] - (row["trusted_position"] or 0)
    return max(0, missing)


def is_behind(row: Record) -> bool:
    """Tell whether a row lacks answered events."""
    return lag_events(row) > 0

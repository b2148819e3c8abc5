"""Parts that all queries share: fresh rows, past positions, rendered results."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeAlias

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

Query: TypeAlias = Callable[[Connection], Awaitable[Record]]
"""Selects one row of a read model."""

HEAD_POLL_SECONDS = 0.05


async def read_row(app: Application, caller: Caller, query: Query) -> Record:
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


async def read_listing(
    app: Application,
    caller: Caller,
    as_of: int | datetime | None,
    *,
    present: Query,
    past: Callable[[int], Awaitable[RenderedPage]],
    has_pages: bool = True,
) -> Listing:
    """Return a list, now or as of a position or time.

    Args:
        app: The application.
        caller: The caller.
        as_of: A position or time; `None` means now.
        present: Selects the row of the read model with `items`, `total` and `tag`.
        past: Renders the list as of a position from the ledger.
        has_pages: Whether the list has pages, and so a total.

    Raises:
        MissingPermission: The caller may not read.
        InvalidField: `as_of` lies in the future.
        PositionNotReached, DatabaseUnavailable: The read model cannot be read.
    """
    caller.require("read:status")
    if as_of is None:
        return listing_of_row(await read_row(app, caller, present), has_pages=has_pages)
    page = await past(await resolve_as_of(app, caller, as_of))
    return Listing(page.items, page.total if has_pages else None, page.position, 0, f"as-of-{page.position}")


async def read_resource(
    app: Application,
    caller: Caller,
    resource_id: int,
    as_of: int | datetime | None,
    *,
    present: Query,
    past: Callable[[int], Awaitable[RenderedResource | None]],
    recorded: Callable[[int], Awaitable[RenderedResource | None]] | None = None,
) -> Resource:
    """Return a resource, now or as of a position or time.

    Args:
        app: The application.
        caller: The caller.
        resource_id: The resource's id.
        as_of: A position or time; `None` means now.
        present: Selects the row of the read model with `body` and `etag`.
        past: Renders the resource as of a position from the ledger.
        recorded: Renders a resource that a read model lacks while it lags, so that an answered command is never denied.

    Raises:
        NotFound: There is none.
        MissingPermission, InvalidField, PositionNotReached, DatabaseUnavailable: See `read_listing`.
    """
    caller.require("read:status")
    if as_of is None:
        row = await read_row(app, caller, present)
        if row["body"] is not None or recorded is None or (row["projected_position"] or 0) >= row["head_position"]:
            return resource_of_row(resource_id, row)
        position, found = row["head_position"], await recorded(row["head_position"])
    else:
        position = await resolve_as_of(app, caller, as_of)
        found = await past(position)
    if found is None:
        raise NotFound
    return Resource(resource_id, found.body, found.etag, position)


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


def listing_of_row(row: Record, *, has_pages: bool = True, changes_with_time: bool = False) -> Listing:
    """Return the list in a row; one that `changes_with_time` has no tag, because events alone do not change it."""
    tag = None if changes_with_time else row["tag"]
    total = row["total"] if has_pages else None
    return Listing(row["items"] or b"", total, row["projected_position"] or 0, lag_events(row), tag)


def lag_events(row: Record) -> int:
    """Return how many answered events a row lacks."""
    missing: int = row["head_position"] - (row["trusted_position"] or 0)
    return max(0, missing)


def is_behind(row: Record) -> bool:
    """Tell whether a row lacks answered events."""
    return lag_events(row) > 0

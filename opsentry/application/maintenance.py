"""Use cases of maintenance windows: schedule, change, start, complete, cancel, redact, read."""

from datetime import datetime
from functools import partial

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.pipeline import run
from opsentry.application.queries import (
    listing_as_of,
    listing_of_row,
    read_row,
    resolve_as_of,
    resource_as_of,
    resource_of_row_or_ledger,
)
from opsentry.application.rendering import render_outcome
from opsentry.application.results import Listing, Resource
from opsentry.domain import maintenance
from opsentry.domain.maintenance import MaintenanceCommand, ScheduleMaintenance
from opsentry.projections import maintenance as windows
from opsentry.projections import maintenance_view
from opsentry.projections.maintenance_view import MaintenanceFilter
from opsentry.projections.page_request import PageRequest


async def schedule_maintenance(app: Application, caller: Caller, command: ScheduleMaintenance) -> Resource:
    """Schedule a maintenance window; raises as `pipeline.run`."""
    outcome = await run(app, caller, maintenance.DECIDER, command)
    return await render_outcome(app, caller, outcome, maintenance_view.render)


async def change_maintenance(
    app: Application, caller: Caller, maintenance_id: int, command: MaintenanceCommand
) -> Resource:
    """Change or move a maintenance window; raises as `pipeline.run`."""
    outcome = await run(app, caller, maintenance.DECIDER, command, stream_id=maintenance_id)
    return await render_outcome(app, caller, outcome, maintenance_view.render)


async def list_maintenance(
    app: Application, caller: Caller, window_filter: MaintenanceFilter, page: PageRequest, as_of: int | datetime | None
) -> Listing:
    """Return a page of windows, the last announced first, now or as of a position or time.

    Raises:
        MissingPermission: The caller may not read.
        InvalidField: `as_of` lies in the future.
        PositionNotReached, DatabaseUnavailable: The read model cannot be read.
    """
    caller.require("read:status")
    if as_of is not None:
        position = await resolve_as_of(app, caller, as_of)
        return listing_as_of(await app.as_of_queries.list_maintenance(caller.tenant_id, position, window_filter, page))
    row = await read_row(
        app, caller, lambda connection: windows.select_windows(connection, caller.tenant_id, window_filter, page)
    )
    return listing_of_row(row)


async def list_upcoming_maintenance(app: Application, caller: Caller) -> Listing:
    """Return all scheduled windows of the future, the next one first; raises as `list_maintenance`."""
    caller.require("read:status")
    row = await read_row(app, caller, lambda connection: windows.select_upcoming_windows(connection, caller.tenant_id))
    return listing_of_row(row, has_pages=False, changes_with_time=True)


async def get_maintenance(
    app: Application, caller: Caller, maintenance_id: int, as_of: int | datetime | None = None
) -> Resource:
    """Return a window with its timeline.

    Raises:
        NotFound: The tenant has none with this id.
        MissingPermission, InvalidField, PositionNotReached, DatabaseUnavailable: See `list_maintenance`.
    """
    caller.require("read:status")
    from_ledger = partial(app.as_of_queries.get_maintenance, caller.tenant_id, maintenance_id)
    if as_of is not None:
        position = await resolve_as_of(app, caller, as_of)
        return resource_as_of(maintenance_id, await from_ledger(position), position)
    row = await read_row(
        app, caller, lambda connection: windows.select_window(connection, caller.tenant_id, maintenance_id)
    )
    return await resource_of_row_or_ledger(maintenance_id, row, from_ledger)

"""Use cases of maintenance windows: schedule, change, start, complete, cancel, redact, read."""

from collections.abc import Awaitable
from datetime import datetime

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.pipeline import run
from opsentry.application.queries import listing_of_row, read_listing, read_resource, read_row
from opsentry.application.rendering import render_outcome
from opsentry.application.results import Listing, Resource
from opsentry.domain import maintenance
from opsentry.domain.maintenance import MaintenanceCommand, ScheduleMaintenance
from opsentry.projections import maintenance as windows
from opsentry.projections import maintenance_view
from opsentry.projections.as_of import RenderedResource
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
    """Return a page of windows, the last announced first; raises as `read_listing`."""
    return await read_listing(
        app,
        caller,
        as_of,
        present=lambda connection: windows.select_windows(connection, caller.tenant_id, window_filter, page),
        past=lambda position: app.as_of_queries.list_maintenance(caller.tenant_id, position, window_filter, page),
    )


async def list_upcoming_maintenance(app: Application, caller: Caller) -> Listing:
    """Return all scheduled windows of the future, the next one first; raises as `read_listing`."""
    caller.require("read:status")
    row = await read_row(app, caller, lambda connection: windows.select_upcoming_windows(connection, caller.tenant_id))
    return listing_of_row(row, has_pages=False, changes_with_time=True)


async def get_maintenance(
    app: Application, caller: Caller, maintenance_id: int, as_of: int | datetime | None = None
) -> Resource:
    """Return a window with its timeline; raises as `read_resource`."""

    def recorded(position: int) -> Awaitable[RenderedResource | None]:
        return app.as_of_queries.get_maintenance(caller.tenant_id, maintenance_id, position)

    return await read_resource(
        app,
        caller,
        maintenance_id,
        as_of,
        present=lambda connection: windows.select_window(connection, caller.tenant_id, maintenance_id),
        past=recorded,
        recorded=recorded,
    )

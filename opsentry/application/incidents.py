"""Use cases of incidents: declare, change, update, resolve, redact, read."""

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
from opsentry.domain import incident
from opsentry.domain.incident import IncidentCommand, OpenIncident
from opsentry.projections import incidents
from opsentry.projections.incident_view import IncidentFilter, render
from opsentry.projections.page_request import PageRequest


async def create_incident(
    app: Application, caller: Caller, command: OpenIncident, occurred_at: datetime | None = None
) -> Resource:
    """Declare an incident; raises as `pipeline.run`."""
    outcome = await run(app, caller, incident.DECIDER, command, occurred_at=occurred_at)
    return await render_outcome(app, caller, outcome, render)


async def change_incident(
    app: Application, caller: Caller, incident_id: int, command: IncidentCommand, occurred_at: datetime | None = None
) -> Resource:
    """Change, update or resolve an incident; raises as `pipeline.run`."""
    outcome = await run(app, caller, incident.DECIDER, command, stream_id=incident_id, occurred_at=occurred_at)
    return await render_outcome(app, caller, outcome, render)


async def list_incidents(
    app: Application, caller: Caller, incident_filter: IncidentFilter, page: PageRequest, as_of: int | datetime | None
) -> Listing:
    """Return a page of incidents, newest first, now or as of a position or time.

    Raises:
        MissingPermission: The caller may not read.
        InvalidField: `as_of` lies in the future.
        PositionNotReached, DatabaseUnavailable: The read model cannot be read.
    """
    caller.require("read:status")
    if as_of is not None:
        position = await resolve_as_of(app, caller, as_of)
        found = await app.as_of_queries.list_incidents(caller.tenant_id, position, incident_filter, page)
        return listing_as_of(found)
    row = await read_row(
        app,
        caller,
        lambda connection: incidents.select_incidents(connection, caller.tenant_id, incident_filter, page),
    )
    return listing_of_row(row)


async def list_active_incidents(app: Application, caller: Caller, as_of: int | datetime | None) -> Listing:
    """Return all incidents that are not resolved, newest first; raises as `list_incidents`."""
    caller.require("read:status")
    if as_of is not None:
        position = await resolve_as_of(app, caller, as_of)
        return listing_as_of(await app.as_of_queries.list_active_incidents(caller.tenant_id, position), has_pages=False)
    row = await read_row(
        app, caller, lambda connection: incidents.select_active_incidents(connection, caller.tenant_id)
    )
    return listing_of_row(row, has_pages=False)


async def get_incident(
    app: Application, caller: Caller, incident_id: int, as_of: int | datetime | None = None
) -> Resource:
    """Return an incident with its timeline.

    Raises:
        NotFound: The tenant has none with this id.
        MissingPermission, InvalidField, PositionNotReached, DatabaseUnavailable: See `list_incidents`.
    """
    caller.require("read:status")
    if as_of is not None:
        position = await resolve_as_of(app, caller, as_of)
        found = await app.as_of_queries.get_incident(caller.tenant_id, incident_id, position)
        return resource_as_of(incident_id, found, position)
    row = await read_row(
        app, caller, lambda connection: incidents.select_incident(connection, caller.tenant_id, incident_id)
    )
    from_ledger = partial(app.as_of_queries.get_recorded_incident, caller.tenant_id, incident_id)
    return await resource_of_row_or_ledger(incident_id, row, from_ledger)

"""Use cases of incidents: declare, change, update, resolve, redact, read."""

from datetime import datetime

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.pipeline import run
from opsentry.application.queries import read_listing, read_resource
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
    """Return a page of incidents, newest first; raises as `read_listing`."""
    return await read_listing(
        app,
        caller,
        as_of,
        present=lambda connection: incidents.select_incidents(connection, caller.tenant_id, incident_filter, page),
        past=lambda position: app.as_of_queries.list_incidents(caller.tenant_id, position, incident_filter, page),
    )


async def list_active_incidents(app: Application, caller: Caller, as_of: int | datetime | None) -> Listing:
    """Return all incidents that are not resolved, newest first; raises as `read_listing`."""
    return await read_listing(
        app,
        caller,
        as_of,
        present=lambda connection: incidents.select_active_incidents(connection, caller.tenant_id),
        past=lambda position: app.as_of_queries.list_active_incidents(caller.tenant_id, position),
        has_pages=False,
    )


async def get_incident(
    app: Application, caller: Caller, incident_id: int, as_of: int | datetime | None = None
) -> Resource:
    """Return an incident with its timeline; raises as `read_resource`."""
    queries = app.as_of_queries
    return await read_resource(
        app,
        caller,
        incident_id,
        as_of,
        present=lambda connection: incidents.select_incident(connection, caller.tenant_id, incident_id),
        past=lambda position: queries.get_incident(caller.tenant_id, incident_id, position),
        recorded=lambda position: queries.get_recorded_incident(caller.tenant_id, incident_id, position),
    )

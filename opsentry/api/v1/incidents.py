"""`/api/v1/incidents`."""

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from opsentry.api.v1.events import RedactionBody, StreamEventsQuery, stream_events_response
from opsentry.api.v1.schemas import ActiveIncidents, EventPage, IncidentDetail, IncidentList
from opsentry.application import incidents, redactions
from opsentry.domain import incident
from opsentry.domain.incident import ChangeIncident, IncidentStatus, OpenIncident, PostUpdate, ResolveIncident, Severity
from opsentry.domain.visibility import Visibility
from opsentry.http.body import NoBody
from opsentry.http.context import RequestContext
from opsentry.http.operation import operation
from opsentry.http.params import AsOf, AsOfQuery, Id, NoQuery, PageQuery, Timestamp
from opsentry.http.responses import list_response, resource_response
from opsentry.projections.incident_view import IncidentFilter
from opsentry.projections.page_request import PageRequest

_TAG = "Incidents"


class CreateIncidentBody(msgspec.Struct):
    """A new incident."""

    title: str
    description: str | None = None
    severity: Severity | None = "degraded"
    visibility: Visibility | None = "public"
    service_ids: tuple[Id, ...] | None = ()
    occurred_at: Timestamp | None = None


class ChangeIncidentBody(msgspec.Struct):
    """The fields to change. Null clears a field that may be empty."""

    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    severity: Severity | UnsetType = UNSET
    visibility: Visibility | UnsetType = UNSET
    status: IncidentStatus | UnsetType = UNSET
    service_ids: tuple[Id, ...] | None | UnsetType = UNSET
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class PostUpdateBody(msgspec.Struct):
    """A message for the timeline, which may move the status."""

    message: str
    status: IncidentStatus | UnsetType = UNSET
    is_public: bool = True
    occurred_at: Timestamp | None = None


class ResolveIncidentBody(msgspec.Struct):
    """The cause and the review, if they are known."""

    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET
    occurred_at: Timestamp | None = None


class ListIncidentsQuery(PageQuery, kw_only=True):
    """Filters and page of the incident list."""

    status: IncidentStatus | None = None
    severity: Severity | None = None
    as_of: AsOf | None = None


@operation("GET", "/api/v1/incidents", tag=_TAG, scopes=("read:status",), result=IncidentList, conditional=True)
async def list_incidents(context: RequestContext[ListIncidentsQuery, NoBody]) -> web.StreamResponse:
    """List incidents, newest first."""
    query = context.query
    page = PageRequest(query.limit, query.offset)
    incident_filter = IncidentFilter(query.status, query.severity)
    listing = await incidents.list_incidents(context.application, context.caller, incident_filter, page, query.as_of)
    return list_response(context.request, "incidents", listing, page)


@operation(
    "GET", "/api/v1/incidents/active", tag=_TAG, scopes=("read:status",), result=ActiveIncidents, conditional=True
)
async def list_active_incidents(context: RequestContext[AsOfQuery, NoBody]) -> web.StreamResponse:
    """List all incidents that are not resolved, newest first."""
    listing = await incidents.list_active_incidents(context.application, context.caller, context.query.as_of)
    return list_response(context.request, "incidents", listing)


@operation(
    "POST",
    "/api/v1/incidents",
    tag=_TAG,
    scopes=("write:incidents",),
    status=201,
    result=IncidentDetail,
    idempotent=True,
    example={
        "title": "Deploy failed — rolling back",
        "description": "Health checks failing post-deploy",
        "severity": "degraded",
        "visibility": "public",
        "service_ids": [1],
    },
)
async def create_incident(context: RequestContext[NoQuery, CreateIncidentBody]) -> web.StreamResponse:
    """Declare an incident.

    The incident starts as `investigating`. A description becomes the first entry of the timeline.
    """
    body = context.body
    command = OpenIncident(
        title=body.title,
        description=body.description,
        severity=body.severity or "degraded",
        visibility=body.visibility or "public",
        service_ids=body.service_ids or (),
    )
    created = await incidents.create_incident(context.application, context.caller, command, body.occurred_at)
    return resource_response(created, status=201, collection="incidents")


@operation("GET", "/api/v1/incidents/{id}", tag=_TAG, scopes=("read:status",), result=IncidentDetail, conditional=True)
async def get_incident(context: RequestContext[AsOfQuery, NoBody]) -> web.StreamResponse:
    """Get an incident with its timeline."""
    found = await incidents.get_incident(context.application, context.caller, context.id, context.query.as_of)
    return resource_response(found)


@operation(
    "PATCH",
    "/api/v1/incidents/{id}",
    tag=_TAG,
    scopes=("write:incidents",),
    result=IncidentDetail,
    idempotent=True,
    conditional=True,
    errors=(409,),
    example={"status": "monitoring", "severity": "informational"},
)
async def change_incident(context: RequestContext[NoQuery, ChangeIncidentBody]) -> web.StreamResponse:
    """Change an incident.

    Fields that are absent stay as they are. A change without effect records no event.
    """
    values = msgspec.structs.asdict(context.body)
    if values["service_ids"] is None:
        values["service_ids"] = ()
    changed = await incidents.change_incident(context.application, context.caller, context.id, ChangeIncident(**values))
    return resource_response(changed)


@operation(
    "POST",
    "/api/v1/incidents/{id}/updates",
    tag=_TAG,
    scopes=("write:incidents",),
    status=201,
    result=IncidentDetail,
    idempotent=True,
    conditional=True,
    errors=(409,),
    example={"status": "monitoring", "message": "Failover complete. Watching for 15 minutes.", "is_public": True},
)
async def post_incident_update(context: RequestContext[NoQuery, PostUpdateBody]) -> web.StreamResponse:
    """Add a message to the timeline; it may move the status."""
    body = context.body
    status = None if body.status is UNSET else body.status
    command = PostUpdate(message=body.message, status=status, is_public=body.is_public)
    changed = await incidents.change_incident(
        context.application, context.caller, context.id, command, body.occurred_at
    )
    return resource_response(changed, status=201, collection="incidents")


@operation(
    "POST",
    "/api/v1/incidents/{id}/resolve",
    tag=_TAG,
    scopes=("write:incidents",),
    result=IncidentDetail,
    body_optional=True,
    idempotent=True,
    conditional=True,
    errors=(409,),
    example={"root_cause": "Stale DNS cache after failover.", "postmortem": "https://internal.notes/inc-2041"},
)
async def resolve_incident(context: RequestContext[NoQuery, ResolveIncidentBody]) -> web.StreamResponse:
    """Resolve an incident."""
    body = context.body
    command = ResolveIncident(root_cause=body.root_cause, postmortem=body.postmortem)
    changed = await incidents.change_incident(
        context.application, context.caller, context.id, command, body.occurred_at
    )
    return resource_response(changed)


@operation(
    "POST",
    "/api/v1/incidents/{id}/redactions",
    tag=_TAG,
    scopes=("read:audit", "write:incidents"),
    status=201,
    result=IncidentDetail,
    idempotent=True,
    conditional=True,
    example={"fields": ["description"], "reason": "It named a customer."},
)
async def redact_incident(context: RequestContext[NoQuery, RedactionBody]) -> web.StreamResponse:
    """Erase text of an incident for good.

    Give `fields`, which lose every value that they ever had, or `events`, the positions of events that lose their text.
    The ledger records the reason, and stays verifiable.
    """
    body = context.body
    changed = await redactions.redact_incident(
        context.application,
        context.caller,
        context.id,
        fields=body.fields,
        positions=body.events,
        reason=body.reason,
    )
    return resource_response(changed, status=201, collection="incidents")


@operation(
    "GET", "/api/v1/incidents/{id}/events", tag=_TAG, scopes=("read:status",), result=EventPage, conditional=True
)
async def list_incident_events(context: RequestContext[StreamEventsQuery, NoBody]) -> web.StreamResponse:
    """List the events of an incident, oldest first."""
    return await stream_events_response(context, incident.KIND)


OPERATIONS = (
    list_incidents,
    create_incident,
    list_active_incidents,
    get_incident,
    change_incident,
    post_incident_update,
    resolve_incident,
    list_incident_events,
    redact_incident,
)

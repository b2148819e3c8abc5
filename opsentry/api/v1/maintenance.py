"""`/api/v1/maintenance`."""

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from opsentry.api.v1.events import RedactionBody, StreamEventsQuery, stream_events_response
from opsentry.api.v1.schemas import EventPage, MaintenanceDetail, MaintenanceList, UpcomingMaintenance
from opsentry.application import maintenance as use_cases
from opsentry.application import redactions
from opsentry.domain import maintenance
from opsentry.domain.decider import set_fields, to_utc
from opsentry.domain.maintenance import (
    CancelMaintenance,
    ChangeMaintenance,
    CompleteMaintenance,
    MaintenanceCommand,
    MaintenanceStatus,
    ScheduleMaintenance,
    StartMaintenance,
)
from opsentry.domain.visibility import Visibility
from opsentry.http.body import NoBody
from opsentry.http.context import B, RequestContext
from opsentry.http.operation import operation
from opsentry.http.params import AsOf, AsOfQuery, Id, NoQuery, PageQuery, Timestamp
from opsentry.http.responses import list_response, resource_response
from opsentry.projections.maintenance_view import MaintenanceFilter
from opsentry.projections.page_request import PageRequest

_TAG = "Maintenance"
_COLLECTION = "maintenance"


class ScheduleMaintenanceBody(msgspec.Struct):
    """A new maintenance window."""

    title: str
    scheduled_start: Timestamp
    scheduled_end: Timestamp
    description: str | None = None
    visibility: Visibility | None = "public"
    service_ids: tuple[Id, ...] | None = ()
    exclude_from_sla: bool = False
    suppress_alerts: bool = False
    auto_start: bool = True
    auto_complete: bool = True


class ChangeMaintenanceBody(msgspec.Struct):
    """The fields to change. Null clears a field that may be empty."""

    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    scheduled_start: Timestamp | UnsetType = UNSET
    scheduled_end: Timestamp | UnsetType = UNSET
    visibility: Visibility | UnsetType = UNSET
    service_ids: tuple[Id, ...] | None | UnsetType = UNSET
    exclude_from_sla: bool | UnsetType = UNSET
    suppress_alerts: bool | UnsetType = UNSET
    auto_start: bool | UnsetType = UNSET
    auto_complete: bool | UnsetType = UNSET


class ListMaintenanceQuery(PageQuery, kw_only=True):
    """Filters and page of the window list."""

    status: MaintenanceStatus | None = None
    as_of: AsOf | None = None


@operation("GET", "/api/v1/maintenance", tag=_TAG, scopes=("read:status",), result=MaintenanceList, conditional=True)
async def list_maintenance(context: RequestContext[ListMaintenanceQuery, NoBody]) -> web.StreamResponse:
    """List maintenance windows, the last announced first."""
    query = context.query
    page = PageRequest(query.limit, query.offset)
    listing = await use_cases.list_maintenance(
        context.application, context.caller, MaintenanceFilter(query.status), page, query.as_of
    )
    return list_response(context.request, _COLLECTION, listing, page)


@operation(
    "GET",
    "/api/v1/maintenance/upcoming",
    tag=_TAG,
    scopes=("read:status",),
    result=UpcomingMaintenance,
    conditional=True,
)
async def list_upcoming_maintenance(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """List all scheduled windows of the future, the next one first."""
    listing = await use_cases.list_upcoming_maintenance(context.application, context.caller)
    return list_response(context.request, _COLLECTION, listing)


@operation(
    "POST",
    "/api/v1/maintenance",
    tag=_TAG,
    scopes=("write:maintenance",),
    status=201,
    result=MaintenanceDetail,
    idempotent=True,
    example={
        "title": "Database failover drill",
        "description": "Customer Portal will be read-only for ~6 minutes.",
        "scheduled_start": "2030-06-01T02:00:00Z",
        "scheduled_end": "2030-06-01T04:00:00Z",
        "visibility": "public",
        "service_ids": [1],
        "exclude_from_sla": True,
        "suppress_alerts": True,
    },
)
async def schedule_maintenance(context: RequestContext[NoQuery, ScheduleMaintenanceBody]) -> web.StreamResponse:
    """Schedule a maintenance window."""
    body = context.body
    command = ScheduleMaintenance(
        title=body.title,
        description=body.description,
        scheduled_start=to_utc("scheduled_start", body.scheduled_start),
        scheduled_end=to_utc("scheduled_end", body.scheduled_end),
        visibility=body.visibility or "public",
        service_ids=body.service_ids or (),
        exclude_from_sla=body.exclude_from_sla,
        suppress_alerts=body.suppress_alerts,
        auto_start=body.auto_start,
        auto_complete=body.auto_complete,
    )
    created = await use_cases.schedule_maintenance(context.application, context.caller, command)
    return resource_response(created, status=201, collection=_COLLECTION)


@operation(
    "GET", "/api/v1/maintenance/{id}", tag=_TAG, scopes=("read:status",), result=MaintenanceDetail, conditional=True
)
async def get_maintenance(context: RequestContext[AsOfQuery, NoBody]) -> web.StreamResponse:
    """Get a maintenance window with its timeline."""
    found = await use_cases.get_maintenance(context.application, context.caller, context.id, context.query.as_of)
    return resource_response(found)


@operation(
    "PATCH",
    "/api/v1/maintenance/{id}",
    tag=_TAG,
    scopes=("write:maintenance",),
    result=MaintenanceDetail,
    idempotent=True,
    conditional=True,
    errors=(409,),
    example={"scheduled_end": "2030-06-01T05:00:00Z"},
)
async def change_maintenance(context: RequestContext[NoQuery, ChangeMaintenanceBody]) -> web.StreamResponse:
    """Change a maintenance window.

    Of an active window only title, description, `scheduled_end` and `auto_complete` can change; of a finished one only
    title and description.
    """
    wanted = set_fields(context.body)
    for name in {"scheduled_start", "scheduled_end"} & wanted.keys():
        wanted[name] = to_utc(name, wanted[name])
    if "service_ids" in wanted:
        wanted["service_ids"] = wanted["service_ids"] or ()
    return await _change(context, ChangeMaintenance(**wanted))


@operation(
    "POST",
    "/api/v1/maintenance/{id}/start",
    tag=_TAG,
    scopes=("write:maintenance",),
    result=MaintenanceDetail,
    idempotent=True,
    conditional=True,
    errors=(409,),
)
async def start_maintenance(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Start a scheduled window."""
    return await _change(context, StartMaintenance())


@operation(
    "POST",
    "/api/v1/maintenance/{id}/complete",
    tag=_TAG,
    scopes=("write:maintenance",),
    result=MaintenanceDetail,
    idempotent=True,
    conditional=True,
    errors=(409,),
)
async def complete_maintenance(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Complete an active window."""
    return await _change(context, CompleteMaintenance())


@operation(
    "POST",
    "/api/v1/maintenance/{id}/cancel",
    tag=_TAG,
    scopes=("write:maintenance",),
    result=MaintenanceDetail,
    idempotent=True,
    conditional=True,
    errors=(409,),
)
async def cancel_maintenance(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Cancel a scheduled window."""
    return await _change(context, CancelMaintenance())


@operation(
    "POST",
    "/api/v1/maintenance/{id}/redactions",
    tag=_TAG,
    scopes=("read:audit", "write:maintenance"),
    status=201,
    result=MaintenanceDetail,
    idempotent=True,
    conditional=True,
    example={"fields": ["description"], "reason": "It named a customer."},
)
async def redact_maintenance(context: RequestContext[NoQuery, RedactionBody]) -> web.StreamResponse:
    """Erase text of a maintenance window for good; see the same of incidents."""
    body = context.body
    changed = await redactions.redact_maintenance(
        context.application,
        context.caller,
        context.id,
        fields=body.fields,
        positions=body.events,
        reason=body.reason,
    )
    return resource_response(changed, status=201, collection=_COLLECTION)


@operation(
    "GET", "/api/v1/maintenance/{id}/events", tag=_TAG, scopes=("read:status",), result=EventPage, conditional=True
)
async def list_maintenance_events(context: RequestContext[StreamEventsQuery, NoBody]) -> web.StreamResponse:
    """List the events of a maintenance window, oldest first."""
    return await stream_events_response(context, maintenance.KIND)


async def _change(context: RequestContext[NoQuery, B], command: MaintenanceCommand) -> web.StreamResponse:
    changed = await use_cases.change_maintenance(context.application, context.caller, context.id, command)
    return resource_response(changed)


OPERATIONS = (
    list_maintenance,
    schedule_maintenance,
    list_upcoming_maintenance,
    get_maintenance,
    change_maintenance,
    start_maintenance,
    complete_maintenance,
    cancel_maintenance,
    list_maintenance_events,
    redact_maintenance,
)

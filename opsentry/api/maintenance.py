"""`/maintenance…`: schedule, change, move and read maintenance windows."""

from collections.abc import Mapping, Sequence
from functools import partial

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from opsentry.api import commands
from opsentry.api.context import Id, Moment, RequestContext, utc
from opsentry.api.errors import NotFound
from opsentry.api.ledger import RedactionBody, erasure, stream_history
from opsentry.api.responses import list_response, one_as_of, one_or_recorded, page_as_of
from opsentry.domain import maintenance
from opsentry.domain.decider import set_fields
from opsentry.domain.maintenance import (
    STATUSES,
    CancelMaintenance,
    ChangeMaintenance,
    CompleteMaintenance,
    MaintenanceCommand,
    RedactMaintenance,
    ScheduleMaintenance,
    StartMaintenance,
)
from opsentry.events.codec import RecordedEvent
from opsentry.projections import maintenance as windows
from opsentry.projections.maintenance import MaintenanceFilter
from opsentry.projections.page_request import PageRequest

ACTIONS: Mapping[str, MaintenanceCommand] = {
    "start": StartMaintenance(),
    "complete": CompleteMaintenance(),
    "cancel": CancelMaintenance(),
}


class CreateBody(msgspec.Struct):
    """Body of `POST /maintenance`."""

    title: str
    scheduled_start: Moment
    scheduled_end: Moment
    description: str | None = None
    visibility: str = "public"
    service_ids: tuple[Id, ...] | None = ()
    exclude_from_sla: bool = False
    suppress_alerts: bool = False
    auto_start: bool = True
    auto_complete: bool = True


class ChangeBody(msgspec.Struct):
    """Body of `PATCH /maintenance/:id`: what is not there stays as it is."""

    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    scheduled_start: Moment | UnsetType = UNSET
    scheduled_end: Moment | UnsetType = UNSET
    visibility: str | UnsetType = UNSET
    service_ids: tuple[Id, ...] | None | UnsetType = UNSET
    exclude_from_sla: bool | UnsetType = UNSET
    suppress_alerts: bool | UnsetType = UNSET
    auto_start: bool | UnsetType = UNSET
    auto_complete: bool | UnsetType = UNSET


async def listing(call: RequestContext) -> web.Response:
    """`GET /maintenance`."""
    filter_ = MaintenanceFilter(call.choice("status", STATUSES))
    limit, offset = call.page(default=50)
    page = PageRequest(limit, offset)
    if (position := await call.as_of()) is not None:
        found = await call.parts.as_of_queries.list_maintenance(call.tenant_id, position, filter_, page)
        return page_as_of(call, "maintenance", found, (limit, offset))
    row = await call.read(lambda connection: windows.select_windows(connection, call.tenant_id, filter_, page))
    return list_response(call, "maintenance", row, (limit, offset))


async def upcoming(call: RequestContext) -> web.Response:
    """`GET /maintenance/upcoming`."""
    call.refuse("as_of")
    row = await call.read(lambda connection: windows.select_upcoming_windows(connection, call.tenant_id))
    return list_response(call, "maintenance", row, timeless=False)


async def one(call: RequestContext) -> web.Response:
    """`GET /maintenance/:id`."""
    maintenance_id = call.id()
    if (position := await call.as_of()) is not None:
        return one_as_of(
            await call.parts.as_of_queries.get_maintenance(call.tenant_id, maintenance_id, position), position
        )
    row = await call.read(lambda connection: windows.select_window(connection, call.tenant_id, maintenance_id))
    return await one_or_recorded(row, partial(call.parts.as_of_queries.get_maintenance, call.tenant_id, maintenance_id))


async def create(call: RequestContext) -> web.Response:
    """`POST /maintenance`."""
    body = await call.body(CreateBody)
    command = ScheduleMaintenance(
        title=body.title,
        description=body.description,
        scheduled_start=utc("scheduled_start", body.scheduled_start),
        scheduled_end=utc("scheduled_end", body.scheduled_end),
        visibility=body.visibility,
        service_ids=body.service_ids or (),
        exclude_from_sla=body.exclude_from_sla,
        suppress_alerts=body.suppress_alerts,
        auto_start=body.auto_start,
        auto_complete=body.auto_complete,
    )
    refs = None
    executed = await commands.find_replay(call, maintenance.DECIDER)
    if executed is None:
        maintenance.decide(None, command)  # what is wrong with the words is said before services are looked up
        refs = await call.refs(command.service_ids)
        executed = await commands.create(call, maintenance.DECIDER, command)
    return await commands.answer(call, executed, windows.render, status=201, location="maintenance", refs=refs)


async def change(call: RequestContext) -> web.Response:
    """`PATCH /maintenance/:id`."""
    call.id()
    body = await call.body(ChangeBody)
    executed = await commands.find_replay(call, maintenance.DECIDER)
    if executed is None:
        wanted = set_fields(body)
        for name in {"scheduled_start", "scheduled_end"} & wanted.keys():
            wanted[name] = utc(name, wanted[name])
        if "service_ids" in wanted:
            wanted["service_ids"] = wanted["service_ids"] or ()
            await call.refs(wanted["service_ids"])
        executed = await commands.execute(call, maintenance.DECIDER, ChangeMaintenance(**wanted))
    return await commands.answer(call, executed, windows.render)


async def act(call: RequestContext) -> web.Response:
    """`POST /maintenance/:id/:action`."""
    command = ACTIONS.get(call.request.match_info["action"])
    if command is None:
        raise NotFound
    executed = await commands.execute(call, maintenance.DECIDER, command)
    return await commands.answer(call, executed, windows.render)


async def redact(call: RequestContext) -> web.Response:
    """`POST /maintenance/:id/redactions`."""
    call.id()
    body = await call.body(RedactionBody)

    def command(history: Sequence[RecordedEvent]) -> MaintenanceCommand:
        return RedactMaintenance(erasure=erasure(history, maintenance.REDACTABLE_FIELDS, body), reason=body.reason)

    executed = await commands.execute(call, maintenance.DECIDER, command)
    return await commands.answer(call, executed, windows.render, status=201, location="maintenance")


async def history(call: RequestContext) -> web.Response:
    """`GET /maintenance/:id/events`."""
    return await stream_history(call, maintenance.KIND)

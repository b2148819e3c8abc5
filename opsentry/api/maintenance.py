"""`/maintenance…`: schedule, move and read maintenance windows."""

from collections.abc import Mapping

import msgspec
from aiohttp import web

from opsentry.api.errors import NotFound
from opsentry.api.http import Call, Id, Moment, list_response, object_response, one_response, utc
from opsentry.domain import maintenance
from opsentry.domain.maintenance import (
    STATUSES,
    CancelMaintenance,
    CompleteMaintenance,
    MaintenanceCommand,
    ScheduleMaintenance,
    StartMaintenance,
)
from opsentry.projections import maintenance as windows

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


async def listing(call: Call) -> web.Response:
    """`GET /maintenance`."""
    status = call.choice("status", STATUSES)
    limit, offset = call.page(default=50)
    row = await call.read(
        lambda connection: windows.page(connection, call.tenant_id, status=status, limit=limit, offset=offset)
    )
    return list_response(call, "maintenance", row, (limit, offset))


async def upcoming(call: Call) -> web.Response:
    """`GET /maintenance/upcoming`."""
    return list_response(
        call, "maintenance", await call.read(lambda connection: windows.upcoming(connection, call.tenant_id))
    )


async def one(call: Call) -> web.Response:
    """`GET /maintenance/:id`."""
    maintenance_id = call.id()
    return one_response(await call.read(lambda connection: windows.one(connection, call.tenant_id, maintenance_id)))


async def create(call: Call) -> web.Response:
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
    maintenance.decide(None, command)  # what is wrong with the words themselves is said before services are looked up
    refs = await call.refs(command.service_ids)
    executed = await call.parts.commands.create(maintenance.DECIDER, call.tenant_id, command, call.meta)
    await call.catch_up(executed.seq)
    response = object_response(windows.render(executed.history, refs, {}), status=201, version=executed.version)
    response.headers["Location"] = f"/api/v1/maintenance/{executed.stream_id}"
    return response


async def act(call: Call) -> web.Response:
    """`POST /maintenance/:id/:action`."""
    command = ACTIONS.get(call.request.match_info["action"])
    if command is None:
        raise NotFound
    executed = await call.parts.commands.execute(maintenance.DECIDER, call.tenant_id, call.id(), command, call.meta)
    await call.catch_up(executed.seq)
    token_ids = {e.meta.actor.id for e in executed.history if e.meta.actor.kind == "token" and e.meta.actor.id}
    refs, token_names = await call.links(executed.state.service_ids, token_ids)
    return object_response(windows.render(executed.history, refs, token_names), version=executed.version)

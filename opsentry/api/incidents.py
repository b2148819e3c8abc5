"""`/incidents…`: declare, change and read incidents."""

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from opsentry.api.http import Call, Id, list_response, name_choices, object_response, one_response
from opsentry.domain import incident
from opsentry.domain.incident import (
    SEVERITIES,
    STATUSES,
    VISIBILITIES,
    ChangeIncident,
    Incident,
    IncidentCommand,
    OpenIncident,
    PostUpdate,
    ResolveIncident,
)
from opsentry.events.execute import Executed
from opsentry.projections import incidents

name_choices({"severity": SEVERITIES, "visibility": VISIBILITIES, "status": STATUSES})


class CreateBody(msgspec.Struct):
    """Body of `POST /incidents`."""

    title: str
    description: str | None = None
    severity: str = "degraded"
    visibility: str = "public"
    service_ids: tuple[Id, ...] | None = ()


class ChangeBody(msgspec.Struct):
    """Body of `PATCH /incidents/:id`: what is not there stays as it is."""

    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    severity: str | UnsetType = UNSET
    visibility: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    service_ids: tuple[Id, ...] | None | UnsetType = UNSET
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class UpdateBody(msgspec.Struct):
    """Body of `POST /incidents/:id/updates`."""

    message: str
    status: str | UnsetType = UNSET
    is_public: bool = True


class ResolveBody(msgspec.Struct):
    """Body of `POST /incidents/:id/resolve`."""

    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


async def listing(call: Call) -> web.Response:
    """`GET /incidents`."""
    status = call.choice("status", STATUSES)
    severity = call.choice("severity", SEVERITIES)
    limit, offset = call.page(default=50)
    row = await call.read(
        lambda connection: incidents.page(
            connection, call.tenant_id, status=status, severity=severity, limit=limit, offset=offset
        )
    )
    return list_response(call, "incidents", row, (limit, offset))


async def active(call: Call) -> web.Response:
    """`GET /incidents/active`."""
    return list_response(
        call, "incidents", await call.read(lambda connection: incidents.active(connection, call.tenant_id))
    )


async def one(call: Call) -> web.Response:
    """`GET /incidents/:id`."""
    incident_id = call.id()
    return one_response(await call.read(lambda connection: incidents.one(connection, call.tenant_id, incident_id)))


async def create(call: Call) -> web.Response:
    """`POST /incidents`."""
    body = await call.body(CreateBody)
    command = OpenIncident(
        title=body.title,
        description=body.description,
        severity=body.severity,
        visibility=body.visibility,
        service_ids=body.service_ids or (),
    )
    incident.decide(None, command)  # what is wrong with the words themselves is said before services are looked up
    refs = await call.refs(command.service_ids)
    executed = await call.parts.commands.create(incident.DECIDER, call.tenant_id, command, call.meta)
    await call.catch_up(executed.seq)
    rendered = incidents.render(executed.history, refs, {call.token.token_id: call.token.name})
    response = object_response(rendered, status=201, version=executed.version)
    response.headers["Location"] = f"/api/v1/incidents/{executed.stream_id}"
    return response


async def change(call: Call) -> web.Response:
    """`PATCH /incidents/:id`."""
    incident_id = call.id()
    body = await call.body(ChangeBody)
    service_ids: tuple[int, ...] | UnsetType = UNSET
    if body.service_ids is not UNSET:
        service_ids = body.service_ids or ()
        await call.refs(service_ids)
    command = ChangeIncident(
        title=body.title,
        description=body.description,
        severity=body.severity,
        visibility=body.visibility,
        status=body.status,
        service_ids=service_ids,
        root_cause=body.root_cause,
        postmortem=body.postmortem,
    )
    return await _answer(call, await _execute(call, incident_id, command))


async def post_update(call: Call) -> web.Response:
    """`POST /incidents/:id/updates`."""
    incident_id = call.id()
    body = await call.body(UpdateBody)
    status = None if body.status is UNSET else body.status
    command = PostUpdate(message=body.message, status=status, is_public=body.is_public)
    response = await _answer(call, await _execute(call, incident_id, command), status=201)
    response.headers["Location"] = f"/api/v1/incidents/{incident_id}"
    return response


async def resolve(call: Call) -> web.Response:
    """`POST /incidents/:id/resolve`."""
    incident_id = call.id()
    body = await call.body(ResolveBody, optional=True)
    command = ResolveIncident(root_cause=body.root_cause, postmortem=body.postmortem)
    return await _answer(call, await _execute(call, incident_id, command))


async def _execute(call: Call, incident_id: int, command: IncidentCommand) -> Executed[Incident]:
    return await call.parts.commands.execute(incident.DECIDER, call.tenant_id, incident_id, command, call.meta)


async def _answer(call: Call, executed: Executed[Incident], *, status: int = 200) -> web.Response:
    """Return the whole incident as the command left it."""
    await call.catch_up(executed.seq)
    token_ids = {e.meta.actor.id for e in executed.history if e.meta.actor.kind == "token" and e.meta.actor.id}
    refs, token_names = await call.links(executed.state.service_ids, token_ids)
    return object_response(
        incidents.render(executed.history, refs, token_names), status=status, version=executed.version
    )

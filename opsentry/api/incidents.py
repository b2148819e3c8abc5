"""`/incidents…`: declare, change and read incidents."""

from collections.abc import Sequence
from functools import partial

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from opsentry.api import commands
from opsentry.api.context import Id, Moment, RequestContext, name_choices
from opsentry.api.ledger import RedactionBody, erasure, stream_history
from opsentry.api.responses import list_response, one_as_of, one_or_recorded, page_as_of
from opsentry.domain import incident
from opsentry.domain.incident import (
    SEVERITIES,
    STATUSES,
    VISIBILITIES,
    ChangeIncident,
    IncidentCommand,
    OpenIncident,
    PostUpdate,
    RedactIncident,
    ResolveIncident,
)
from opsentry.events.codec import RecordedEvent
from opsentry.projections import incidents
from opsentry.projections.incident_view import IncidentFilter, render
from opsentry.projections.page_request import PageRequest

name_choices({"severity": SEVERITIES, "visibility": VISIBILITIES, "status": STATUSES})


class CreateBody(msgspec.Struct):
    """Body of `POST /incidents`."""

    title: str
    description: str | None = None
    severity: str = "degraded"
    visibility: str = "public"
    service_ids: tuple[Id, ...] | None = ()
    occurred_at: Moment | None = None


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
    occurred_at: Moment | None = None


class ResolveBody(msgspec.Struct):
    """Body of `POST /incidents/:id/resolve`."""

    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET
    occurred_at: Moment | None = None


async def listing(call: RequestContext) -> web.Response:
    """`GET /incidents`."""
    filter_ = IncidentFilter(call.choice("status", STATUSES), call.choice("severity", SEVERITIES))
    limit, offset = call.page(default=50)
    page = PageRequest(limit, offset)
    if (position := await call.as_of()) is not None:
        found = await call.parts.as_of_queries.list_incidents(call.tenant_id, position, filter_, page)
        return page_as_of(call, "incidents", found, (limit, offset))
    row = await call.read(lambda connection: incidents.select_incidents(connection, call.tenant_id, filter_, page))
    return list_response(call, "incidents", row, (limit, offset))


async def active(call: RequestContext) -> web.Response:
    """`GET /incidents/active`."""
    if (position := await call.as_of()) is not None:
        found = await call.parts.as_of_queries.list_active_incidents(call.tenant_id, position)
        return page_as_of(call, "incidents", found)
    return list_response(
        call,
        "incidents",
        await call.read(lambda connection: incidents.select_active_incidents(connection, call.tenant_id)),
    )


async def one(call: RequestContext) -> web.Response:
    """`GET /incidents/:id`."""
    incident_id = call.id()
    if (position := await call.as_of()) is not None:
        return one_as_of(await call.parts.as_of_queries.get_incident(call.tenant_id, incident_id, position), position)
    row = await call.read(lambda connection: incidents.select_incident(connection, call.tenant_id, incident_id))
    return await one_or_recorded(
        row, partial(call.parts.as_of_queries.get_recorded_incident, call.tenant_id, incident_id)
    )


async def create(call: RequestContext) -> web.Response:
    """`POST /incidents`."""
    body = await call.body(CreateBody)
    occurred_at = commands.happened(body.occurred_at)
    command = OpenIncident(
        title=body.title,
        description=body.description,
        severity=body.severity,
        visibility=body.visibility,
        service_ids=body.service_ids or (),
    )
    refs = None
    executed = await commands.find_replay(call, incident.DECIDER)
    if executed is None:
        incident.decide(None, command)  # what is wrong with the words is said before services are looked up
        refs = await call.refs(command.service_ids)
        executed = await commands.create(call, incident.DECIDER, command, occurred_at)
    return await commands.answer(call, executed, render, status=201, location="incidents", refs=refs)


async def change(call: RequestContext) -> web.Response:
    """`PATCH /incidents/:id`."""
    call.id()
    body = await call.body(ChangeBody)
    executed = await commands.find_replay(call, incident.DECIDER)
    if executed is None:
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
        executed = await commands.execute(call, incident.DECIDER, command)
    return await commands.answer(call, executed, render)


async def post_update(call: RequestContext) -> web.Response:
    """`POST /incidents/:id/updates`."""
    call.id()
    body = await call.body(UpdateBody)
    status = None if body.status is UNSET else body.status
    command = PostUpdate(message=body.message, status=status, is_public=body.is_public)
    executed = await commands.execute(call, incident.DECIDER, command, commands.happened(body.occurred_at))
    return await commands.answer(call, executed, render, status=201, location="incidents")


async def resolve(call: RequestContext) -> web.Response:
    """`POST /incidents/:id/resolve`."""
    call.id()
    body = await call.body(ResolveBody, optional=True)
    command = ResolveIncident(root_cause=body.root_cause, postmortem=body.postmortem)
    executed = await commands.execute(call, incident.DECIDER, command, commands.happened(body.occurred_at))
    return await commands.answer(call, executed, render)


async def redact(call: RequestContext) -> web.Response:
    """`POST /incidents/:id/redactions`."""
    call.id()
    body = await call.body(RedactionBody)

    def command(history: Sequence[RecordedEvent]) -> IncidentCommand:
        return RedactIncident(erasure=erasure(history, incident.REDACTABLE_FIELDS, body), reason=body.reason)

    executed = await commands.execute(call, incident.DECIDER, command)
    return await commands.answer(call, executed, render, status=201, location="incidents")


async def history(call: RequestContext) -> web.Response:
    """`GET /incidents/:id/events`."""
    return await stream_history(call, incident.KIND)

"""What all commands share: safe retries, preconditions, news from the past, and the answer."""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http import HTTPStatus
from typing import TypeVar

import msgspec
import structlog
from aiohttp import web

from opsentry.api.context import RequestContext, utc
from opsentry.api.errors import BadRequest, NotFound, PreconditionFailed
from opsentry.api.responses import entity_tags, object_response
from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.decider import Decider, Event
from opsentry.events.codec import Actor, Meta, RecordedEvent
from opsentry.events.command_handler import CommandResult
from opsentry.events.store import IdempotencyKey
from opsentry.identity import api_tokens
from opsentry.infrastructure.postgres import DatabaseUnavailable, OutcomeUnknown
from opsentry.projections import incidents, services, subscriptions
from opsentry.projections import maintenance as windows
from opsentry.projections.as_of import Linked, Render
from opsentry.projections.engine.projection import UNANSWERED_SECONDS
from opsentry.projections.engine.projector import Projector
from opsentry.projections.services import ServiceLinks
from opsentry.projections.timeline import etag

_log = structlog.get_logger()

# How long a command waits for its projections before it is answered without them, as a share of the timeout of the
# database. It is less than 1, as the append before it may have taken that timeout, and 2 s are all there is.
CATCH_UP_SHARE = 0.75
# A client's clock may be so much ahead: what it says happens now is then taken as happening now.
CLOCK_SKEW = timedelta(seconds=5)
# What happened longer ago is told to nobody: it is history, not news.
NEWS = timedelta(minutes=5)

_KEY = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,254}")
_VERSION = re.compile(r'"([1-9][0-9]{0,9})(?:-[0-9]+)?"')
# What reads the thing that a command is for.
_READ = {
    incident.KIND: incidents.select_incident,
    maintenance.KIND: windows.select_window,
    subscription.KIND: subscriptions.select_subscription,
}


L = TypeVar("L", bound=Linked)
C = TypeVar("C")
E = TypeVar("E", bound=Event)


def happened(occurred_at: datetime | None) -> datetime | None:
    """Return when what is told of happened, `None` for now.

    Raises:
        BadRequest: It has not happened yet.
    """
    if occurred_at is None:
        return None
    moment, now = utc("occurred_at", occurred_at), datetime.now(UTC)
    if moment > now + CLOCK_SKEW:
        raise BadRequest("occurred_at: must not be in the future")
    return None if moment > now else moment


async def create(
    call: RequestContext, decider: Decider[L, C, E], command: C, occurred_at: datetime | None = None
) -> CommandResult[L]:
    """Begin a new stream, once for each `Idempotency-Key`; raises as `CommandHandler.create`."""
    return await call.parts.commands.create(
        decider, call.tenant_id, command, _meta(call, occurred_at), occurred_at=occurred_at, key=_key(call)
    )


async def execute(
    call: RequestContext,
    decider: Decider[L, C, E],
    command: C | Callable[[Sequence[RecordedEvent]], C],
    occurred_at: datetime | None = None,
) -> CommandResult[L]:
    """Change the stream that the path names, once for each `Idempotency-Key`, if it is as `If-Match` says.

    Raises as `CommandHandler.execute`, and:
        PreconditionFailed: It is not.
        NotFound: It is none any more.
    """
    number = call.id()
    try:
        return await call.parts.commands.execute(
            decider,
            call.tenant_id,
            number,
            command,
            _meta(call, occurred_at),
            occurred_at=occurred_at,
            check=_precondition(call),
            key=_key(call),
        )
    except PreconditionFailed as error:
        position = (await call.head()).position
        row = await call.parts.projector.read(
            call.tenant_id,
            lambda connection: _READ[decider.kind](connection, call.tenant_id, number),
            at_least=position,
        )
        if row["body"] is None:
            raise NotFound from None
        error.etag = row["etag"]
        raise


async def find_replay(call: RequestContext, decider: Decider[L, C, E]) -> CommandResult[L] | None:
    """Return what came of this request the first time, `None` if this is the first time.

    For commands with conditions outside of their stream, which may hold no longer. The body must have been read.
    """
    key = _key(call)
    return None if key is None else await call.parts.commands.find_replay(decider, call.tenant_id, key)


async def answer(
    call: RequestContext,
    executed: CommandResult[L],
    render: Render,
    *,
    status: int = 200,
    location: str | None = None,
    refs: ServiceLinks | None = None,
) -> web.Response:
    """Return the whole object as the command left it, once every later read shows it.

    Args:
        call: The request.
        executed: What the command came to.
        render: Makes the object of its events, service links and token names.
        status: Of the answer.
        location: The collection that the object is in, where its address is to be told.
        refs: The links to its services, where they are known already.
    """
    await catch_up(call.parts.projector, call.tenant_id, executed.position, call.request_id)
    if refs is None or "Idempotency-Key" in call.request.headers:
        refs = await _refs(call, executed)
    names = await _token_names(call, executed.history)
    links, versions = refs
    body = render(executed.history, links, names)
    response = object_response(body, status=status, etag=etag(executed.version, versions))
    return _told(response, executed, location)


async def answer_alone(
    call: RequestContext, executed: CommandResult[L], body: bytes, *, status: int = 200, location: str | None = None
) -> web.Response:
    """Return the same of an object that names no other things, or, with status 204, that it is gone."""
    await catch_up(call.parts.projector, call.tenant_id, executed.position, call.request_id)
    if status == HTTPStatus.NO_CONTENT:
        return _told(web.Response(status=status), executed, None)
    return _told(object_response(body, status=status, etag=etag(executed.version, ())), executed, location)


def _told(response: web.Response, executed: CommandResult[L], location: str | None) -> web.Response:
    response.headers["Opsentry-Position"] = str(executed.position)
    if location is not None:
        response.headers["Location"] = f"/api/v1/{location}/{executed.stream_id}"
    if executed.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def _meta(call: RequestContext, occurred_at: datetime | None) -> Meta:
    """Return what the log keeps about who sent this."""
    silent = occurred_at is not None and datetime.now(UTC) - occurred_at > NEWS
    return Meta(Actor("token", call.token.token_id), call.request_id, silent)


def _key(call: RequestContext) -> IdempotencyKey | None:
    """Return what makes this request safe to send again, if it has an `Idempotency-Key`.

    The key belongs to its token. Bodies are compared as JSON, so spaces and the order of fields do not matter.
    """
    values = call.request.headers.getall("Idempotency-Key", ())
    if not values:
        return None
    if len(values) > 1 or not _KEY.fullmatch(values[0]):
        raise BadRequest("Idempotency-Key: must be 1 to 255 printable ASCII characters")
    body = call.octets.strip() or b"{}"
    with suppress(msgspec.MsgspecError, RecursionError, OverflowError, UnicodeDecodeError):
        body = msgspec.json.encode(msgspec.json.decode(body), order="sorted")
    asked = b"\n".join((call.request.method.encode(), call.request.path.encode(), body))
    return IdempotencyKey(sha256(f"{call.token.token_id}:{values[0]}".encode()).digest(), sha256(asked).digest())


def _precondition(call: RequestContext) -> Callable[[int], None] | None:
    """Return a check of `If-Match` (RFC 9110, section 13.1.1) against a stream's version."""
    values = call.request.headers.getall("If-Match", ())
    if not values:
        return None
    tags = entity_tags(values)
    versions = {int(match[1]) for tag in tags if (match := _VERSION.fullmatch(tag))}

    def check(version: int) -> None:
        if "*" not in tags and version not in versions:
            raise PreconditionFailed

    return check


async def catch_up(projector: Projector, tenant_id: int, position: int, request_id: str) -> None:
    """Bring the read models up to an event that was appended.

    It is durable, so nothing that goes wrong here makes the command fail: whoever reads next, or the worker,
    catches up. But then the answer waits until reads no longer take the event for one that is under way.
    """
    began = time.monotonic()
    try:
        async with asyncio.timeout(CATCH_UP_SHARE * projector.timeout_seconds):
            await projector.catch_up(tenant_id, position)
    except Exception as error:  # noqa: BLE001 - whatever it is, the command was carried out
        _log.warning("answered before projecting", request_id=request_id, error=type(error).__name__)
        await asyncio.sleep(max(0.0, began + 1.1 * UNANSWERED_SECONDS - time.monotonic()))


async def _refs(call: RequestContext, executed: CommandResult[L]) -> ServiceLinks:
    """Return the links to services; as of the command where there is a key, so that every repeat has the same."""
    service_ids = executed.state.service_ids
    if not service_ids:
        return {}, ()
    try:
        if "Idempotency-Key" in call.request.headers:
            return await call.parts.as_of_queries.get_service_links(
                call.tenant_id, service_ids, executed.ledger_position
            )
        return services.links_from_row(await call.parts.refs.read(call.tenant_id, service_ids), service_ids)
    except DatabaseUnavailable as error:
        raise OutcomeUnknown("recorded, but could not be read back") from error


async def _token_names(call: RequestContext, history: Sequence[RecordedEvent]) -> Mapping[int, str]:
    """Return the names of the tokens that wrote `history`."""
    names = {call.token.token_id: call.token.name}
    token_ids = {e.meta.actor.id for e in history if e.meta.actor.kind == "token" and e.meta.actor.id}
    if others := token_ids - names.keys():
        try:
            async with call.parts.database.connection() as connection:
                names |= await api_tokens.find_api_token_names(connection, call.tenant_id, others)
        except DatabaseUnavailable as error:
            raise OutcomeUnknown("recorded, but could not be read back") from error
    return names

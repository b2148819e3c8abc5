"""Run a command: check permissions, decide once, append once, bring the read models up to date."""

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar, cast

import structlog

from opsentry.application.application import Application
from opsentry.application.caller import WRITE_PERMISSIONS, Caller
from opsentry.application.errors import NotFound, PreconditionFailed
from opsentry.application.queries import read_head
from opsentry.domain import incident, maintenance, service, subscription
from opsentry.domain.decider import Decider, Event, InvalidField, to_utc
from opsentry.events.codec import Meta, RecordedEvent
from opsentry.events.command_handler import CommandOptions, CommandResult, StreamNotFound, UnexpectedVersion
from opsentry.projections import incidents, services, subscriptions
from opsentry.projections import maintenance as windows
from opsentry.projections.engine.freshness import UNANSWERED_SECONDS
from opsentry.projections.services import ServiceLinks, links_from_row

_log = structlog.get_logger()

# A command waits this long for its projections; its result does not depend on them.
CATCH_UP_TIMEOUT_SECONDS = 0.7
# Clocks of clients run ahead. A time this far in the future means now.
CLOCK_SKEW = timedelta(seconds=5)
# An older change is history: nobody is notified of it.
NEWS_MAX_AGE = timedelta(minutes=5)

# The query that reads one resource of each kind.
_SELECT_ONE = {
    incident.KIND: incidents.select_incident,
    maintenance.KIND: windows.select_window,
    service.KIND: services.select_service,
    subscription.KIND: subscriptions.select_subscription,
}

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)


class Outcome(NamedTuple):
    """A command's result, with the service links that its check has loaded already (`None`: none were needed)."""

    result: CommandResult[Any]
    links: ServiceLinks | None


async def run(
    app: Application,
    caller: Caller,
    decider: Decider[S, C, E],
    command: C | Callable[[S, Sequence[RecordedEvent]], C],
    *,
    stream_id: int | None = None,
    occurred_at: datetime | None = None,
    reservation: str | None = None,
) -> Outcome:
    """Run `command` for `caller` and return once every later read shows its events.

    Args:
        app: The application.
        caller: The caller; needs the write permission of the decider's kind.
        decider: The aggregate.
        command: The command; for an existing stream also a function that builds it from state and events.
        stream_id: The stream to change; `None` creates one.
        occurred_at: The time of the change in the world; `None` means now.
        reservation: A name that the new stream must hold alone.

    Raises:
        MissingPermission: The caller lacks the permission.
        NotFound: The tenant has no such stream.
        DomainError: The command was refused.
        PreconditionFailed: The stream has none of the versions that the caller expects.
        NameReserved, IdempotencyKeyReused, ConcurrencyConflict: See `CommandHandler`.
        DatabaseUnavailable, OutcomeUnknown, TenantBusy: See `Appender.append`.
    """
    caller.require(WRITE_PERMISSIONS[decider.kind])
    services = _ServiceCheck(app, caller.tenant_id)
    moment = check_occurred_at(occurred_at)
    options = CommandOptions(_meta(caller, moment), moment, caller.idempotency_key, services)
    try:
        if stream_id is None:
            result = await app.command_handler.create(
                decider, caller.tenant_id, cast("C", command), options, reservation=reservation
            )
        else:
            result = await app.command_handler.change(
                decider, caller.tenant_id, stream_id, command, options, expected_versions=caller.expected_versions
            )
    except StreamNotFound:
        raise NotFound from None
    except UnexpectedVersion:
        raise await _precondition_failed(app, caller, decider.kind, stream_id or 0) from None
    await catch_up(app, caller, result.position, result.history[len(result.history) - result.appended :])
    return Outcome(result, services.links)


def check_occurred_at(occurred_at: datetime | None) -> datetime | None:
    """Return the time of a change in UTC, `None` for now.

    Raises:
        InvalidField: The time lies in the future.
    """
    if occurred_at is None:
        return None
    moment, now = to_utc("occurred_at", occurred_at), datetime.now(UTC)
    if moment > now + CLOCK_SKEW:
        raise InvalidField("occurred_at", "must not be in the future")
    return None if moment > now else moment


def _meta(caller: Caller, occurred_at: datetime | None) -> Meta:
    is_old = occurred_at is not None and datetime.now(UTC) - occurred_at > NEWS_MAX_AGE
    return Meta(caller.actor, caller.request_id, is_old)


class _ServiceCheck:
    """Refuses events that name a service which the tenant does not have; keeps the links for the result."""

    def __init__(self, app: Application, tenant_id: int) -> None:
        self._app = app
        self._tenant_id = tenant_id
        self.links: ServiceLinks | None = None

    async def __call__(self, events: Sequence[Event]) -> None:
        """Check the services that `events` name.

        Raises:
            InvalidField: One of them is unknown, retired, or another tenant's: the message is the same.
            DatabaseUnavailable: The database was lost; nothing was changed.
        """
        named = [getattr(event, "service_ids", ()) for event in events]
        service_ids = [service_id for ids in named if isinstance(ids, tuple) for service_id in ids]
        if not service_ids:
            return
        row = await self._app.service_links.read(self._tenant_id, service_ids)
        self.links = links_from_row(row, service_ids)
        usable = self.links[0].keys() - set(row["retired"] or ())
        if unknown := sorted(set(service_ids) - usable):
            raise InvalidField("service_ids", f"no such service: {', '.join(map(str, unknown))}")


async def catch_up(app: Application, caller: Caller, position: int, events: Sequence[RecordedEvent] = ()) -> None:
    """Bring the tenant's read models up to `position`, where the command's `events` end.

    The command is durable, so a failure here does not fail it: the next read or the worker catches up. The caller
    then waits until reads no longer take the events for those of an unanswered command.
    """
    began = time.monotonic()
    try:
        await app.projector.catch_up(caller.tenant_id, position, CATCH_UP_TIMEOUT_SECONDS, events)
    except Exception as error:  # noqa: BLE001 - the command was carried out, whatever happens to its projections
        _log.warning("catch_up_deferred", request_id=caller.request_id, error=type(error).__name__)
        await asyncio.sleep(max(0.0, began + 1.1 * UNANSWERED_SECONDS - time.monotonic()))


async def _precondition_failed(app: Application, caller: Caller, kind: str, resource_id: int) -> Exception:
    """Return the error for a resource that has none of the caller's expected versions, with its present entity tag."""
    position = (await read_head(app, caller)).position
    row = await app.projector.read(
        caller.tenant_id,
        lambda connection: _SELECT_ONE[kind](connection, caller.tenant_id, resource_id),
        at_least=position,
    )
    return NotFound() if row["body"] is None else PreconditionFailed(row["etag"])

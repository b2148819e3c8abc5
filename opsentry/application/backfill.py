"""Record past streams: create a stream from commands that happened before, whole or not at all."""

from collections.abc import Sequence
from datetime import datetime
from typing import TypeVar, cast

from opsentry.application.application import Application
from opsentry.application.caller import WRITE_PERMISSIONS, Caller
from opsentry.domain.decider import Decider, Event
from opsentry.domain.events import AnyEvent
from opsentry.events.codec import Meta
from opsentry.events.store import Append, Appended, NewEvent, Reserved

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)


async def create_past_stream(
    app: Application,
    caller: Caller,
    decider: Decider[S, C, E],
    commands: Sequence[tuple[C, datetime]],
    *,
    reservation: str,
) -> int:
    """Create a stream from commands with their times, in one append; return its id.

    A stream that holds the reservation already stays as it is, so a repeated call is safe. The events are silent:
    nobody is notified of them. The read models do not show them yet when this returns.

    Args:
        app: The application.
        caller: The caller; needs the write permission of the decider's kind.
        decider: The aggregate.
        commands: The commands in order, each with the time at which it happened.
        reservation: A name that the stream alone holds.

    Raises:
        MissingPermission: The caller lacks the permission.
        DomainError: A command was refused; nothing was recorded.
        DatabaseUnavailable, OutcomeUnknown, TenantBusy: See `Appender.append`.
    """
    caller.require(WRITE_PERMISSIONS[decider.kind])
    meta = Meta(caller.actor, caller.request_id, silent=True)
    events: list[NewEvent] = []
    state: S | None = None
    for command, occurred_at in commands:
        decided = decider.decide(state, command)
        state = decider.fold(decided, state)
        events += [NewEvent(cast("AnyEvent", event), meta, occurred_at) for event in decided]
    append = Append(
        tenant_id=caller.tenant_id,
        kind=decider.kind,
        stream_id=0,
        expected_version=0,
        events=events,
        reservation=reservation,
    )
    outcome = await app.appender.append(append)
    if not isinstance(outcome, Appended | Reserved):
        raise TypeError(f"{reservation}: {outcome}")
    return outcome.stream_id

"""Load a stream, decide, append: the only way from a command to the ledger."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from typing import Generic, NamedTuple, TypeAlias, TypeVar, cast
from weakref import WeakValueDictionary

import msgspec

from opsentry.domain.decider import Decider, DomainError, Event, InvalidField
from opsentry.domain.events import AnyEvent
from opsentry.events import store
from opsentry.events.appender import Appender, TenantBusy
from opsentry.events.codec import Meta, RecordedEvent
from opsentry.events.store import (
    Append,
    Appended,
    HeadBusy,
    IdempotencyKey,
    KeyReused,
    NewEvent,
    Replayed,
    Reserved,
    UnknownTenant,
    VersionConflict,
)
from opsentry.infrastructure.postgres import Database, TransientError

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)

MAX_ATTEMPTS = 20

EventCheck: TypeAlias = Callable[[Sequence[Event]], Awaitable[None]]
"""Refuses decided events for a reason outside of their stream, by raising `DomainError`."""


class StreamNotFound(Exception):
    """The tenant has no such stream."""


class NameReserved(Exception):
    """Another stream of the tenant holds the reservation."""

    def __init__(self, stream_id: int) -> None:
        super().__init__(f"held by {stream_id}")
        self.stream_id = stream_id


class IdempotencyKeyReused(Exception):
    """The caller used the idempotency key for another command before."""


class ConcurrencyConflict(TransientError):
    """Other writers changed the stream at every attempt; nothing was changed."""


class UnexpectedVersion(Exception):
    """The stream has none of the versions that the caller expects; nothing was changed."""


class CommandOptions(NamedTuple):
    """Describe how a command is recorded.

    Attributes:
        meta: The ids that the ledger keeps about the caller.
        occurred_at: The time of the change in the world; `None` means now.
        key: Makes the command safe to send again.
        check: Called with the decided events before they are appended.
    """

    meta: Meta
    occurred_at: datetime | None = None
    key: IdempotencyKey | None = None
    check: EventCheck | None = None


class CommandResult(msgspec.Struct, Generic[S], frozen=True):
    """The outcome of a command.

    Attributes:
        stream_id: The stream that the command changed or created.
        state: The stream's state after the command.
        history: All events of the stream in order; the command's own come last.
        appended: The number of events that the command added; 0 for a replay and for a command without effect.
        ledger_position: The last position of the ledger when the command was recorded.
        replayed: True if an earlier request with the same key ran the command. State and history are those of then.
    """

    stream_id: int
    state: S
    history: Sequence[RecordedEvent]
    appended: int
    ledger_position: int
    replayed: bool = False

    @property
    def version(self) -> int:
        """The stream's version after the command."""
        return self.history[-1].version

    @property
    def position(self) -> int:
        """The ledger position of the stream's last event."""
        return self.history[-1].position


class CommandHandler:
    """Runs commands: each decides once per attempt and appends once."""

    def __init__(self, database: Database, appender: Appender) -> None:
        self._database = database
        self._appender = appender
        # Commands of this process for one stream wait here, because a conflict in the database costs a round trip.
        self._locks: WeakValueDictionary[tuple[int, str, int], asyncio.Lock] = WeakValueDictionary()

    async def create(
        self,
        decider: Decider[S, C, E],
        tenant_id: int,
        command: C,
        options: CommandOptions,
        *,
        reservation: str | None = None,
    ) -> CommandResult[S]:
        """Create a stream. With a key, a repeated request returns the first result.

        Raises:
            DomainError: The decider or the check refused the command.
            NameReserved: Another stream holds `reservation`.
            IdempotencyKeyReused: The key belongs to another command.
            StreamNotFound: The tenant does not exist.
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: See `Appender.append`.
        """
        try:
            events = decider.decide(None, command)
            if options.check is not None:
                await options.check(events)
        except DomainError as refusal:
            return await self._replay_or_raise(refusal, decider, tenant_id, options.key)
        append = _append(decider.kind, tenant_id, 0, 0, events, options, reservation)
        match await self._appender.append(append):
            case Appended() as appended:
                state = cast("S", decider.fold(events))
                history = appended.record(append)
                return CommandResult(appended.stream_id, state, history, len(events), appended.position)
            case Replayed() | KeyReused() as earlier:
                return await self._replay(decider, tenant_id, earlier)
            case Reserved(stream_id):
                raise NameReserved(stream_id)
            case UnknownTenant():
                raise StreamNotFound(f"tenant {tenant_id}")
            case VersionConflict() | HeadBusy():
                raise TenantBusy("the tenant is busy")

    async def change(
        self,
        decider: Decider[S, C, E],
        tenant_id: int,
        stream_id: int,
        command: C | Callable[[S, Sequence[RecordedEvent]], C],
        options: CommandOptions,
        *,
        expected_versions: Collection[int] | None = None,
    ) -> CommandResult[S]:
        """Change a stream; load and decide again when another process was faster.

        Args:
            decider: The aggregate.
            tenant_id: The tenant.
            stream_id: The stream.
            command: The command, or a function that builds it from the stream's state and events.
            options: See `CommandOptions`; `occurred_at` must not lie before the stream's last event.
            expected_versions: The versions that the caller accepts; `None` accepts any.

        Raises:
            StreamNotFound: The tenant has no such stream.
            UnexpectedVersion: The stream has none of the expected versions.
            DomainError: The decider or the check refused the command.
            IdempotencyKeyReused: The key belongs to another command.
            ConcurrencyConflict: Other writers were faster at every attempt.
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: See `Appender.append`.
        """
        stream = (tenant_id, decider.kind, stream_id)
        lock = self._locks.setdefault(stream, asyncio.Lock())
        async with lock:
            history: list[RecordedEvent] = []
            state: S | None = None
            for _ in range(MAX_ATTEMPTS):
                async with self._database.connection() as connection:
                    newer = await store.read_stream(connection, *stream, after=len(history))
                history += newer
                if not history:
                    raise StreamNotFound(f"{decider.kind} {stream_id}")
                state = cast("S", decider.fold((cast("E", recorded.event) for recorded in newer), state))
                try:
                    events = await _decide(decider, state, history, command, options, expected_versions)
                except (DomainError, UnexpectedVersion) as refusal:
                    return await self._replay_or_raise(refusal, decider, tenant_id, options.key)
                if not events and options.key is None:
                    return CommandResult(stream_id, state, history, 0, history[-1].position)
                append = _append(decider.kind, tenant_id, stream_id, history[-1].version, events, options)
                match await self._appender.append(append):
                    case Replayed() | KeyReused() as earlier:
                        return await self._replay(decider, tenant_id, earlier)
                    case Appended() as appended:
                        final = cast("S", decider.fold(events, state))
                        history += appended.record(append)
                        if any(event.TYPE.endswith(".redacted") for event in events):
                            # The events in memory still hold the text that the ledger has just erased.
                            async with self._database.connection() as connection:
                                history = await store.read_stream(connection, *stream, until=appended.version)
                        return CommandResult(stream_id, final, history, len(events), appended.position)
                    case VersionConflict():
                        continue
                    case Reserved() | UnknownTenant() | HeadBusy():
                        raise StreamNotFound(f"{decider.kind} {stream_id}")
            raise ConcurrencyConflict(f"{decider.kind} {stream_id} was changed by others at the same time; try again")

    async def _replay_or_raise(
        self, refusal: Exception, decider: Decider[S, C, E], tenant_id: int, key: IdempotencyKey | None
    ) -> CommandResult[S]:
        """Return the first result of a refused command that ran before; else raise `refusal`.

        A repeated request is often refused, because its first run changed the state. Only then is the key looked up:
        an accepted command meets its key in the append.
        """
        if key is None:
            raise refusal
        async with self._database.connection() as connection:
            earlier = await store.find_idempotency_key(connection, tenant_id, key)
        if earlier is None:
            raise refusal
        return await self._replay(decider, tenant_id, earlier)

    async def _replay(
        self, decider: Decider[S, C, E], tenant_id: int, earlier: Replayed | KeyReused
    ) -> CommandResult[S]:
        """Derive the result again from the ledger as the command left it."""
        if isinstance(earlier, KeyReused):
            raise IdempotencyKeyReused
        async with self._database.connection() as connection:
            history = await store.read_stream(
                connection, tenant_id, decider.kind, earlier.stream_id, until=earlier.version
            )
        state = cast("S", decider.fold(cast("E", recorded.event) for recorded in history))
        return CommandResult(earlier.stream_id, state, history, 0, earlier.position, replayed=True)


async def _decide(
    decider: Decider[S, C, E],
    state: S,
    history: Sequence[RecordedEvent],
    command: C | Callable[[S, Sequence[RecordedEvent]], C],
    options: CommandOptions,
    expected_versions: Collection[int] | None,
) -> Sequence[E]:
    last = history[-1]
    if expected_versions is not None and last.version not in expected_versions:
        raise UnexpectedVersion
    if options.occurred_at is not None and options.occurred_at < last.occurred_at:
        earliest = last.occurred_at.isoformat().replace("+00:00", "Z")
        raise InvalidField("occurred_at", f"must not be before {earliest}, the time of the change before it")
    events = decider.decide(state, command(state, history) if callable(command) else command)
    if options.check is not None:
        await options.check(events)
    return events


def _append(
    kind: str,
    tenant_id: int,
    stream_id: int,
    expected_version: int,
    events: Sequence[Event],
    options: CommandOptions,
    reservation: str | None = None,
) -> Append:
    return Append(
        tenant_id=tenant_id,
        kind=kind,
        stream_id=stream_id,
        expected_version=expected_version,
        events=[NewEvent(cast("AnyEvent", event), options.meta, options.occurred_at) for event in events],
        reservation=reservation,
        key=options.key,
    )

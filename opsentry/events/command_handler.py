"""Load a stream, fold it, decide, append: the way every command goes."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Generic, TypeVar, cast
from weakref import WeakValueDictionary

import msgspec

from opsentry.domain.decider import Decider, Event, InvalidField
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

_ATTEMPTS = 20


class StreamNotFound(Exception):
    """The stream that a command is for does not exist in this tenant."""


class NameReserved(Exception):
    """Another stream of the tenant holds the name that this one has to have."""

    def __init__(self, stream_id: int) -> None:
        super().__init__(f"held by {stream_id}")
        self.stream_id = stream_id


class IdempotencyKeyReused(Exception):
    """The idempotency key stands for another command of the same sender."""


class ConcurrencyConflict(TransientError):
    """Others changed the stream again and again; the command was not carried out."""


class CommandResult(msgspec.Struct, Generic[S], frozen=True):
    """What a command came to.

    Attributes:
        stream_id: The stream it was for, or that it created.
        state: The state after it.
        history: All events of the stream in order, those of the command last.
        appended: How many of them are the command's own; 0 where it changed nothing, or was carried out before.
        ledger_position: Where the ledger stood when the command was carried out.
        repeated: Whether it was carried out before, under the same key: state and history are those of then.
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
        """The ledger_position in the tenant's ledger that shows the command."""
        return self.history[-1].position


class CommandHandler:
    """Executes commands against the log."""

    def __init__(self, database: Database, appender: Appender) -> None:
        self._database = database
        self._appender = appender
        # CommandHandler of this process for one stream queue up here instead of conflicting in the database.
        self._locks: WeakValueDictionary[tuple[int, str, int], asyncio.Lock] = WeakValueDictionary()

    async def create(
        self,
        decider: Decider[S, C, E],
        tenant_id: int,
        command: C,
        meta: Meta,
        *,
        occurred_at: datetime | None = None,
        reservation: str | None = None,
        key: IdempotencyKey | None = None,
    ) -> CommandResult[S]:
        """Begin a new stream; with a `key`, once, however often it is sent.

        Raises:
            DomainError: The command was refused.
            NameReserved: Another stream holds `reservation`.
            IdempotencyKeyReused: `key` stands for another command.
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: As `Appender.append`.
        """
        events = decider.decide(None, command)
        append = Append(
            tenant_id=tenant_id,
            kind=decider.kind,
            stream_id=0,
            expected_version=0,
            events=[NewEvent(cast("AnyEvent", event), meta, occurred_at) for event in events],
            reservation=reservation,
            key=key,
        )
        match await self._appender.append(append):
            case Appended() as appended:
                state = cast("S", decider.fold(events))
                return CommandResult(appended.stream_id, state, appended.record(append), len(events), appended.position)
            case Replayed() as earlier:
                return await self._as_it_was(decider, tenant_id, earlier)
            case KeyReused():
                raise IdempotencyKeyReused
            case Reserved(stream_id):
                raise NameReserved(stream_id)
            case UnknownTenant():
                raise StreamNotFound(f"no tenant {tenant_id}")
            case VersionConflict() | HeadBusy():
                raise TenantBusy("the tenant is busy")

    async def execute(
        self,
        decider: Decider[S, C, E],
        tenant_id: int,
        stream_id: int,
        command: C | Callable[[Sequence[RecordedEvent]], C],
        meta: Meta,
        *,
        occurred_at: datetime | None = None,
        check: Callable[[int], None] | None = None,
        key: IdempotencyKey | None = None,
    ) -> CommandResult[S]:
        """Change an existing stream; load, decide and append again where another process was faster.

        Args:
            decider: The aggregate.
            tenant_id: The tenant.
            stream_id: The stream.
            command: What to do, or a function that says so from the stream's events.
            meta: Who does it.
            occurred_at: When it happened, if not now; not before the stream's last event did.
            check: Called with the stream's version before deciding; raises to refuse it.
            key: Changes the stream once, however often it is sent.

        Raises:
            StreamNotFound: There is no such stream in the tenant.
            DomainError: The command was refused.
            IdempotencyKeyReused: `key` stands for another command.
            ConcurrencyConflict: Others were faster too often.
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: As `Appender.append`.
        """
        stream = (tenant_id, decider.kind, stream_id)
        lock = self._locks.setdefault(stream, asyncio.Lock())
        async with lock:
            history: list[RecordedEvent] = []
            state: S | None = None
            for _ in range(_ATTEMPTS):
                async with self._database.connection() as connection:
                    newer = await store.read_stream(connection, *stream, after=len(history))
                    # After the stream: whoever sees there what the command itself did sees its key here.
                    earlier = None if key is None else await store.find_idempotency_key(connection, tenant_id, key)
                if earlier is not None:
                    return await self._known(decider, tenant_id, earlier)
                history += newer
                if not history:
                    raise StreamNotFound(f"{decider.kind} {stream_id}")
                state = decider.fold((cast("E", e.event) for e in newer), state)
                if check is not None:
                    check(history[-1].version)
                if occurred_at is not None and occurred_at < history[-1].occurred_at:
                    last = history[-1].occurred_at.isoformat().replace("+00:00", "Z")
                    raise InvalidField("occurred_at", f"must not be before {last}, when what it follows happened")
                events = decider.decide(state, command(history) if callable(command) else command)
                if not events and key is None:
                    return CommandResult(stream_id, cast("S", state), history, 0, history[-1].position)
                append = Append(
                    tenant_id=tenant_id,
                    kind=decider.kind,
                    stream_id=stream_id,
                    expected_version=history[-1].version,
                    events=[NewEvent(cast("AnyEvent", event), meta, occurred_at) for event in events],
                    key=key,
                )
                match await self._appender.append(append):
                    case Replayed() | KeyReused() as earlier:
                        return await self._known(decider, tenant_id, earlier)
                    case Appended() as appended:
                        final = cast("S", decider.fold(events, state))
                        history += appended.record(append)
                        if any(event.TYPE.endswith(".redacted") for event in events):
                            # The erasable that were just erased must not live on in what was read before.
                            async with self._database.connection() as connection:
                                history = await store.read_stream(connection, *stream, until=appended.version)
                        return CommandResult(stream_id, final, history, len(events), appended.position)
                    case VersionConflict():
                        continue
                    case Reserved() | UnknownTenant() | HeadBusy():
                        raise StreamNotFound(f"{decider.kind} {stream_id}")
            raise ConcurrencyConflict(f"{decider.kind} {stream_id} was changed by others at the same time; try again")

    async def find_replay(
        self, decider: Decider[S, C, E], tenant_id: int, key: IdempotencyKey
    ) -> CommandResult[S] | None:
        """Return what came of the command that was sent under `key` before, `None` if none was.

        Raises:
            IdempotencyKeyReused: It was another command.
            DatabaseUnavailable: That could not be found out.
        """
        async with self._database.connection() as connection:
            earlier = await store.find_idempotency_key(connection, tenant_id, key)
        return None if earlier is None else await self._known(decider, tenant_id, earlier)

    async def _known(
        self, decider: Decider[S, C, E], tenant_id: int, earlier: Replayed | KeyReused
    ) -> CommandResult[S]:
        match earlier:
            case Replayed():
                return await self._as_it_was(decider, tenant_id, earlier)
            case KeyReused():
                raise IdempotencyKeyReused

    async def _as_it_was(self, decider: Decider[S, C, E], tenant_id: int, earlier: Replayed) -> CommandResult[S]:
        """Derive the outcome again from the ledger as the command left it."""
        async with self._database.connection() as connection:
            history = await store.read_stream(
                connection, tenant_id, decider.kind, earlier.stream_id, until=earlier.version
            )
        state = cast("S", decider.fold(cast("E", recorded.event) for recorded in history))
        return CommandResult(earlier.stream_id, state, history, 0, earlier.position, replayed=True)

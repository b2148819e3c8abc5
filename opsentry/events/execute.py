"""Load a stream, fold it, decide, append: the way every command goes."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Generic, TypeVar, cast
from weakref import WeakValueDictionary

import msgspec

from opsentry.domain.decider import Decider, Event, InvalidField
from opsentry.domain.events import AnyEvent
from opsentry.events import log
from opsentry.events.codec import Meta, RecordedEvent
from opsentry.events.log import (
    Append,
    Appended,
    Busy,
    Claimed,
    Conflict,
    Key,
    KeyReused,
    NewEvent,
    NoTenant,
    Repeated,
)
from opsentry.events.writer import TenantBusy, Writer
from opsentry.postgres import Database

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)

_ATTEMPTS = 20


class NoSuchStream(Exception):
    """The stream that a command is for does not exist in this tenant."""


class NameTaken(Exception):
    """Another stream of the tenant holds the name that this one has to have."""

    def __init__(self, stream_id: int) -> None:
        super().__init__(f"held by {stream_id}")
        self.stream_id = stream_id


class KeyTaken(Exception):
    """The idempotency key stands for another command of the same sender."""


class ConcurrentChange(Exception):
    """Others changed the stream again and again; the command was not carried out."""


class Executed(msgspec.Struct, Generic[S], frozen=True):
    """What a command came to.

    Attributes:
        stream_id: The stream it was for, or that it created.
        state: The state after it.
        history: All events of the stream in order, those of the command last.
        appended: How many of them are the command's own; 0 where it changed nothing, or was carried out before.
        position: Where the ledger stood when the command was carried out.
        repeated: Whether it was carried out before, under the same key: state and history are those of then.
    """

    stream_id: int
    state: S
    history: Sequence[RecordedEvent]
    appended: int
    position: int
    repeated: bool = False

    @property
    def version(self) -> int:
        """The stream's version after the command."""
        return self.history[-1].version

    @property
    def seq(self) -> int:
        """The position in the tenant's ledger that shows the command."""
        return self.history[-1].seq


class Commands:
    """Executes commands against the log."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer
        # Commands of this process for one stream queue up here instead of conflicting in the database.
        self._locks: WeakValueDictionary[tuple[int, str, int], asyncio.Lock] = WeakValueDictionary()

    async def create(
        self,
        decider: Decider[S, C, E],
        tenant_id: int,
        command: C,
        meta: Meta,
        *,
        occurred_at: datetime | None = None,
        claim: str | None = None,
        key: Key | None = None,
    ) -> Executed[S]:
        """Begin a new stream; with a `key`, once, however often it is sent.

        Raises:
            DomainError: The command was refused.
            NameTaken: Another stream holds `claim`.
            KeyTaken: `key` stands for another command.
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: As `Writer.append`.
        """
        events = decider.decide(None, command)
        append = Append(
            tenant_id=tenant_id,
            kind=decider.kind,
            stream_id=0,
            expected_version=0,
            events=[NewEvent(cast("AnyEvent", event), meta, occurred_at) for event in events],
            claim=claim,
            key=key,
        )
        match await self._writer.append(append):
            case Appended() as appended:
                state = cast("S", decider.fold(events))
                return Executed(appended.stream_id, state, appended.record(append), len(events), appended.seq)
            case Repeated() as earlier:
                return await self._as_it_was(decider, tenant_id, earlier)
            case KeyReused():
                raise KeyTaken
            case Claimed(stream_id):
                raise NameTaken(stream_id)
            case NoTenant():
                raise NoSuchStream(f"no tenant {tenant_id}")
            case Conflict() | Busy():
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
        key: Key | None = None,
    ) -> Executed[S]:
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
            NoSuchStream: There is no such stream in the tenant.
            DomainError: The command was refused.
            KeyTaken: `key` stands for another command.
            ConcurrentChange: Others were faster too often.
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: As `Writer.append`.
        """
        stream = (tenant_id, decider.kind, stream_id)
        lock = self._locks.setdefault(stream, asyncio.Lock())
        async with lock:
            history: list[RecordedEvent] = []
            state: S | None = None
            for _ in range(_ATTEMPTS):
                async with self._database.connection() as connection:
                    newer = await log.read_stream(connection, *stream, after=len(history))
                    # After the stream: whoever sees there what the command itself did sees its key here.
                    earlier = None if key is None else await log.find_key(connection, tenant_id, key)
                if earlier is not None:
                    return await self._known(decider, tenant_id, earlier)
                history += newer
                if not history:
                    raise NoSuchStream(f"{decider.kind} {stream_id}")
                state = decider.fold((cast("E", e.event) for e in newer), state)
                if check is not None:
                    check(history[-1].version)
                if occurred_at is not None and occurred_at < history[-1].occurred_at:
                    last = history[-1].occurred_at.isoformat().replace("+00:00", "Z")
                    raise InvalidField("occurred_at", f"must not be before {last}, when what it follows happened")
                events = decider.decide(state, command(history) if callable(command) else command)
                if not events and key is None:
                    return Executed(stream_id, cast("S", state), history, 0, history[-1].seq)
                append = Append(
                    tenant_id=tenant_id,
                    kind=decider.kind,
                    stream_id=stream_id,
                    expected_version=history[-1].version,
                    events=[NewEvent(cast("AnyEvent", event), meta, occurred_at) for event in events],
                    key=key,
                )
                match await self._writer.append(append):
                    case Repeated() | KeyReused() as earlier:
                        return await self._known(decider, tenant_id, earlier)
                    case Appended() as appended:
                        final = cast("S", decider.fold(events, state))
                        history += appended.record(append)
                        if any(event.TYPE.endswith(".redacted") for event in events):
                            # The words that were just erased must not live on in what was read before.
                            async with self._database.connection() as connection:
                                history = await log.read_stream(connection, *stream, until=appended.version)
                        return Executed(stream_id, final, history, len(events), appended.seq)
                    case Conflict():
                        continue
                    case Claimed() | NoTenant() | Busy():
                        raise NoSuchStream(f"{decider.kind} {stream_id}")
            raise ConcurrentChange(f"{decider.kind} {stream_id} was changed by others at the same time; try again")

    async def repeated(self, decider: Decider[S, C, E], tenant_id: int, key: Key) -> Executed[S] | None:
        """Return what came of the command that was sent under `key` before, `None` if none was.

        Raises:
            KeyTaken: It was another command.
            DatabaseUnavailable: That could not be found out.
        """
        async with self._database.connection() as connection:
            earlier = await log.find_key(connection, tenant_id, key)
        return None if earlier is None else await self._known(decider, tenant_id, earlier)

    async def _known(self, decider: Decider[S, C, E], tenant_id: int, earlier: Repeated | KeyReused) -> Executed[S]:
        match earlier:
            case Repeated():
                return await self._as_it_was(decider, tenant_id, earlier)
            case KeyReused():
                raise KeyTaken

    async def _as_it_was(self, decider: Decider[S, C, E], tenant_id: int, earlier: Repeated) -> Executed[S]:
        """Derive the outcome again from the ledger as the command left it."""
        async with self._database.connection() as connection:
            history = await log.read_stream(
                connection, tenant_id, decider.kind, earlier.stream_id, until=earlier.version
            )
        state = cast("S", decider.fold(cast("E", recorded.event) for recorded in history))
        return Executed(earlier.stream_id, state, history, 0, earlier.seq, repeated=True)

"""Load a stream, fold it, decide, append: the way every command goes."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Generic, TypeVar, cast
from weakref import WeakValueDictionary

import msgspec

from opsentry.domain.decider import Decider, Event
from opsentry.domain.events import AnyEvent
from opsentry.events import log
from opsentry.events.codec import Meta, RecordedEvent
from opsentry.events.log import Append, Appended, Busy, Claimed, Conflict, NewEvent, NoTenant
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


class ConcurrentChange(Exception):
    """Others changed the stream again and again; the command was not carried out."""


class Executed(msgspec.Struct, Generic[S], frozen=True):
    """What a command came to.

    Attributes:
        stream_id: The stream it was for, or that it created.
        state: The state after it.
        history: All events of the stream in order, those of the command last.
        appended: How many of them are the command's own.
    """

    stream_id: int
    state: S
    history: Sequence[RecordedEvent]
    appended: int

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
    ) -> Executed[S]:
        """Begin a new stream.

        Raises:
            DomainError: The command was refused.
            NameTaken: Another stream holds `claim`.
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
        )
        match await self._writer.append(append):
            case Appended() as appended:
                state = cast("S", decider.fold(events))
                return Executed(appended.stream_id, state, appended.record(append), len(events))
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
        command: C,
        meta: Meta,
        *,
        occurred_at: datetime | None = None,
        check: Callable[[int], None] | None = None,
    ) -> Executed[S]:
        """Change an existing stream; load, decide and append again where another process was faster.

        Args:
            decider: The aggregate.
            tenant_id: The tenant.
            stream_id: The stream.
            command: What to do.
            meta: Who does it.
            occurred_at: When it happened, if not now.
            check: Called with the stream's version before deciding; raises to refuse it.

        Raises:
            NoSuchStream: There is no such stream in the tenant.
            DomainError: The command was refused.
            ConcurrentChange: Others were faster too often.
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: As `Writer.append`.
        """
        key = (tenant_id, decider.kind, stream_id)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            history: list[RecordedEvent] = []
            state: S | None = None
            for _ in range(_ATTEMPTS):
                async with self._database.connection() as connection:
                    newer = await log.read_stream(connection, *key, after=len(history))
                history += newer
                if not history:
                    raise NoSuchStream(f"{decider.kind} {stream_id}")
                state = decider.fold((cast("E", e.event) for e in newer), state)
                if check is not None:
                    check(history[-1].version)
                events = decider.decide(state, command)
                if not events:
                    return Executed(stream_id, cast("S", state), history, 0)
                append = Append(
                    tenant_id=tenant_id,
                    kind=decider.kind,
                    stream_id=stream_id,
                    expected_version=history[-1].version,
                    events=[NewEvent(cast("AnyEvent", event), meta, occurred_at) for event in events],
                )
                match await self._writer.append(append):
                    case Appended() as appended:
                        final = cast("S", decider.fold(events, state))
                        return Executed(stream_id, final, [*history, *appended.record(append)], len(events))
                    case Conflict():
                        continue
                    case Claimed() | NoTenant() | Busy():
                        raise NoSuchStream(f"{decider.kind} {stream_id}")
            raise ConcurrentChange(f"{decider.kind} {stream_id} was changed by others at the same time; try again")

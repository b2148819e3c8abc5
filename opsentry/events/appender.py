"""Group commit: all commands that wait in this process go to the log in one round trip and one commit."""

import asyncio
from collections import deque
from collections.abc import Sequence

import asyncpg

from opsentry.events import store
from opsentry.events.store import Append, HeadBusy, Outcome
from opsentry.infrastructure.postgres import (
    Database,
    DatabaseUnavailable,
    OutcomeUnknown,
    TransientError,
    is_transient,
)

_Waiting = tuple[Append, "asyncio.Future[Outcome]"]


# A little more than the second that append_events itself waits for a head.
_LOCK_TIMEOUT_SECONDS = 1.2


# Connections that may wait for ledger heads at once. The rest of the pool serves everything else.
_PATIENT = 4


class TenantBusy(TransientError):
    """Other writers held the tenant's head for too long. Nothing was changed; trying again is safe."""


class Appender:
    """Appends commands in batches, while the ones before are being committed.

    A few batches are under way at once (`lanes`), never two with commands of one tenant: its head is a lock, so the
    second would only be turned away. CommandHandler of one tenant keep their order.
    """

    def __init__(self, database: Database, *, lanes: int = 2, batch: int = 256) -> None:
        self._database = database
        self._lanes = lanes
        self._batch = batch
        self._queues: dict[int, deque[_Waiting]] = {}
        self._under_way: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: set[asyncio.Task[None]] = set()
        self._patient = asyncio.Semaphore(_PATIENT)

    async def append(self, command: Append) -> Outcome:
        """Append one command and return its outcome, once it is durable.

        A cancelled caller stops waiting. The append itself continues.

        Raises:
            DatabaseUnavailable: The database could not be reached; nothing was changed.
            OutcomeUnknown: The database was lost on the way; the stream shows whether it was recorded.
            TenantBusy: Other writers held the tenant for too long; nothing was changed.
        """
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(command.tenant_id, deque()).append((command, future))
        self._start_lane()
        return await future

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while under_way := self._tasks | self._held:
            await asyncio.wait(under_way)

    def _start_lane(self) -> None:
        if len(self._tasks) < self._lanes and any(t not in self._under_way for t in self._queues):
            task = asyncio.create_task(self._lane())
            self._tasks.add(task)
            # Appends that arrived after the lane's last look at the queue found no free lane: look again.
            task.add_done_callback(self._lane_ended)

    def _lane_ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if self._queues:
            self._start_lane()

    async def _lane(self) -> None:
        while batch := self._take():
            tenants = {command.tenant_id for command, _ in batch}
            self._under_way |= tenants
            try:
                tenants -= await self._commit(batch)
            finally:
                self._under_way -= tenants

    def _take(self) -> list[_Waiting]:
        taken: list[_Waiting] = []
        for tenant in [t for t in self._queues if t not in self._under_way]:
            # A tenant whose queue is longer than a batch goes behind the others, who then have their turn.
            queue = self._queues.pop(tenant)
            while queue and len(taken) < self._batch:
                taken.append(queue.popleft())
            if queue:
                self._queues[tenant] = queue
            if len(taken) == self._batch:
                break
        taken.sort(key=lambda waiting: waiting[0].tenant_id)
        return taken

    async def _commit(self, batch: Sequence[_Waiting]) -> set[int]:
        """Send the batch; return the tenants that are still under way, because others hold their ledger_heads."""
        outcomes = await self._attempt(batch, wait=False)
        held: dict[int, list[_Waiting]] = {}
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, HeadBusy):
                held.setdefault(waiting[0].tenant_id, []).append(waiting)
            else:
                _answer(waiting, outcome)
        for tenant, commands in held.items():
            # Each tenant on its own, beside the lanes, so that a tenant whose head is locked delays no other.
            task = asyncio.create_task(self._wait_for_head(tenant, commands))
            self._held.add(task)
            task.add_done_callback(self._held.discard)
        return set(held)

    async def _wait_for_head(self, tenant: int, commands: Sequence[_Waiting]) -> None:
        try:
            async with self._patient:
                outcomes = await self._attempt(commands, wait=True)
            for waiting, outcome in zip(commands, outcomes, strict=True):
                _answer(waiting, outcome)
        finally:
            self._under_way.discard(tenant)
            self._start_lane()

    async def _attempt(self, batch: Sequence[_Waiting], *, wait: bool) -> list[Outcome | None]:
        """Send the batch; `None` stands for a command that failed, whose sender has been told."""
        sent = False
        try:
            seconds = max(_LOCK_TIMEOUT_SECONDS, self._database.timeout_seconds) if wait else None
            async with self._database.connection(seconds) as connection:
                sent = True
                return list(await store.append_events(connection, [command for command, _ in batch], wait=wait))
        except asyncpg.LockNotAvailableError:
            failure: Exception = TenantBusy("the tenant is busy")
        except DatabaseUnavailable as error:
            # A connection that was lost before anything was sent left no doubt; after that, only the log knows.
            failure = OutcomeUnknown(str(error)) if sent else error
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            if len(batch) > 1 and not is_transient(error):
                # A command that can never be recorded took the whole batch back: the others go by themselves.
                return [outcome for waiting in batch for outcome in await self._attempt([waiting], wait=wait)]
            failure = error
        for _, future in batch:
            if not future.done():
                future.set_exception(failure)
        return [None] * len(batch)


def _answer(waiting: _Waiting, outcome: Outcome | None) -> None:
    future = waiting[1]
    if outcome is not None and not future.done():
        future.set_result(outcome)

"""Group commit: append all waiting commands of this process in one round trip and one commit."""

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

# Slightly more than the second that append_events itself waits for a ledger head.
_LOCK_TIMEOUT_SECONDS = 1.2

# At most this many connections wait for ledger heads. The rest of the pool stays free for other work.
_MAX_WAITING_CONNECTIONS = 4


class TenantBusy(TransientError):
    """Another writer held the tenant's ledger head for too long. Nothing was changed; sending it again is safe."""


class Appender:
    """Append commands in batches. The next batch collects while the previous ones commit.

    Commands of one tenant keep their order and are never in two batches at once, because the second batch would only
    find the tenant's ledger head locked.

    Args:
        database: The pool that the batches take their connections from.
        lanes: The number of concurrent batches.
        batch: The largest number of commands in a batch.
    """

    def __init__(self, database: Database, *, lanes: int = 2, batch: int = 256) -> None:
        self._database = database
        self._lanes = lanes
        self._batch = batch
        self._queues: dict[int, deque[_Waiting]] = {}
        self._under_way: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: set[asyncio.Task[None]] = set()
        self._patient = asyncio.Semaphore(_MAX_WAITING_CONNECTIONS)

    async def append(self, command: Append) -> Outcome:
        """Append one command and return its outcome once it is durable.

        Cancelling the caller does not cancel the append.

        Raises:
            DatabaseUnavailable: The database did not answer. Nothing was changed.
            OutcomeUnknown: The connection was lost during the append. The stream shows whether it succeeded.
            TenantBusy: Another writer held the ledger head for too long. Nothing was changed.
        """
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(command.tenant_id, deque()).append((command, future))
        self._start_lane()
        return await future

    async def drain(self) -> None:
        """Wait until all batches have ended."""
        while under_way := self._tasks | self._held:
            await asyncio.wait(under_way)

    def _start_lane(self) -> None:
        if len(self._tasks) < self._lanes and any(t not in self._under_way for t in self._queues):
            task = asyncio.create_task(self._lane())
            self._tasks.add(task)
            # A command that arrives between the lane's last look at the queues and its end finds no free lane.
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
            # A tenant with more commands than fit moves behind the other tenants.
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
        """Append the batch; return the tenants whose ledger heads other writers hold and that are still waiting."""
        outcomes = await self._attempt(batch, wait=False)
        held: dict[int, list[_Waiting]] = {}
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, HeadBusy):
                held.setdefault(waiting[0].tenant_id, []).append(waiting)
            else:
                _answer(waiting, outcome)
        for tenant, commands in held.items():
            # One task per tenant, outside the lanes: waiting for a lock delays no other tenant.
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
        """Append the batch. `None` stands for a command that failed, whose caller has received the error."""
        sent = False
        try:
            seconds = max(_LOCK_TIMEOUT_SECONDS, self._database.timeout_seconds) if wait else None
            async with self._database.connection(seconds) as connection:
                sent = True
                return list(await store.append_events(connection, [command for command, _ in batch], wait=wait))
        except asyncpg.LockNotAvailableError:
            failure: Exception = TenantBusy("the tenant is busy")
        except DatabaseUnavailable as error:
            # Before the batch was sent, a lost connection changed nothing. Afterwards only the ledger knows.
            failure = OutcomeUnknown(str(error)) if sent else error
        except Exception as error:  # noqa: BLE001 - waiting callers receive every error
            if len(batch) > 1 and not is_transient(error):
                # One impossible command rolled back the whole batch: append the commands one by one.
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

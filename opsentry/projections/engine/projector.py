"""Catch the projections of tenants up with their ledgers, for commands, reads and workers."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import asyncpg
import structlog

from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection, Database
from opsentry.projections.engine.applier import BATCH_EVENTS, Applier
from opsentry.projections.engine.projection import Projection

_log = structlog.get_logger()

# Selects $2 tenants with ids above $1 that have unprojected events. One index lookup finds each, so the cost grows with
# the tenants that lag and not with their events.
_SELECT_LAGGING = """
WITH RECURSIVE found AS (
    (SELECT tenant_id, 1 AS number FROM projection_backlog WHERE tenant_id > $1 ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT next.tenant_id, number + 1 FROM found CROSS JOIN LATERAL (
        SELECT tenant_id FROM projection_backlog WHERE tenant_id > found.tenant_id ORDER BY tenant_id LIMIT 1) AS next
    WHERE number < $2)
SELECT tenant_id FROM found
"""

# Terminates our sessions that hang in the middle of a statement, waiting for their client, while others wait for their
# locks. The server's own timeouts end only sessions that hang between statements.
_TERMINATE_STALLED = """
SELECT DISTINCT holder.pid, pg_terminate_backend(holder.pid) FROM pg_stat_activity AS waiter
CROSS JOIN unnest(pg_blocking_pids(waiter.pid)) AS blocking (pid)
JOIN pg_stat_activity AS holder ON holder.pid = blocking.pid
WHERE waiter.datname = current_database() AND waiter.usename = current_user AND waiter.wait_event_type = 'Lock'
    AND holder.usename = current_user AND holder.wait_event IN ('ClientRead', 'ClientWrite')
    AND holder.state_change < clock_timestamp() - interval '10 seconds'
"""

POSITION_POLL_SECONDS = 0.05
"""How often a read checks whether the ledger has reached the position that it waits for."""


class PositionNotReached(Exception):
    """The read models did not reach the requested position in time; retry the read."""


class Projector:
    """Catches projections up with the ledgers of tenants."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._applier = Applier(database, projections)
        self._running: dict[int, _CatchUp] = {}

    @property
    def timeout_seconds(self) -> float:
        """How long a read waits for the projections to catch up."""
        return self._database.timeout_seconds

    @property
    def projections(self) -> Sequence[Projection]:
        """The projections that this projector serves, by name."""
        return self._applier.projections

    async def catch_up(
        self,
        tenant_id: int,
        position: int,
        seconds: float | None = None,
        events: Sequence[RecordedEvent] = (),
    ) -> None:
        """Return when each projection of the tenant that is neither halted nor paused shows event `position`.

        Concurrent callers for one tenant share the work: one pass runs, and one more serves all who came meanwhile.
        A caller that is cancelled does not stop it.

        Args:
            tenant_id: The tenant.
            position: The position to reach; 0 asks for all that the ledger has.
            seconds: How long to wait at most; `None` means until the passes end.
            events: The events that end there, if the caller has them: they need not be read from the ledger.

        Raises:
            TimeoutError: The time ended first; the work continues.
            DatabaseUnavailable: The database was lost; a worker or the next read catches up.
        """
        loop = asyncio.get_running_loop()
        running = self._running.get(tenant_id)
        if running is None:
            running = self._running[tenant_id] = _CatchUp(loop.time())
            running.task = loop.create_task(self._run(tenant_id, running))
        reached: asyncio.Future[None] = loop.create_future()
        running.waiting.append((position, reached))
        if len(running.events) < BATCH_EVENTS:
            running.events += events  # what a longer wait would pile up is read from the ledger
        if seconds is None:
            return await reached
        # Every command waits here. `asyncio.timeout` costs four times as much as this timer.
        timer = loop.call_later(seconds, _time_out, reached)
        try:
            return await reached
        finally:
            timer.cancel()

    def running_seconds(self, tenant_id: int) -> float | None:
        """Return how long this process's present pass for the tenant has run; `None` if there is none."""
        running = self._running.get(tenant_id)
        return None if running is None else asyncio.get_running_loop().time() - running.began

    async def terminate_stalled_sessions(self) -> list[int]:
        """Terminate database sessions that hang while others wait for their locks; return their process ids."""
        return [row["pid"] for row in await self._database.fetch(_TERMINATE_STALLED, seconds=10)]

    async def lagging_tenants(self, limit: int = 1000, after: int = 0) -> list[int]:
        """Return at most `limit` tenants with unprojected events, in order of id, with ids above `after`."""
        return [row["tenant_id"] for row in await self._database.fetch(_SELECT_LAGGING, after, limit, seconds=10)]

    async def read(
        self, tenant_id: int, query: Callable[[Connection], Awaitable[asyncpg.Record]], *, at_least: int = 0
    ) -> asyncpg.Record:
        """Return the row of `query` once it shows all that the tenant's ledger held when it was called.

        A read that finds its projection lagging catches up itself. So no read depends on a worker, nor on a command
        that had time to catch up. If that takes too long, the stale row is returned: its `trusted_position` is below
        its `head_position`.

        Args:
            tenant_id: The tenant.
            query: Selects one row with the columns of `freshness`.
            at_least: A position that the row must show; the read waits for it within a bound.

        Raises:
            PositionNotReached: The rows did not reach `at_least` in time.
            DatabaseUnavailable: The database was lost.
        """
        row = await self._query(query)
        is_stale = row["trusted_position"] is None or row["trusted_position"] < row["head_position"]
        if not is_stale and (row["projected_position"] or 0) >= at_least:
            return row
        try:
            async with asyncio.timeout(self.timeout_seconds):
                while row["head_position"] < at_least:
                    await asyncio.sleep(POSITION_POLL_SECONDS)
                    row = await self._query(query)
                await self.catch_up(tenant_id, row["head_position"])
        except TimeoutError:
            pass
        row = await self._query(query)
        if (row["projected_position"] or 0) < at_least:
            raise PositionNotReached(f"position {at_least} is not projected yet; retry the read")
        return row

    async def _query(self, query: Callable[[Connection], Awaitable[asyncpg.Record]]) -> asyncpg.Record:
        async with self._database.connection() as connection:
            return await query(connection)

    async def _run(self, tenant_id: int, running: "_CatchUp") -> None:
        """Run passes until nobody waits for one."""
        loop = asyncio.get_running_loop()
        try:
            while running.waiting:
                running.began = loop.time()
                events, running.events = running.events, []
                until: int | None = max(wanted for wanted, _ in running.waiting)
                if any(wanted == 0 for wanted, _ in running.waiting):
                    events, until = [], None  # somebody asks what the ledger has
                position = await self._applier.apply(tenant_id, events, until)
                came, running.waiting = running.waiting, []
                for wanted, reached in came:
                    if reached.done():
                        continue  # timed out or cancelled
                    if wanted <= position:
                        reached.set_result(None)
                    else:
                        running.waiting.append((wanted, reached))
        except Exception as error:  # noqa: BLE001 - waiting callers receive every error
            # If every caller was cancelled, nobody else reports it.
            _log.warning("catch_up_failed", tenant_id=tenant_id, error=type(error).__name__)
            for _, reached in running.waiting:
                if not reached.done():
                    reached.set_exception(error)
        finally:
            del self._running[tenant_id]
            for _, reached in running.waiting:
                reached.cancel()  # only where this task itself is cancelled, at the end of the process


class _CatchUp:
    """The passes of one tenant that run in this process.

    Attributes:
        began: When the present pass began, in seconds of the loop's clock.
        waiting: The positions that callers wait for, each with the future that tells them.
        events: The events that callers have brought, until a pass takes them.
        task: The task that runs the passes.
    """

    __slots__ = ("began", "events", "task", "waiting")

    def __init__(self, began: float) -> None:
        self.began = began
        self.waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.events: list[RecordedEvent] = []
        self.task: asyncio.Task[None] | None = None


def _time_out(reached: "asyncio.Future[None]") -> None:
    if not reached.done():
        reached.set_exception(TimeoutError())

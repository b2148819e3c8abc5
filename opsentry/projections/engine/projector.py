"""Catch projections up with the ledger. The lock of the checkpoint rows makes each event apply exactly once."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import asyncpg
import structlog

from opsentry.events import store
from opsentry.events.codec import RecordedEvent, UnknownEvent
from opsentry.infrastructure.postgres import Connection, Database, is_transient
from opsentry.projections.engine.projection import Projection
from opsentry.projections.engine.states import STATE

_log = structlog.get_logger()

# Inserts the checkpoints that a new tenant or a new projection lacks.
_ENSURE_CHECKPOINTS = """
INSERT INTO checkpoints (tenant_id, projection, generation)
SELECT $1, name, coalesce((SELECT generation FROM projections p WHERE p.name = new.name), 0)
FROM unnest($2::text[]) AS new (name) ON CONFLICT DO NOTHING
"""

# Locks the tenant's checkpoints, in one order for all callers, so that two catch-ups never deadlock.
# - The commit need not wait for the disk: after a crash of the server, rows and checkpoint are back where they were,
#   and the next catch-up continues there.
# - The server ends the session of a process that hangs while it holds the locks, and so refuses its commit.
_LOCK_CHECKPOINTS = f"""
SELECT c.projection, c.position, {STATE} AS state, p.version,
    (SELECT set_config('synchronous_commit', 'off', true)
        || set_config('idle_in_transaction_session_timeout', '3s', true)
        || CASE WHEN current_setting('server_version_num')::int >= 170000
            THEN set_config('transaction_timeout', '30s', true) ELSE '' END) AS settings
FROM checkpoints c LEFT JOIN projections p ON p.name = c.projection
WHERE c.tenant_id = $1 AND c.projection = ANY($2) ORDER BY c.projection FOR NO KEY UPDATE OF c
"""

# Removes the tenant from the backlog up to $2, as far as all running projections other than $3 have come too. Each
# statement reads those again, so a projection that was resumed meanwhile, or that only newer code has, is not missed.
_REMOVE_FROM_BACKLOG = """
DELETE FROM projection_backlog AS entry WHERE entry.tenant_id = $1 AND entry.position <= $2 AND NOT EXISTS (
    SELECT FROM checkpoints c LEFT JOIN projections p ON p.name = c.projection
    WHERE c.tenant_id = $1 AND c.projection <> ALL($3) AND c.position < entry.position
        AND c.halted_at IS NULL AND NOT coalesce(p.paused, false))
"""

# Moves the checkpoints of the projections $3 to $2, and deletes the rows of `projection_backlog` that this completes.
_ADVANCE = f"""
WITH projected AS ({_REMOVE_FROM_BACKLOG})
UPDATE checkpoints SET position = $2 WHERE tenant_id = $1 AND projection = ANY($3)
"""

# Marks the rows of these projections for a rebuild: newer code registered them, and this older code added to them.
_OUTDATE = "UPDATE checkpoints SET generation = -1 WHERE tenant_id = $1 AND projection = ANY($2) AND generation >= 0"

# Halts a projection at event $3, unless another process, which may know the event, has passed it meanwhile. Rows of
# newer code than this may be the cause of the failure; then the newer code rebuilds them.
_HALT = """
UPDATE checkpoints c SET halted_at = $3, halt_error = $4, generation = CASE WHEN EXISTS (
    SELECT FROM projections p WHERE p.name = c.projection AND p.version > $5) THEN -1 ELSE generation END
WHERE tenant_id = $1 AND projection = $2 AND position = $3 - 1 AND halted_at IS NULL
"""

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

BATCH_EVENTS = 500
CATCH_UP_TIMEOUT_SECONDS = 30.0
POSITION_POLL_SECONDS = 0.05
"""How often a read checks whether the ledger has reached the position that it waits for."""


class PoisonEvent(Exception):
    """A projection cannot apply an event; the projection's rows are unchanged."""

    def __init__(self, projection: str, position: int, error: str) -> None:
        super().__init__(f"{projection} cannot apply event {position}: {error}")
        self.projection = projection
        self.position = position
        self.error = error


class PositionNotReached(Exception):
    """The read models did not reach the requested position in time; retry the read."""


class Projector:
    """Catches projections up with the ledgers of tenants."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._projections = sorted(projections, key=lambda projection: projection.name)
        self._names = [projection.name for projection in self._projections]
        self._versions = {projection.name: projection.version for projection in self._projections}
        self._running: dict[int, _CatchUp] = {}

    @property
    def timeout_seconds(self) -> float:
        """How long a read waits for the projections to catch up."""
        return self._database.timeout_seconds

    @property
    def projections(self) -> Sequence[Projection]:
        """The projections that this projector serves, by name."""
        return self._projections

    async def catch_up(self, tenant_id: int, position: int, seconds: float | None = None) -> None:
        """Return when each projection of the tenant that is neither halted nor paused shows event `position`.

        Concurrent callers for one tenant share the work: one pass runs, and one more serves all who came meanwhile.
        A caller that is cancelled does not stop it.

        Args:
            tenant_id: The tenant.
            position: The position to reach; 0 asks for one pass.
            seconds: How long to wait at most; `None` means until the passes end.

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
                position = await self._catch_up(tenant_id)
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

    async def _catch_up(self, tenant_id: int) -> int:
        """Apply all unprojected events, batch by batch; return the position reached."""
        # After a failed batch: how many steps still apply one event to one projection, to find the poison event.
        single_steps = 0
        while True:
            try:
                async with self._database.transaction(CATCH_UP_TIMEOUT_SECONDS) as connection:
                    reached, has_more = await self._step(connection, tenant_id, single=single_steps > 0)
            except _BatchFailed:
                single_steps = BATCH_EVENTS * len(self._projections)
                continue
            except PoisonEvent as poison:
                await self._halt(tenant_id, poison)
                single_steps = 0
                continue
            single_steps = max(0, single_steps - 1)
            if not has_more:
                return reached

    async def _step(self, connection: Connection, tenant_id: int, *, single: bool) -> tuple[int, bool]:
        """Apply one batch inside the caller's transaction; return the position reached and whether there is more."""
        rows = await connection.fetch(_LOCK_CHECKPOINTS, tenant_id, self._names)
        if len(rows) < len(self._names):
            await connection.execute(_ENSURE_CHECKPOINTS, tenant_id, self._names)
            rows = await connection.fetch(_LOCK_CHECKPOINTS, tenant_id, self._names)
        positions = {row["projection"]: int(row["position"]) for row in rows if row["state"] == "running"}
        newer = [row["projection"] for row in rows if (row["version"] or 0) > self._versions[row["projection"]]]
        if not positions:
            # All are halted or paused; a retry or a resume adds the tenant to the backlog again.
            head = await store.read_head_position(connection, tenant_id)
            await connection.execute(_REMOVE_FROM_BACKLOG, tenant_id, head, [])
            return head, False
        lowest = min(positions.values())
        # Projections at the same position advance together; those further behind catch up first.
        group = [p for p in self._projections if positions.get(p.name) == lowest]
        next_position = min((position for position in positions.values() if position > lowest), default=None)
        limit = BATCH_EVENTS if next_position is None else min(BATCH_EVENTS, next_position - lowest)
        if single:
            group, limit = group[:1], 1
        try:
            events = await store.read_after(connection, tenant_id, lowest, limit)
        except UnknownEvent as error:
            if limit > 1 or len(group) > 1:
                raise _BatchFailed from error
            if error.kind in group[0].kinds:
                raise PoisonEvent(group[0].name, lowest + 1, str(error)) from error
            # The projection does not read streams of this kind, so it can skip the event.
            await connection.execute(_ADVANCE, tenant_id, lowest + 1, [group[0].name])
            return lowest + 1, True
        if events:
            await self._apply(connection, tenant_id, group, events)
            lowest = events[-1].position
            names = [projection.name for projection in group]
            await connection.execute(_ADVANCE, tenant_id, lowest, names)
            if outdated := [name for name in names if name in newer]:
                await connection.execute(_OUTDATE, tenant_id, outdated)
        else:
            await connection.execute(_REMOVE_FROM_BACKLOG, tenant_id, lowest, [])
        has_more = len(events) == limit or next_position is not None or len(group) < len(positions)
        return lowest, has_more and bool(events)

    async def _apply(
        self, connection: Connection, tenant_id: int, group: Sequence[Projection], events: Sequence[RecordedEvent]
    ) -> None:
        for projection in group:
            wanted = [event for event in events if event.kind in projection.kinds]
            if not wanted:
                continue
            try:
                await projection.apply(connection, tenant_id, wanted)
            except Exception as error:
                if is_transient(error):
                    raise
                if len(events) == 1:
                    raise PoisonEvent(
                        projection.name, events[0].position, f"{type(error).__name__}: {error}"
                    ) from error
                raise _BatchFailed from error

    async def _halt(self, tenant_id: int, poison: PoisonEvent) -> None:
        _log.error("projection_halted", tenant_id=tenant_id, projection=poison.projection, position=poison.position)
        async with self._database.transaction() as connection:
            version = self._versions[poison.projection]
            await connection.execute(_HALT, tenant_id, poison.projection, poison.position, poison.error, version)


class _CatchUp:
    """The passes of one tenant that run in this process.

    Attributes:
        began: When the present pass began, in seconds of the loop's clock.
        waiting: The positions that callers wait for, each with the future that tells them.
        task: The task that runs the passes.
    """

    __slots__ = ("began", "task", "waiting")

    def __init__(self, began: float) -> None:
        self.began = began
        self.waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.task: asyncio.Task[None] | None = None


def _time_out(reached: "asyncio.Future[None]") -> None:
    if not reached.done():
        reached.set_exception(TimeoutError())


class _BatchFailed(Exception):
    """A batch of several events or projections failed; which event is the cause is not known yet."""

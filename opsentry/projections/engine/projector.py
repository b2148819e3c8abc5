"""`catch_up`, the one way to project: whoever calls it, the checkpoint's row lock makes it happen exactly once."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import asyncpg
import structlog

from opsentry.events import store
from opsentry.events.codec import RecordedEvent, UnknownEvent
from opsentry.infrastructure.postgres import Connection, Database, is_transient
from opsentry.projections.engine.projection import Projection
from opsentry.projections.engine.states import STATE

_log = structlog.get_logger()

# Makes the rows that are missing, for a new tenant or a projection that is new in the code.
_ENSURE = """
INSERT INTO checkpoints (tenant_id, projection, generation)
SELECT $1, name, coalesce((SELECT generation FROM projections p WHERE p.name = new.name), 0)
FROM unnest($2::text[]) AS new (name) ON CONFLICT DO NOTHING
"""

# Takes the tenant's checkpoints, in one order for all, so that two passes never wait for each other. A read model can
# be derived again, so its commit need not wait for the disk: after a crash of the server both rows and checkpoint
# are where they were, and the next pass or read goes on from there. A process that stands still with the locks is
# thrown out by the server, and what it does when it wakes up is refused: whoever waited has gone on meanwhile.
_LOCK = f"""
SELECT c.projection, c.position, {STATE} AS state, p.version,
    (SELECT set_config('synchronous_commit', 'off', true)
        || set_config('idle_in_transaction_session_timeout', '3s', true)
        || CASE WHEN current_setting('server_version_num')::int >= 170000
            THEN set_config('transaction_timeout', '30s', true) ELSE '' END) AS settings
FROM checkpoints c LEFT JOIN projections p ON p.name = c.projection
WHERE c.tenant_id = $1 AND c.projection = ANY($2) ORDER BY c.projection FOR NO KEY UPDATE OF c
"""

# What need not be projected any more: up to $2, as far as all others than $3 are there too that do not stand still.
# Those are looked at anew by each statement: one that was resumed since, or that only newer code knows, must not lose
# its note.
_PROJECTED = """
DELETE FROM projection_backlog AS behind WHERE behind.tenant_id = $1 AND behind.position <= $2 AND NOT EXISTS (
    SELECT FROM checkpoints c LEFT JOIN projections p ON p.name = c.projection
    WHERE c.tenant_id = $1 AND c.projection <> ALL($3) AND c.position < behind.position
        AND c.halted_at IS NULL AND NOT coalesce(p.paused, false))
"""

# Moves the checkpoints that are furthest behind on.
_ADVANCE = f"""
WITH projected AS ({_PROJECTED})
UPDATE checkpoints SET position = $2 WHERE tenant_id = $1 AND projection = ANY($3)
"""

# Rows to which an older version of the code has added are to be derived anew by the newer one.
_OUTDATE = "UPDATE checkpoints SET generation = -1 WHERE tenant_id = $1 AND projection = ANY($2) AND generation >= 0"

# Unless another process, which may know the event, has gone past it since. Where the rows are of newer code than this,
# they may be what it does not understand: that code is to replay them anew, and goes on.
_HALT = """
UPDATE checkpoints c SET halted_at = $3, error = $4, generation = CASE WHEN EXISTS (
    SELECT FROM projections p WHERE p.name = c.projection AND p.version > $5) THEN -1 ELSE generation END
WHERE tenant_id = $1 AND projection = $2 AND position = $3 - 1 AND halted_at IS NULL
"""

# Tenants after $1 whose ledger has gone further than one of their projections, each found by the index: as much work
# as there are tenants that lag.
_BEHIND = """
WITH RECURSIVE found AS (
    (SELECT tenant_id, 1 AS number FROM projection_backlog WHERE tenant_id > $1 ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT next.tenant_id, number + 1 FROM found CROSS JOIN LATERAL (
        SELECT tenant_id FROM projection_backlog WHERE tenant_id > found.tenant_id ORDER BY tenant_id LIMIT 1) AS next
    WHERE number < $2)
SELECT tenant_id FROM found
"""

# Sessions of ours that others of ours wait for and that stand still, waiting for a client that neither sends nor reads.
# What stands still between statements the server ends by itself, but not what does so in the middle of one.
_EVICT = """
SELECT DISTINCT holder.pid, pg_terminate_backend(holder.pid) FROM pg_stat_activity AS waiter
CROSS JOIN unnest(pg_blocking_pids(waiter.pid)) AS blocking (pid)
JOIN pg_stat_activity AS holder ON holder.pid = blocking.pid
WHERE waiter.datname = current_database() AND waiter.usename = current_user AND waiter.wait_event_type = 'Lock'
    AND holder.usename = current_user AND holder.wait_event IN ('ClientRead', 'ClientWrite')
    AND holder.state_change < clock_timestamp() - interval '10 seconds'
"""

_BATCH = 500
_PASS_TIMEOUT = 30.0
# How often a read looks whether a position that it waits for has been recorded.
_POLL_SECONDS = 0.05


class PoisonEvent(Exception):
    """An event that a projection cannot apply."""

    def __init__(self, projection: str, position: int, error: str) -> None:
        super().__init__(f"{projection} cannot apply event {position}: {error}")
        self.projection = projection
        self.position = position
        self.error = error


class PositionNotReached(Exception):
    """A read was asked for a position that the read models did not reach in time."""


class Projector:
    """Brings projections up to their tenant's ledger."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._projections = sorted(projections, key=lambda projection: projection.name)
        self._names = [projection.name for projection in self._projections]
        self._versions = {projection.name: projection.version for projection in self._projections}
        self._passes: dict[int, asyncio.Task[int]] = {}
        self._began: dict[int, float] = {}

    @property
    def timeout_seconds(self) -> float:
        """How long a read waits for the projections to catch up."""
        return self._database.timeout_seconds

    @property
    def projections(self) -> Sequence[Projection]:
        """The projections that it brings up, by name."""
        return self._projections

    async def catch_up(self, tenant_id: int, position: int) -> None:
        """Return when every projection of the tenant that is not halted shows event `position`.

        Callers for one tenant share passes: one that runs, and one that begins after it for all who came meanwhile.

        Raises:
            DatabaseUnavailable: The database was lost; the worker, or the next read, will catch up.
        """
        while True:
            current = self._passes.get(tenant_id)
            # One that has just ended may still be noted here, and awaiting it would not even yield.
            if current is None or current.done():
                current = asyncio.create_task(self._pass(tenant_id))
                self._passes[tenant_id] = current
                self._began[tenant_id] = asyncio.get_running_loop().time()
                current.add_done_callback(partial(self._forget, tenant_id))
            # A caller that gives up waiting must not take the pass away from the others.
            if await asyncio.shield(current) >= position:
                return

    def under_way(self, tenant_id: int) -> float | None:
        """Return for how many seconds a pass of the tenant has been under way here, `None` if none is."""
        current = self._passes.get(tenant_id)
        if current is None or current.done():
            return None
        return asyncio.get_running_loop().time() - self._began[tenant_id]

    async def evict(self) -> list[int]:
        """End sessions that stand still with locks that others wait for; return the process ids they had."""
        return [row["pid"] for row in await self._database.fetch(_EVICT, seconds=10)]

    def _forget(self, tenant_id: int, ended: "asyncio.Task[int]") -> None:
        if self._passes.get(tenant_id) is ended:
            del self._passes[tenant_id], self._began[tenant_id]
        # All who waited for it may have given up meanwhile: then nobody else tells.
        if not ended.cancelled() and (error := ended.exception()) is not None:
            _log.warning("pass failed", tenant_id=tenant_id, error=type(error).__name__)

    async def behind(self, limit: int = 1000, after: int = 0) -> list[int]:
        """Return the tenants with projections that lag, at most `limit`, whose ids are above `after`; in order."""
        return [row["tenant_id"] for row in await self._database.fetch(_BEHIND, after, limit, seconds=10)]

    async def read(
        self, tenant_id: int, query: Callable[[Connection], Awaitable[asyncpg.Record]], *, at_least: int = 0
    ) -> asyncpg.Record:
        """Return the row of `query` once it shows all that the tenant's ledger held when it was asked.

        The row carries what `freshness` tells. A read that finds its projection behind brings it up to date itself,
        so no read depends on a command having had the time to, or on a worker being alive. Where that takes too
        long, the row is returned as it is; `position` below `head` tells.

        Args:
            tenant_id: The tenant.
            query: Reads the row.
            at_least: A position that the row must show in fact; waited for, for a bounded time.

        Raises:
            PositionNotReached: `at_least` was not reached in time.
            DatabaseUnavailable: The database was lost.
        """
        row = await self._query(query)
        behind = row["trusted_position"] is None or row["trusted_position"] < row["head_position"]
        if not behind and (row["projected_position"] or 0) >= at_least:
            return row
        try:
            async with asyncio.timeout(self.timeout_seconds):
                while row["head_position"] < at_least:
                    await asyncio.sleep(_POLL_SECONDS)
                    row = await self._query(query)
                await self.catch_up(tenant_id, row["head_position"])
        except TimeoutError:
            pass
        row = await self._query(query)
        if (row["projected_position"] or 0) < at_least:
            raise PositionNotReached(f"position {at_least} cannot be shown yet")
        return row

    async def _query(self, query: Callable[[Connection], Awaitable[asyncpg.Record]]) -> asyncpg.Record:
        async with self._database.connection() as connection:
            return await query(connection)

    async def _pass(self, tenant_id: int) -> int:
        """Apply what there is; return the position reached."""
        careful = 0
        while True:
            try:
                async with self._database.transaction(_PASS_TIMEOUT) as connection:
                    reached, more = await self._step(connection, tenant_id, careful=careful > 0)
            except _BatchFailed:
                # One projection and one event at a time, until the one to blame is found or left behind.
                careful = _BATCH * len(self._projections)
                continue
            except PoisonEvent as poison:
                await self._halt(tenant_id, poison)
                careful = 0
                continue
            careful = max(0, careful - 1)
            if not more:
                return reached

    async def _step(self, connection: Connection, tenant_id: int, *, careful: bool) -> tuple[int, bool]:
        """Apply one batch inside the caller's transaction; return the position reached and whether there is more."""
        rows = await connection.fetch(_LOCK, tenant_id, self._names)
        if len(rows) < len(self._names):
            await connection.execute(_ENSURE, tenant_id, self._names)
            rows = await connection.fetch(_LOCK, tenant_id, self._names)
        positions = {row["projection"]: int(row["position"]) for row in rows if row["state"] == "running"}
        newer = [row["projection"] for row in rows if (row["version"] or 0) > self._versions[row["projection"]]]
        if not positions:
            # Whoever lets them go on notes the tenant again.
            head = await store.read_head_position(connection, tenant_id)
            await connection.execute(_PROJECTED, tenant_id, head, [])
            return head, False
        lowest = min(positions.values())
        # Projections that stand at the same position advance together; those that are behind catch up first.
        group = [p for p in self._projections if positions.get(p.name) == lowest]
        next_position = min((position for position in positions.values() if position > lowest), default=None)
        limit = _BATCH if next_position is None else min(_BATCH, next_position - lowest)
        if careful:
            group, limit = group[:1], 1
        try:
            events = await store.read_after(connection, tenant_id, lowest, limit)
        except UnknownEvent as error:
            if limit > 1 or len(group) > 1:
                raise _BatchFailed from error
            if error.kind in group[0].kinds:
                raise PoisonEvent(group[0].name, lowest + 1, str(error)) from error
            # It lies in a stream of a kind that this projection does not read, so it need not be understood here.
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
            await connection.execute(_PROJECTED, tenant_id, lowest, [])
        more = len(events) == limit or next_position is not None or len(group) < len(positions)
        return lowest, more and bool(events)

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
        _log.error("projection halted", tenant_id=tenant_id, projection=poison.projection, position=poison.position)
        async with self._database.transaction() as connection:
            version = self._versions[poison.projection]
            await connection.execute(_HALT, tenant_id, poison.projection, poison.position, poison.error, version)


class _BatchFailed(Exception):
    """A batch could not be applied; which of its events is to blame is not known yet."""

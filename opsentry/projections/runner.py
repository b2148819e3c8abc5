"""`catch_up`, the one way to project: whoever calls it, the checkpoint's row lock makes it happen exactly once."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import asyncpg
import structlog

from opsentry.events import log
from opsentry.events.codec import RecordedEvent, UnknownEvent
from opsentry.postgres import DATABASE_TIMEOUT, Connection, Database, is_passing
from opsentry.projections.projection import Projection

_log = structlog.get_logger()

# Makes the rows that are missing, for a new tenant or a projection that is new in the code.
_ENSURE = "INSERT INTO checkpoints (tenant_id, projection) SELECT $1, unnest($2::text[]) ON CONFLICT DO NOTHING"

# Takes the tenant's checkpoints, in one order for all, so that two passes never wait for each other. A read model can
# be derived again, so its commit need not wait for the disk: after a crash of the server both rows and checkpoint
# are where they were, and the next pass or read goes on from there.
_LOCK = (
    "SELECT projection, position, parked_seq, set_config('synchronous_commit', 'off', true)"
    " FROM checkpoints WHERE tenant_id = $1 AND projection = ANY($2) ORDER BY projection FOR NO KEY UPDATE"
)

_ADVANCE = "UPDATE checkpoints SET position = $3 WHERE tenant_id = $1 AND projection = ANY($2)"

# Unless another process, which may know the event, has gone past it since.
_PARK = (
    "UPDATE checkpoints SET parked_seq = $3, error = $4"
    " WHERE tenant_id = $1 AND projection = $2 AND position = $3 - 1 AND parked_seq IS NULL"
)

# Tenants whose ledger has gone further than one of their projections.
_BEHIND = (
    "SELECT h.tenant_id FROM heads h WHERE h.seq > 0 AND ("
    " (SELECT count(*) FROM checkpoints c WHERE c.tenant_id = h.tenant_id AND c.projection = ANY($1))"
    " < cardinality($1::text[]) OR EXISTS (SELECT FROM checkpoints c WHERE c.tenant_id = h.tenant_id"
    " AND c.projection = ANY($1) AND c.position < h.seq AND c.parked_seq IS NULL)) LIMIT $2"
)

# How each projection stands over all tenants that have a ledger.
_STANDING = """
SELECT p.name AS projection, count(*) AS tenants,
    count(*) FILTER (WHERE c.position >= h.seq AND c.parked_seq IS NULL) AS done,
    count(*) FILTER (WHERE coalesce(c.position, 0) < h.seq AND c.parked_seq IS NULL) AS behind,
    count(*) FILTER (WHERE c.parked_seq IS NOT NULL) AS parked,
    sum(h.seq - coalesce(c.position, 0))::bigint AS lag_events,
    coalesce(max(extract(epoch FROM clock_timestamp() - e.recorded_at)), 0)::float8 AS lag_seconds,
    coalesce(min(c.generation), 0) AS generation, max(c.rebuilt_at) AS rebuilt_at
FROM unnest($1::text[]) WITH ORDINALITY AS p (name, place) CROSS JOIN heads h
LEFT JOIN checkpoints c ON c.tenant_id = h.tenant_id AND c.projection = p.name
LEFT JOIN LATERAL (
    SELECT recorded_at FROM events WHERE tenant_id = h.tenant_id AND seq > coalesce(c.position, 0)
    ORDER BY seq LIMIT 1) AS e ON true
WHERE h.seq > 0 GROUP BY p.name, p.place ORDER BY p.place
"""

# Projections that stopped at an event, of all tenants.
_PARKED = """
SELECT t.slug, c.tenant_id, c.projection, c.parked_seq AS seq, c.error
FROM checkpoints c JOIN tenants t USING (tenant_id) WHERE c.parked_seq IS NOT NULL ORDER BY t.slug, c.projection
"""

# Lets parked projections try again, of all tenants or of one.
_RELEASE = """
UPDATE checkpoints SET parked_seq = NULL, error = NULL
WHERE parked_seq IS NOT NULL AND projection = ANY($1) AND ($2::bigint IS NULL OR tenant_id = $2) RETURNING tenant_id
"""

_BATCH = 500
_PASS_TIMEOUT = 30.0
# How often a read looks whether a position that it waits for has been recorded.
_POLL_SECONDS = 0.05


class Poison(Exception):
    """An event that a projection cannot apply."""

    def __init__(self, projection: str, seq: int, error: str) -> None:
        super().__init__(f"{projection} cannot apply event {seq}: {error}")
        self.projection = projection
        self.seq = seq
        self.error = error


class NotThereYet(Exception):
    """A read was asked for a position that the read models did not reach in time."""


class Runner:
    """Brings projections up to their tenant's ledger."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._projections = sorted(projections, key=lambda projection: projection.name)
        self._names = [projection.name for projection in self._projections]
        self._passes: dict[int, asyncio.Task[int]] = {}

    async def catch_up(self, tenant_id: int, seq: int) -> None:
        """Return when every projection of the tenant that is not parked shows event `seq`.

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
                current.add_done_callback(partial(self._forget, tenant_id))
            # A caller that gives up waiting must not take the pass away from the others.
            if await asyncio.shield(current) >= seq:
                return

    def _forget(self, tenant_id: int, ended: "asyncio.Task[int]") -> None:
        if self._passes.get(tenant_id) is ended:
            del self._passes[tenant_id]

    async def behind(self, limit: int = 1000) -> list[int]:
        """Return tenants with projections that lag, at most `limit`."""
        return [row["tenant_id"] for row in await self._database.fetch(_BEHIND, self._names, limit, seconds=10)]

    async def standing(self) -> list[asyncpg.Record]:
        """Return for each projection how many `tenants` are `done`, `behind` and `parked`, and the lag of all.

        `lag_events` is a sum, `lag_seconds` the age of the oldest event that is missing; `generation` is how often
        the tenant's rows were derived anew that were so least often.
        """
        return await self._database.fetch(_STANDING, self._names, seconds=60)

    async def parked(self) -> list[asyncpg.Record]:
        """Return `slug`, `tenant_id`, `projection`, `seq` and `error` of what stopped at an event."""
        return await self._database.fetch(_PARKED, seconds=60)

    async def retry(self, names: Sequence[str], tenant_id: int | None = None) -> int:
        """Let parked projections go on from where they stopped, of all tenants or of one; return how many did.

        One that still cannot apply its event is parked there again.
        """
        rows = await self._database.fetch(_RELEASE, list(names), tenant_id, seconds=60)
        for tenant in sorted({row["tenant_id"] for row in rows}):
            await self.catch_up(tenant, 0)
        return len(rows)

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
            NotThereYet: `at_least` was not reached in time.
            DatabaseUnavailable: The database was lost.
        """
        row = await self._query(query)
        behind = row["position"] is None or row["position"] < row["head"]
        if not behind and (row["shown"] or 0) >= at_least:
            return row
        try:
            async with asyncio.timeout(DATABASE_TIMEOUT):
                while row["head"] < at_least:
                    await asyncio.sleep(_POLL_SECONDS)
                    row = await self._query(query)
                await self.catch_up(tenant_id, row["head"])
        except TimeoutError:
            pass
        row = await self._query(query)
        if (row["shown"] or 0) < at_least:
            raise NotThereYet(f"position {at_least} cannot be shown yet")
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
            except Poison as poison:
                await self._park(tenant_id, poison)
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
        positions = {row["projection"]: int(row["position"]) for row in rows if row["parked_seq"] is None}
        if not positions:
            return await log.head(connection, tenant_id), False
        lowest = min(positions.values())
        # Projections that stand at the same position advance together; those that are behind catch up first.
        group = [p for p in self._projections if positions.get(p.name) == lowest]
        next_position = min((position for position in positions.values() if position > lowest), default=None)
        limit = _BATCH if next_position is None else min(_BATCH, next_position - lowest)
        if careful:
            group, limit = group[:1], 1
        try:
            events = await log.read_after(connection, tenant_id, lowest, limit)
        except UnknownEvent as error:
            if limit > 1 or len(group) > 1:
                raise _BatchFailed from error
            if error.kind in group[0].kinds:
                raise Poison(group[0].name, lowest + 1, str(error)) from error
            # It lies in a stream of a kind that this projection does not read, so it need not be understood here.
            await connection.execute(_ADVANCE, tenant_id, [group[0].name], lowest + 1)
            return lowest + 1, True
        if events:
            await self._apply(connection, tenant_id, group, events)
            lowest = events[-1].seq
            await connection.execute(_ADVANCE, tenant_id, [projection.name for projection in group], lowest)
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
                if is_passing(error):
                    raise
                if len(events) == 1:
                    raise Poison(projection.name, events[0].seq, f"{type(error).__name__}: {error}") from error
                raise _BatchFailed from error

    async def _park(self, tenant_id: int, poison: Poison) -> None:
        _log.error("projection parked", tenant_id=tenant_id, projection=poison.projection, seq=poison.seq)
        async with self._database.transaction() as connection:
            await connection.execute(_PARK, tenant_id, poison.projection, poison.seq, poison.error)


class _BatchFailed(Exception):
    """A batch could not be applied; which of its events is to blame is not known yet."""

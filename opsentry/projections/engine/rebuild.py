"""Deriving read models anew, and comparing them with what the ledger gives, without anybody's noticing.

A tenant's rebuild is one transaction. It folds the ledger stream by stream, without any lock, into rows that it keeps
aside; then it locks the checkpoints, replaces the tenant's rows, applies what came meanwhile, and commits. Readers see
the old rows until then; a process that is killed leaves nothing behind.
"""

from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter

import structlog

from opsentry.events import store
from opsentry.events.codec import UnknownEvent
from opsentry.infrastructure.postgres import Connection, Database, is_transient
from opsentry.projections.engine.comparison import Difference, compare, compare_summaries
from opsentry.projections.engine.management import register
from opsentry.projections.engine.projection import Projection, Table
from opsentry.projections.engine.projector import PoisonEvent
from opsentry.projections.engine.replay import StagedRows, fold

_log = structlog.get_logger()

# So many events are folded at once: enough to make round trips cheap, few enough to stay small.
_CHUNK = 2_000
_TAIL = 500
_PATIENCE = 24 * 3600.0

# Only one rebuild of a tenant at a time; whoever comes second leaves it to the first. Whoever stands still in the
# transaction is thrown out of it. A read model can be derived again, so its commit need not wait for the disk.
_ALONE = """
SELECT pg_try_advisory_xact_lock(hashtextextended('rebuild', $1)),
    set_config('idle_in_transaction_session_timeout', '60s', true), set_config('synchronous_commit', 'off', true)
"""

# Which of these projections are still to be rebuilt for the tenant by code of these versions, and to which generation.
_WANTED = """
SELECT c.projection, p.generation FROM unnest($2::text[], $3::int[]) AS own (name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version AND NOT p.paused
JOIN checkpoints c ON c.projection = p.name AND c.tenant_id = $1
WHERE c.generation < p.generation AND c.rebuild_error IS NULL
"""

# Taken in the same order as a pass does, and with the same impatience.
_LOCK = """
SELECT projection, (SELECT set_config('idle_in_transaction_session_timeout', '3s', true)) AS setting
FROM checkpoints WHERE tenant_id = $1 AND projection = ANY($2) ORDER BY projection FOR NO KEY UPDATE
"""

# The generation is the one that was asked for when the fold began: whoever asked since is not answered by it.
_DONE = """
UPDATE checkpoints c SET position = $4, halted_at = NULL, error = NULL, rebuild_halted_at = NULL, rebuild_error = NULL,
    generation = wanted.generation, rebuilt_at = clock_timestamp()
FROM unnest($2::text[], $3::int[]) AS wanted (name, generation)
WHERE c.tenant_id = $1 AND c.projection = wanted.name
"""

# Unless somebody else could do it meanwhile.
_FAILED = """
UPDATE checkpoints c SET rebuild_halted_at = $4, rebuild_error = $5 FROM unnest($2::text[], $3::int[]) AS own
(name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version
WHERE c.tenant_id = $1 AND c.projection = p.name AND c.generation < p.generation
"""

# A rebuild of all tenants begins by raising the generation, unless one is under way: then it goes on. What failed in
# one is tried again. It is done with the version that this code has.
_BEGIN = """
UPDATE projections p SET version = new.version, generation = generation + CASE
    WHEN p.version = new.version AND EXISTS (
        SELECT FROM checkpoints c WHERE c.projection = p.name AND c.generation < p.generation
        AND c.rebuild_error IS NULL) THEN 0 ELSE 1 END
FROM unnest($1::text[], $2::int[]) AS new (name, version) WHERE p.name = new.name
"""
_TRY_AGAIN = """
UPDATE checkpoints SET rebuild_halted_at = NULL, rebuild_error = NULL
WHERE projection = ANY($1) AND rebuild_error IS NOT NULL AND ($2::bigint IS NULL OR tenant_id = $2)
"""

# The same for one tenant.
_BEGIN_ONE = "UPDATE checkpoints SET generation = -1 WHERE projection = ANY($1) AND tenant_id = $2 AND generation >= 0"

# Tenants that are still to be rebuilt, found by the index: as much work as there are such tenants. Rows of a version
# that this code does not have are left to code that has it, and those to which older code that still runs has added
# after they were done are not done again before $4 seconds are over.
_LEFT = """
SELECT DISTINCT left_over.tenant_id FROM unnest($1::text[], $2::int[]) AS own (name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version AND NOT p.paused
CROSS JOIN LATERAL (
    SELECT tenant_id FROM checkpoints c
    WHERE c.projection = p.name AND c.generation < p.generation AND c.rebuild_error IS NULL
        AND (c.generation >= 0 OR c.rebuilt_at IS NULL
            OR c.rebuilt_at <= clock_timestamp() - $4 * interval '1 second')
    ORDER BY c.generation LIMIT $3) AS left_over
"""

# How many events tenants have.
_SIZES = "SELECT tenant_id, position FROM ledger_heads WHERE tenant_id = ANY($1) ORDER BY position DESC"

_POSITION = "SELECT position, halted_at FROM checkpoints WHERE tenant_id = $1 AND projection = $2"


async def _go_on() -> None:
    return None


def _own(projections: Sequence[Projection]) -> tuple[list[str], list[int]]:
    return [projection.name for projection in projections], [projection.version for projection in projections]


class _NoLongerWanted(Exception):
    """Somebody has changed what is to be rebuilt, while it was."""


class Rebuilder:
    """Derives rows anew, tenant by tenant."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._projections = sorted(projections, key=attrgetter("name"))
        self._names = [projection.name for projection in self._projections]
        self._versions = [projection.version for projection in self._projections]

    async def begin(self, tenant_id: int | None = None) -> None:
        """Have the rows of all tenants, or of one, derived anew; go on with what is under way already."""
        async with self._database.connection(60) as connection, connection.transaction():
            await register(connection, self._projections)
            if tenant_id is None:
                await connection.execute(_BEGIN, self._names, self._versions)
            else:
                await connection.execute(_BEGIN_ONE, self._names, tenant_id)
            await connection.execute(_TRY_AGAIN, self._names, tenant_id)

    async def left(self, limit: int, rest: float = 0.0) -> dict[int, int]:
        """Return the tenants that are still to be done, and how many events each has, the longest ledger first.

        At most `limit` of each projection. Rows that were done less than `rest` seconds ago are left to rest where
        older code has added to them since.
        """
        async with self._database.connection(60) as connection:
            rows = await connection.fetch(_LEFT, self._names, self._versions, limit, rest)
            sizes = await connection.fetch(_SIZES, [row["tenant_id"] for row in rows])
            return {row["tenant_id"]: row["position"] for row in sizes}

    async def rebuild(
        self,
        tenant_id: int,
        *,
        advance: Callable[[int], None] = lambda _events: None,
        breathe: Callable[[], Awaitable[None]] = _go_on,
        chunk: int = _CHUNK,
    ) -> list[str]:
        """Derive anew what is to be derived of a tenant; return the names of the projections that were.

        Nothing is done where somebody else is at it just now. A projection that meets an event that it cannot apply
        has its rows left as they were, and says so among what is halted; so does one whose rows cannot be written.

        Args:
            tenant_id: The tenant.
            advance: Called with the number of events that were folded.
            breathe: Awaited after each chunk, while nothing is locked.
            chunk: So many events are folded at once.

        Raises:
            DatabaseUnavailable: The database was lost; the rows are as they were.
        """
        tried = self._projections
        while tried:
            try:
                return await self._rebuild(tenant_id, tried, advance, breathe, chunk)
            except _NoLongerWanted:
                return []
            except PoisonEvent as poison:
                failed = [projection for projection in tried if projection.name == poison.projection]
                await self._fail(tenant_id, failed, poison.position, poison.error)
                tried = [projection for projection in tried if projection not in failed]
            except Exception as error:
                if is_transient(error):
                    raise
                await self._fail(tenant_id, tried, None, f"{type(error).__name__}: {error}")
                raise
        return []

    async def _fail(self, tenant_id: int, failed: Sequence[Projection], position: int | None, error: str) -> None:
        names = [projection.name for projection in failed]
        _log.error("rebuild failed", tenant_id=tenant_id, projections=names, position=position)
        async with self._database.transaction(60) as connection:
            await connection.execute(_FAILED, tenant_id, *_own(failed), position, error)

    async def _rebuild(
        self,
        tenant_id: int,
        projections: Sequence[Projection],
        advance: Callable[[int], None],
        breathe: Callable[[], Awaitable[None]],
        chunk: int,
    ) -> list[str]:
        async with self._database.transaction(_PATIENCE) as connection:
            if not await connection.fetchval(_ALONE, tenant_id):
                return []
            rows = await connection.fetch(_WANTED, tenant_id, *_own(projections))
            wanted = {row["projection"]: row["generation"] for row in rows}
            group = [projection for projection in projections if projection.name in wanted]
            if not group:
                return []
            end = await store.read_head_position(connection, tenant_id)
            with StagedRows() as staged:
                async for derived in fold(connection, group, tenant_id, end, chunk):
                    staged.add(derived.rows)
                    advance(derived.events)
                    await breathe()
                await connection.fetch(_LOCK, tenant_id, list(wanted))
                # What was paused or raised since is not for this code to replace; it begins again where it is wanted.
                if len(await connection.fetch(_WANTED, tenant_id, *_own(group))) < len(group):
                    raise _NoLongerWanted
                await _replace(connection, [table for each in group for table in each.tables], tenant_id, staged)
            end = await _apply_tail(connection, group, tenant_id, end)
            await connection.execute(_DONE, tenant_id, list(wanted), list(wanted.values()), end)
            return list(wanted)

    async def verify(
        self, projection: Projection, tenant_id: int, advance: Callable[[int], None] = lambda _events: None
    ) -> Difference | None:
        """Return the first row that differs from what the ledger gives up to the checkpoint, `None` if none does.

        Nothing is locked: the ledger and the rows are read as they were at one moment.

        Raises:
            PoisonEvent: An event before the checkpoint cannot be applied.
            DatabaseUnavailable: The database was lost.
        """
        async with (
            self._database.connection(_PATIENCE) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            row = await connection.fetchrow(_POSITION, tenant_id, projection.name)
            shown = 0 if row is None else row["position"]
            async for derived in fold(connection, [projection], tenant_id, shown, _CHUNK):
                difference = await compare(connection, projection.tables, tenant_id, derived)
                if difference is not None:
                    return difference
                advance(derived.events)
            return await compare_summaries(connection, projection.tables, tenant_id)


async def _replace(connection: Connection, tables: Sequence[Table], tenant_id: int, staged: StagedRows) -> None:
    """Put the rows kept aside in the place of the tenant's rows."""
    deletes = (f"d{n} AS (DELETE FROM {table.name} WHERE tenant_id = $1)" for n, table in enumerate(tables))
    await connection.execute(f"WITH {', '.join(deletes)} SELECT", tenant_id)
    for table in tables:
        for rows in staged.of(table.name):
            await connection.copy_records_to_table(
                table.name, records=[(tenant_id, *row) for row in rows], columns=("tenant_id", *table.columns)
            )
    for table in tables:
        if table.summary is not None:
            columns = ", ".join(("tenant_id", *table.columns))
            await connection.execute(
                f"INSERT INTO {table.name} ({columns}) SELECT $1, summary.* FROM ({table.summary}) AS summary",
                tenant_id,
            )


async def _apply_tail(connection: Connection, group: Sequence[Projection], tenant_id: int, position: int) -> int:
    """Apply what was appended meanwhile, with the checkpoints locked; return the position reached."""
    end = await store.read_head_position(connection, tenant_id)
    while position < end:
        until = min(position + _TAIL, end)
        for projection in group:
            try:
                events = await store.read_between(connection, tenant_id, position, until, projection.kinds)
                if events:
                    await projection.apply(connection, tenant_id, events)
            except UnknownEvent as error:
                raise PoisonEvent(projection.name, error.position or until, str(error)) from error
            except Exception as error:
                if is_transient(error):
                    raise
                # Whoever catches up comes to the same event and names it.
                blamed = f"in events {position + 1} to {until}: {type(error).__name__}: {error}"
                raise PoisonEvent(projection.name, until, blamed) from error
        position = until
    return end

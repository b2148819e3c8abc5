"""Rebuild read models from the ledger, and verify them against it, while reads continue.

A tenant's rebuild is one transaction. It replays the ledger stream by stream into staged rows, without a lock. Then it
locks the checkpoints, replaces the tenant's rows, applies the events of the meantime, and commits. Reads show the old
rows until the commit. A process that is killed leaves nothing behind.
"""

from collections.abc import Awaitable, Callable, Sequence
from operator import attrgetter

import structlog

from opsentry.events import store
from opsentry.events.codec import UnknownEvent
from opsentry.infrastructure.postgres import Connection, Database, is_transient
from opsentry.projections.engine.applier import PoisonEvent
from opsentry.projections.engine.comparison import Difference, compare, compare_summaries
from opsentry.projections.engine.management import register
from opsentry.projections.engine.projection import Projection, Table, apply
from opsentry.projections.engine.replay import StagedRows, replay

_log = structlog.get_logger()

# Large enough to make round trips cheap, small enough to keep memory low.
CHUNK_EVENTS = 2_000
TAIL_BATCH_EVENTS = 500
REBUILD_TIMEOUT_SECONDS = 24 * 3600.0

# Takes the tenant's rebuild lock, so that one rebuild of a tenant runs at a time. The server ends the session of a
# process that hangs. The commit need not wait for the disk: a rebuild that a crash loses is done again.
_TRY_REBUILD_LOCK = """
SELECT pg_try_advisory_xact_lock(hashtextextended('rebuild', $1)),
    set_config('idle_in_transaction_session_timeout', '60s', true), set_config('synchronous_commit', 'off', true)
"""

# Selects which of these projections, in these versions, still need a rebuild for the tenant, with their generation.
_SELECT_OUTDATED = """
SELECT c.projection, p.generation FROM unnest($2::text[], $3::int[]) AS own (name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version AND NOT p.paused
JOIN checkpoints c ON c.projection = p.name AND c.tenant_id = $1
WHERE c.generation < p.generation AND c.rebuild_error IS NULL
"""

# Locks the tenant's checkpoints, in the order and with the timeout of a catch-up.
_LOCK_CHECKPOINTS = """
SELECT projection, (SELECT set_config('idle_in_transaction_session_timeout', '3s', true)) AS setting
FROM checkpoints WHERE tenant_id = $1 AND projection = ANY($2) ORDER BY projection FOR NO KEY UPDATE
"""

# Records a rebuild. The generation is that of the start of the replay, so a later request leads to another rebuild.
_FINISH = """
UPDATE checkpoints c SET position = $4, halted_at = NULL, halt_error = NULL, rebuild_halted_at = NULL,
    rebuild_error = NULL, generation = wanted.generation, rebuilt_at = clock_timestamp()
FROM unnest($2::text[], $3::int[]) AS wanted (name, generation)
WHERE c.tenant_id = $1 AND c.projection = wanted.name
"""

# Records a failed rebuild, unless another process has rebuilt the projection meanwhile.
_FAIL = """
UPDATE checkpoints c SET rebuild_halted_at = $4, rebuild_error = $5
FROM unnest($2::text[], $3::int[]) AS own (name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version
WHERE c.tenant_id = $1 AND c.projection = p.name AND c.generation < p.generation
"""

# Requests a rebuild of all tenants with this code's versions: raises the generation, unless a rebuild is unfinished.
_REQUEST_ALL = """
UPDATE projections p SET version = new.version, generation = generation + CASE
    WHEN p.version = new.version AND EXISTS (
        SELECT FROM checkpoints c WHERE c.projection = p.name AND c.generation < p.generation
        AND c.rebuild_error IS NULL) THEN 0 ELSE 1 END
FROM unnest($1::text[], $2::int[]) AS new (name, version) WHERE p.name = new.name
"""

# Requests a rebuild of one tenant.
_REQUEST_ONE = (
    "UPDATE checkpoints SET generation = -1 WHERE projection = ANY($1) AND tenant_id = $2 AND generation >= 0"
)

# Clears failed rebuilds of all tenants or of one, so that they are tried again.
_CLEAR_FAILURES = """
UPDATE checkpoints SET rebuild_halted_at = NULL, rebuild_error = NULL
WHERE projection = ANY($1) AND rebuild_error IS NOT NULL AND ($2::bigint IS NULL OR tenant_id = $2)
"""

# Selects at most $3 tenants of each projection that still need a rebuild; an index finds them without the others.
# - Code of another version does not count: only code of the registered version rebuilds.
# - Rows to which running older code has added after a rebuild settle for $4 seconds before the next one.
_SELECT_PENDING = """
SELECT DISTINCT pending.tenant_id FROM unnest($1::text[], $2::int[]) AS own (name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version AND NOT p.paused
CROSS JOIN LATERAL (
    SELECT tenant_id FROM checkpoints c
    WHERE c.projection = p.name AND c.generation < p.generation AND c.rebuild_error IS NULL
        AND (c.generation >= 0 OR c.rebuilt_at IS NULL
            OR c.rebuilt_at <= clock_timestamp() - $4 * interval '1 second')
    ORDER BY c.generation LIMIT $3) AS pending
"""

# Selects the number of events of these tenants, the longest ledger first.
_SELECT_SIZES = "SELECT tenant_id, position FROM ledger_heads WHERE tenant_id = ANY($1) ORDER BY position DESC"

# Selects the position of a projection's checkpoint.
_SELECT_POSITION = "SELECT position FROM checkpoints WHERE tenant_id = $1 AND projection = $2"


async def _continue() -> None:
    return None


def _names_and_versions(projections: Sequence[Projection]) -> tuple[list[str], list[int]]:
    return [projection.name for projection in projections], [projection.version for projection in projections]


class _NoLongerWanted(Exception):
    """A projection was paused, or registered in another version, during its rebuild."""


class Rebuilder:
    """Rebuilds projections tenant by tenant."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._projections = sorted(projections, key=attrgetter("name"))
        self._names, self._versions = _names_and_versions(self._projections)

    async def request(self, tenant_id: int | None = None) -> None:
        """Request a rebuild of all tenants, or of one; an unfinished rebuild of all tenants continues."""
        async with self._database.connection(60) as connection, connection.transaction():
            await register(connection, self._projections)
            if tenant_id is None:
                await connection.execute(_REQUEST_ALL, self._names, self._versions)
            else:
                await connection.execute(_REQUEST_ONE, self._names, tenant_id)
            await connection.execute(_CLEAR_FAILURES, self._names, tenant_id)

    async def pending_tenants(self, limit: int, settle_seconds: float = 0.0) -> dict[int, int]:
        """Return the tenants that still need a rebuild, each with its number of events, the longest ledger first.

        Args:
            limit: The number of tenants of each projection at most.
            settle_seconds: How long rows stay as they are that older code has changed since their last rebuild.
        """
        async with self._database.connection(60) as connection:
            rows = await connection.fetch(_SELECT_PENDING, self._names, self._versions, limit, settle_seconds)
            sizes = await connection.fetch(_SELECT_SIZES, [row["tenant_id"] for row in rows])
            return {row["tenant_id"]: row["position"] for row in sizes}

    async def rebuild(
        self,
        tenant_id: int,
        *,
        on_progress: Callable[[int], None] = lambda _events: None,
        between_chunks: Callable[[], Awaitable[None]] = _continue,
        chunk_events: int = CHUNK_EVENTS,
    ) -> list[str]:
        """Rebuild the outdated projections of a tenant; return the names of those that were rebuilt.

        Nothing happens while another process rebuilds the tenant. A projection that meets a poison event, or whose rows
        cannot be written, keeps its rows; its checkpoint records the error.

        Args:
            tenant_id: The tenant.
            on_progress: Called with the number of events that were replayed.
            between_chunks: Awaited after each chunk, while no lock is held.
            chunk_events: The number of events to replay at once.

        Raises:
            DatabaseUnavailable: The database was lost; the rows are unchanged.
        """
        remaining = self._projections
        while remaining:
            try:
                return await self._rebuild(tenant_id, remaining, on_progress, between_chunks, chunk_events)
            except _NoLongerWanted:
                return []
            except PoisonEvent as poison:
                failed = [projection for projection in remaining if projection.name == poison.projection]
                await self._fail(tenant_id, failed, poison.position, poison.error)
                remaining = [projection for projection in remaining if projection not in failed]
            except Exception as error:
                if is_transient(error):
                    raise
                await self._fail(tenant_id, remaining, None, f"{type(error).__name__}: {error}")
                raise
        return []

    async def _fail(self, tenant_id: int, failed: Sequence[Projection], position: int | None, error: str) -> None:
        names = [projection.name for projection in failed]
        _log.error("rebuild_failed", tenant_id=tenant_id, projections=names, position=position)
        async with self._database.transaction(60) as connection:
            await connection.execute(_FAIL, tenant_id, *_names_and_versions(failed), position, error)

    async def _rebuild(
        self,
        tenant_id: int,
        projections: Sequence[Projection],
        on_progress: Callable[[int], None],
        between_chunks: Callable[[], Awaitable[None]],
        chunk_events: int,
    ) -> list[str]:
        async with self._database.transaction(REBUILD_TIMEOUT_SECONDS) as connection:
            if not await connection.fetchval(_TRY_REBUILD_LOCK, tenant_id):
                return []
            rows = await connection.fetch(_SELECT_OUTDATED, tenant_id, *_names_and_versions(projections))
            generations = {row["projection"]: row["generation"] for row in rows}
            group = [projection for projection in projections if projection.name in generations]
            if not group:
                return []
            end = await store.read_head_position(connection, tenant_id)
            with StagedRows() as staged:
                async for chunk in replay(connection, group, tenant_id, end, chunk_events):
                    staged.add(chunk.rows)
                    on_progress(chunk.events)
                    await between_chunks()
                await connection.fetch(_LOCK_CHECKPOINTS, tenant_id, list(generations))
                still_outdated = await connection.fetch(_SELECT_OUTDATED, tenant_id, *_names_and_versions(group))
                if len(still_outdated) < len(group):
                    raise _NoLongerWanted
                await _replace(connection, [table for each in group for table in each.tables], tenant_id, staged)
            end = await _apply_tail(connection, group, tenant_id, end)
            await connection.execute(_FINISH, tenant_id, list(generations), list(generations.values()), end)
            return list(generations)

    async def verify(
        self, projection: Projection, tenant_id: int, on_progress: Callable[[int], None] = lambda _events: None
    ) -> Difference | None:
        """Return the first row that differs from a replay up to the checkpoint; `None` if all are equal.

        One snapshot of the database serves the whole comparison, so it needs no lock.

        Raises:
            PoisonEvent: The projection cannot apply an event before the checkpoint.
            DatabaseUnavailable: The database was lost.
        """
        async with (
            self._database.connection(REBUILD_TIMEOUT_SECONDS) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            position = await connection.fetchval(_SELECT_POSITION, tenant_id, projection.name) or 0
            async for chunk in replay(connection, [projection], tenant_id, position, CHUNK_EVENTS):
                difference = await compare(connection, projection.tables, tenant_id, chunk)
                if difference is not None:
                    return difference
                on_progress(chunk.events)
            return await compare_summaries(connection, projection.tables, tenant_id)


async def _replace(connection: Connection, tables: Sequence[Table], tenant_id: int, staged: StagedRows) -> None:
    """Replace the tenant's rows with the staged rows."""
    # Deletes the tenant's rows of all tables in one round trip.
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
            # Inserts the summary of the rows that were just written.
            await connection.execute(
                f"INSERT INTO {table.name} ({columns}) SELECT $1, summary.* FROM ({table.summary}) AS summary",
                tenant_id,
            )


async def _apply_tail(connection: Connection, group: Sequence[Projection], tenant_id: int, position: int) -> int:
    """Apply the events that were appended during the replay, under the checkpoints' locks; return the new position."""
    end = await store.read_head_position(connection, tenant_id)
    while position < end:
        until = min(position + TAIL_BATCH_EVENTS, end)
        for projection in group:
            try:
                events = await store.read_between(connection, tenant_id, position, until, projection.kinds)
                if events:
                    await apply(connection, projection, tenant_id, events)
            except UnknownEvent as error:
                raise PoisonEvent(projection.name, error.position or until, str(error)) from error
            except Exception as error:
                if is_transient(error):
                    raise
                # The next catch-up meets the same event and finds its exact position.
                cause = f"in events {position + 1} to {until}: {type(error).__name__}: {error}"
                raise PoisonEvent(projection.name, until, cause) from error
        position = until
    return end

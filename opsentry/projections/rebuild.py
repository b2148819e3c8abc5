"""Deriving read models anew, and comparing them with what the ledger gives, without anybody's noticing.

A tenant's rebuild is one transaction. It folds the ledger into temporary tables of the same names, which the very
same `apply` writes to because they come first in the search path, and takes no lock for that. Then it locks the
checkpoint, folds what came meanwhile, and brings the rows to what was folded. Readers see the old rows until it
commits; a process that is killed leaves nothing behind.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, cast

import asyncpg

from opsentry.events import log
from opsentry.postgres import Connection, Database, is_passing
from opsentry.projections.projection import Projection
from opsentry.projections.runner import Poison

_BATCH = 1000
_PATIENCE = 3600.0

# The columns of a table's primary key: they tell which row of one side is which of the other.
_KEY = """
SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_index i
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey)
WHERE i.indrelid = ('public.' || $1)::regclass AND i.indisprimary
"""

# Only one rebuild of a tenant's projection at a time; whoever comes second leaves it to the first.
_ALONE = "SELECT pg_try_advisory_xact_lock(hashtextextended('rebuild ' || $2, $1))"

_LOCK = "SELECT position FROM checkpoints WHERE tenant_id = $1 AND projection = $2 FOR NO KEY UPDATE"

_DONE = """
UPDATE checkpoints SET position = $3, parked_seq = NULL, error = NULL, generation = generation + 1,
    rebuilt_at = clock_timestamp()
WHERE tenant_id = $1 AND projection = $2
"""

# A rebuild of all tenants: begun once, however often it has to be taken up again.
_BEGIN = "INSERT INTO rebuilds (projection, started_at) VALUES ($1, clock_timestamp()) ON CONFLICT DO NOTHING"
_STARTED = "SELECT started_at FROM rebuilds WHERE projection = $1"
_END = "DELETE FROM rebuilds WHERE projection = $1"

# Tenants that a rebuild begun at $2 has still to do, and how many events each has.
_LEFT = """
SELECT c.tenant_id, h.seq AS events FROM checkpoints c JOIN heads h USING (tenant_id)
WHERE c.projection = $1 AND (c.rebuilt_at IS NULL OR c.rebuilt_at < $2) ORDER BY c.tenant_id
"""


class Difference(NamedTuple):
    """A row that is not what the ledger gives: `live` or `folded` is `None` where that side has none."""

    table: str
    live: str | None
    folded: str | None


class Rebuilder:
    """Derives rows anew, tenant by tenant."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, projection: str) -> list[asyncpg.Record]:
        """Begin, or go on with, a rebuild of all tenants; return `tenant_id` and `events` of those that are left."""
        async with self._database.connection(_PATIENCE) as connection:
            await connection.execute(_BEGIN, projection)
            started = await connection.fetchval(_STARTED, projection)
            return list(await connection.fetch(_LEFT, projection, started))

    async def end(self, projection: str) -> None:
        """Note that all tenants are done: the next rebuild begins anew."""
        async with self._database.connection() as connection:
            await connection.execute(_END, projection)

    async def rebuild(
        self, projection: Projection, tenant_id: int, advance: Callable[[int], None] = lambda _events: None
    ) -> bool:
        """Derive a tenant's rows anew; return `False` if somebody else does that just now.

        Args:
            projection: The projection.
            tenant_id: The tenant.
            advance: Called with the number of events that were folded.

        Raises:
            Poison: An event cannot be applied; the rows are as they were.
            DatabaseUnavailable: The database was lost; the rows are as they were.
        """
        async with self._database.connection(_PATIENCE) as connection, connection.transaction():
            if not await connection.fetchval(_ALONE, tenant_id, projection.name):
                return False
            async with _staged(connection, projection):
                position = await _fold(connection, projection, tenant_id, 0, None, advance)
                await connection.fetchval(_LOCK, tenant_id, projection.name)
                position = await _fold(connection, projection, tenant_id, position, None, advance)
            for table in projection.tables:
                await _swap(connection, table, tenant_id)
            await connection.execute(_DONE, tenant_id, projection.name, position)
        return True

    async def verify(self, projection: Projection, tenant_id: int) -> Difference | None:
        """Return the first row that differs from what the ledger gives up to the checkpoint, `None` if none does.

        Raises:
            Poison: An event before the checkpoint cannot be applied.
            DatabaseUnavailable: The database was lost.
        """
        async with self._database.connection(_PATIENCE) as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                async with _staged(connection, projection):
                    # The lock holds the rows still; what they show is folded up to there, and not further.
                    shown = await connection.fetchval(_LOCK, tenant_id, projection.name) or 0
                    await _fold(connection, projection, tenant_id, 0, shown, lambda _events: None)
                for table in projection.tables:
                    if (difference := await _difference(connection, table, tenant_id)) is not None:
                        return difference
                return None
            finally:
                await transaction.rollback()


@asynccontextmanager
async def _staged(connection: Connection, projection: Projection) -> AsyncIterator[None]:
    """Let the projection's tables be temporary ones, which end with the transaction."""
    for table in projection.tables:
        await connection.execute(f"CREATE TEMP TABLE {table} (LIKE public.{table} INCLUDING ALL) ON COMMIT DROP")
    await connection.execute("SET LOCAL search_path = pg_temp, public")
    yield
    await connection.execute("SET LOCAL search_path = public")


async def _fold(
    connection: Connection,
    projection: Projection,
    tenant_id: int,
    position: int,
    until: int | None,
    advance: Callable[[int], None],
) -> int:
    """Apply the events after `position`, up to `until` or to where the ledger ends; return the position reached."""
    while True:
        end = await log.head(connection, tenant_id) if until is None else until
        if position >= end:
            return position
        reached = min(position + _BATCH, end)
        try:
            await _apply(connection, projection, tenant_id, position, reached)
        except Exception as error:
            if is_passing(error):
                raise
            # One at a time, to name the one that is to blame.
            for seq in range(position + 1, reached + 1):
                try:
                    await _apply(connection, projection, tenant_id, seq - 1, seq)
                except Exception as blamed:
                    if is_passing(blamed):
                        raise
                    raise Poison(projection.name, seq, f"{type(blamed).__name__}: {blamed}") from blamed
        advance(reached - position)
        position = reached


async def _apply(connection: Connection, projection: Projection, tenant_id: int, after: int, until: int) -> None:
    async with connection.transaction():  # inside of another one, a savepoint
        if events := await log.read_between(connection, tenant_id, after, until, projection.kinds):
            await projection.apply(connection, tenant_id, events)


async def _swap(connection: Connection, table: str, tenant_id: int) -> None:
    """Bring a tenant's rows to what was folded, writing only those that differ."""
    await connection.execute(f"ANALYZE pg_temp.{table}")
    same = await _same_key(connection, table)
    await connection.execute(
        f"DELETE FROM public.{table} l WHERE l.tenant_id = $1 AND NOT EXISTS ("
        f" SELECT FROM pg_temp.{table} f WHERE {same} AND f::text = l::text)",
        tenant_id,
    )
    await connection.execute(
        f"INSERT INTO public.{table} SELECT * FROM pg_temp.{table} f WHERE NOT EXISTS ("
        f" SELECT FROM public.{table} l WHERE {same} AND l.tenant_id = $1)",
        tenant_id,
    )


async def _difference(connection: Connection, table: str, tenant_id: int) -> Difference | None:
    same = await _same_key(connection, table)
    row = await connection.fetchrow(
        f"SELECT l::text AS live, f::text AS folded FROM (SELECT * FROM public.{table} WHERE tenant_id = $1) l"
        f" FULL JOIN pg_temp.{table} f ON {same} WHERE l::text IS DISTINCT FROM f::text LIMIT 1",
        tenant_id,
    )
    return None if row is None else Difference(table, row["live"], row["folded"])


async def _same_key(connection: Connection, table: str) -> str:
    columns = cast("Sequence[str]", await connection.fetchval(_KEY, table))
    return " AND ".join(f"l.{column} = f.{column}" for column in columns)

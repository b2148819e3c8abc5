"""Operate projections: register, report progress, list and retry halted ones, pause and resume."""

from collections.abc import Sequence

import asyncpg

from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Projection

# Inserts new projections and raises older versions. A raised version raises the generation too, and a checkpoint with a
# lower generation than its projection is rebuilt.
_REGISTER = """
INSERT INTO projections (name, version) SELECT * FROM unnest($1::text[], $2::int[])
ON CONFLICT (name) DO UPDATE SET version = excluded.version, generation = projections.generation + 1
WHERE projections.version < excluded.version
RETURNING name, generation
"""

# Inserts checkpoints of a new projection for all ledgers that have events, marked for a rebuild.
_ENSURE_CHECKPOINTS = """
INSERT INTO checkpoints (tenant_id, projection, generation)
SELECT tenant_id, $1, -1 FROM ledger_heads WHERE position > 0 ON CONFLICT DO NOTHING
"""

# Selects the progress of each projection over all tenants that have events.
_STATUS = """
SELECT p.name AS projection, coalesce(k.version, p.version) AS version, coalesce(k.generation, 0) AS generation,
    coalesce(k.paused, false) AS paused, of_all.*
FROM unnest($1::text[], $2::int[]) WITH ORDINALITY AS p (name, version, ordinal)
LEFT JOIN projections k ON k.name = p.name
CROSS JOIN LATERAL (
    SELECT count(*) AS tenants,
        count(*) FILTER (WHERE c.position >= h.position AND c.halted_at IS NULL) AS up_to_date,
        count(*) FILTER (WHERE coalesce(c.position, 0) < h.position AND c.halted_at IS NULL) AS lagging,
        count(*) FILTER (WHERE c.halted_at IS NOT NULL) AS halted,
        count(*) FILTER (WHERE coalesce(c.generation, 0) < k.generation OR c.generation < 0) AS to_rebuild,
        count(*) FILTER (WHERE c.rebuild_error IS NOT NULL) AS rebuild_failed,
        coalesce(sum(h.position - coalesce(c.position, 0)), 0)::bigint AS lag_events,
        coalesce(max(extract(epoch FROM clock_timestamp() - e.recorded_at)), 0)::float8 AS lag_seconds,
        max(c.rebuilt_at) AS rebuilt_at
    FROM ledger_heads h LEFT JOIN checkpoints c ON c.tenant_id = h.tenant_id AND c.projection = p.name
    LEFT JOIN LATERAL (
        SELECT recorded_at FROM events WHERE tenant_id = h.tenant_id AND position > coalesce(c.position, 0)
        ORDER BY position LIMIT 1) AS e ON coalesce(c.position, 0) < h.position
    WHERE h.position > 0) AS of_all
ORDER BY p.ordinal
"""

# Selects the projections of all tenants that an event halted, in catching up or in a rebuild.
_SELECT_HALTED = """
SELECT t.slug, c.tenant_id, c.projection, halts.*
FROM checkpoints c JOIN tenants t USING (tenant_id) CROSS JOIN LATERAL (
    VALUES ('catch_up', c.halted_at, c.halt_error), ('rebuild', c.rebuild_halted_at, c.rebuild_error)
) AS halts (phase, position, error)
WHERE (c.halted_at IS NOT NULL OR c.rebuild_error IS NOT NULL) AND halts.error IS NOT NULL
ORDER BY t.slug, c.projection, halts.phase LIMIT $1
"""

# Clears the halts of all tenants or of one, and adds these tenants to the projection backlog for the workers.
_RETRY_HALTED = """
WITH retried AS (
    UPDATE checkpoints SET halted_at = NULL, halt_error = NULL, rebuild_halted_at = NULL, rebuild_error = NULL
    WHERE (halted_at IS NOT NULL OR rebuild_error IS NOT NULL) AND projection = ANY($1)
        AND ($2::bigint IS NULL OR tenant_id = $2)
    RETURNING tenant_id, projection),
enqueued AS (
    INSERT INTO projection_backlog
    SELECT tenant_id, position FROM ledger_heads WHERE tenant_id IN (SELECT tenant_id FROM retried)
    ON CONFLICT DO NOTHING)
SELECT tenant_id, projection FROM retried
"""

# Pauses projections for all tenants.
_PAUSE = "UPDATE projections SET paused = true WHERE name = ANY($1) AND NOT paused RETURNING name"

# Resumes projections for all tenants.
_RESUME = "UPDATE projections SET paused = false WHERE name = ANY($1) AND paused RETURNING name"

# Adds each tenant to the projection backlog that has a lagging projection which is neither halted nor paused.
_ENQUEUE_LAGGING = """
INSERT INTO projection_backlog SELECT DISTINCT h.tenant_id, h.position FROM ledger_heads h
JOIN checkpoints c ON c.tenant_id = h.tenant_id AND c.position < h.position AND c.halted_at IS NULL
LEFT JOIN projections p ON p.name = c.projection
WHERE NOT coalesce(p.paused, false) ON CONFLICT DO NOTHING
"""

# Clears failed rebuilds: newer code may apply the event that halted older code.
_CLEAR_REBUILD_FAILURES = """
UPDATE checkpoints SET rebuild_halted_at = NULL, rebuild_error = NULL
WHERE projection = ANY($1) AND rebuild_error IS NOT NULL
"""


async def register(connection: Connection, projections: Sequence[Projection]) -> list[str]:
    """Register `projections` with the versions of this code; return those whose rows must be rebuilt.

    These are new projections, if ledgers exist already, and projections whose version was raised. The worker rebuilds
    them.
    """
    names = [projection.name for projection in projections]
    to_rebuild = []
    async with connection.transaction():
        raised = await connection.fetch(_REGISTER, names, [projection.version for projection in projections])
        await connection.execute(_CLEAR_REBUILD_FAILURES, [row["name"] for row in raised])
        for row in raised:
            inserted = await connection.execute(_ENSURE_CHECKPOINTS, row["name"])
            if row["generation"] > 0 or inserted != "INSERT 0 0":
                to_rebuild.append(row["name"])
    return to_rebuild


async def projection_status(connection: Connection, projections: Sequence[Projection]) -> list[asyncpg.Record]:
    """Return the progress of each projection over all tenants.

    Each row has the number of `tenants`, and of those `up_to_date`, `lagging`, `halted`, `to_rebuild` and
    `rebuild_failed`. `lag_events` is the sum over the tenants; `lag_seconds` is the age of the oldest missing event.
    """
    names = [projection.name for projection in projections]
    return list(await connection.fetch(_STATUS, names, [projection.version for projection in projections]))


async def list_halted(connection: Connection, limit: int | None = None) -> list[asyncpg.Record]:
    """Return halted projections: `slug`, `tenant_id`, `projection`, `phase`, `position` and `error`.

    Args:
        connection: The database.
        limit: The number of rows at most; all if `None`.

    Returns:
        Rows whose `phase` is `catch_up`, or `rebuild`: then the rows from before the rebuild are still served.
    """
    return list(await connection.fetch(_SELECT_HALTED, limit))


async def retry_halted(
    connection: Connection, names: Sequence[str], tenant_id: int | None = None
) -> list[asyncpg.Record]:
    """Let halted projections continue where they halted; return the `tenant_id` and `projection` of each.

    Args:
        connection: The database.
        names: The projections.
        tenant_id: One tenant; all if `None`.
    """
    return list(await connection.fetch(_RETRY_HALTED, list(names), tenant_id))


async def pause(connection: Connection, names: Sequence[str]) -> list[str]:
    """Pause these projections for all tenants; return those that were not paused."""
    return [row["name"] for row in await connection.fetch(_PAUSE, list(names))]


async def resume(connection: Connection, names: Sequence[str]) -> list[str]:
    """Resume these projections for all tenants; return those that were paused. Call it outside of a transaction.

    A catch-up that began while they were paused may remove a tenant from the backlog. Lagging tenants are therefore
    added after the resume is committed, so that none is missed.
    """
    resumed = [row["name"] for row in await connection.fetch(_RESUME, list(names))]
    await enqueue_lagging_tenants(connection)
    return resumed


async def enqueue_lagging_tenants(connection: Connection) -> None:
    """Add tenants with lagging projections to the projection backlog, as an append does.

    The cost grows with the number of all tenants.
    """
    await connection.execute(_ENQUEUE_LAGGING)

"""What operators see of the projections, and do to them: how they stand, what is halted, going on, pausing."""

from collections.abc import Sequence

import asyncpg

from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Projection

# Makes projections known by name and version. A version that was raised since, in the code, makes their rows be derived
# anew: it raises the generation that all tenants' rows must have.
_REGISTER = """
INSERT INTO projections (name, version) SELECT * FROM unnest($1::text[], $2::int[])
ON CONFLICT (name) DO UPDATE SET version = excluded.version, generation = projections.generation + 1
WHERE projections.version < excluded.version
RETURNING name, generation
"""

# One that is new where there are ledgers already has everything to be derived.
_ENSURE = """
INSERT INTO checkpoints (tenant_id, projection, generation)
SELECT tenant_id, $1, -1 FROM ledger_heads WHERE position > 0 ON CONFLICT DO NOTHING
"""

# How each projection stands over all tenants that have a ledger.
_STANDING = """
SELECT p.name AS projection, coalesce(k.version, p.version) AS version, coalesce(k.generation, 0) AS generation,
    coalesce(k.paused, false) AS paused, of_all.*
FROM unnest($1::text[], $2::int[]) WITH ORDINALITY AS p (name, version, place)
LEFT JOIN projections k ON k.name = p.name
CROSS JOIN LATERAL (
    SELECT count(*) AS tenants,
        count(*) FILTER (WHERE c.position >= h.position AND c.halted_at IS NULL) AS done,
        count(*) FILTER (WHERE coalesce(c.position, 0) < h.position AND c.halted_at IS NULL) AS behind,
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
ORDER BY p.place
"""

# What stands still at an event that it cannot apply, of all tenants: in catching up, or in a rebuild.
_HALTED = """
SELECT t.slug, c.tenant_id, c.projection, stopped.*
FROM checkpoints c JOIN tenants t USING (tenant_id) CROSS JOIN LATERAL (
    VALUES ('catching up', c.halted_at, c.error), ('rebuilding', c.rebuild_halted_at, c.rebuild_error)
) AS stopped (at, position, error)
WHERE (c.halted_at IS NOT NULL OR c.rebuild_error IS NOT NULL) AND stopped.error IS NOT NULL
ORDER BY t.slug, c.projection, stopped.at LIMIT $1
"""

# Lets what is halted go on from where it stopped, of all tenants or of one.
_RELEASE = """
WITH released AS (
    UPDATE checkpoints SET halted_at = NULL, error = NULL, rebuild_halted_at = NULL, rebuild_error = NULL
    WHERE (halted_at IS NOT NULL OR rebuild_error IS NOT NULL) AND projection = ANY($1)
        AND ($2::bigint IS NULL OR tenant_id = $2)
    RETURNING tenant_id, projection),
noted AS (
    INSERT INTO projection_backlog SELECT tenant_id, position FROM ledger_heads WHERE tenant_id IN (SELECT tenant_id
    FROM released)
    ON CONFLICT DO NOTHING)
SELECT tenant_id, projection FROM released
"""

_PAUSE = "UPDATE projections SET paused = true WHERE name = ANY($1) AND NOT paused RETURNING name"

_RESUME = "UPDATE projections SET paused = false WHERE name = ANY($1) AND paused RETURNING name"

# Notes all tenants of which a projection lags that does not stand still.
_NOTE = """
INSERT INTO projection_backlog SELECT DISTINCT h.tenant_id, h.position FROM ledger_heads h
JOIN checkpoints c ON c.tenant_id = h.tenant_id AND c.position < h.position AND c.halted_at IS NULL
LEFT JOIN projections p ON p.name = c.projection
WHERE NOT coalesce(p.paused, false) ON CONFLICT DO NOTHING
"""

# What a rebuild by older code could not do may well be what the newer one was made for.
_TRY_AGAIN = """
UPDATE checkpoints SET rebuild_halted_at = NULL, rebuild_error = NULL WHERE projection = ANY($1) AND
rebuild_error IS NOT NULL
"""


async def register(connection: Connection, projections: Sequence[Projection]) -> list[str]:
    """Make `projections` known as this code has them; return those whose rows are now to be derived anew.

    That is for the tenants that have a ledger, where one is new or its version was raised; whoever rebuilds next does
    it.
    """
    names = [projection.name for projection in projections]
    to_do = []
    async with connection.transaction():
        raised = await connection.fetch(_REGISTER, names, [projection.version for projection in projections])
        await connection.execute(_TRY_AGAIN, [row["name"] for row in raised])
        for row in raised:
            missing = await connection.execute(_ENSURE, row["name"])
            if row["generation"] > 0 or missing != "INSERT 0 0":
                to_do.append(row["name"])
    return to_do


async def projection_status(connection: Connection, projections: Sequence[Projection]) -> list[asyncpg.Record]:
    """Return for each projection how many `tenants` are `done`, `behind` and `halted`, and the lag of all.

    `lag_events` is a sum, `lag_seconds` the age of the oldest event that is missing, `to_rebuild` the number of tenants
    whose rows are still to be derived anew, `rebuild_failed` of those where that stopped at an event.
    """
    names = [projection.name for projection in projections]
    return list(await connection.fetch(_STANDING, names, [projection.version for projection in projections]))


async def halted(connection: Connection, limit: int | None = None) -> list[asyncpg.Record]:
    """Return at most `limit` of `slug`, `tenant_id`, `projection`, `at`, `position` and `error` of halts.

    `at` is `catching up`, or `rebuilding`: then the rows go on as they were.
    """
    return list(await connection.fetch(_HALTED, limit))


async def retry_halted(
    connection: Connection, names: Sequence[str], tenant_id: int | None = None
) -> list[asyncpg.Record]:
    """Let what is halted go on from where it stopped, of all tenants or of one; return `tenant_id` and `projection`."""
    return list(await connection.fetch(_RELEASE, list(names), tenant_id))


async def pause(connection: Connection, names: Sequence[str]) -> list[str]:
    """Let these projections stand still for all tenants; return those that did not yet."""
    return [row["name"] for row in await connection.fetch(_PAUSE, list(names))]


async def resume(connection: Connection, names: Sequence[str]) -> list[str]:
    """Let these projections go on; return those that stood still. Not to be called in a transaction.

    Passes that begin from now on see that they go on; what passes did before that, not caring for them, is noted after
    it, so that none of it is missed.
    """
    resumed = [row["name"] for row in await connection.fetch(_RESUME, list(names))]
    await note_who_lags(connection)
    return resumed


async def note_who_lags(connection: Connection) -> None:
    """Note all tenants of which a projection lags, as an append does: as much work as there are tenants."""
    await connection.execute(_NOTE)

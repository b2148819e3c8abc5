"""What operators do with the outbox and see of it, and what readiness asks."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from opsentry.infrastructure.postgres import Connection, Database
from opsentry.notifications.delivery import ordering
from opsentry.notifications.delivery.ordering import IS_ON, PROBE_AFTER

# Counting stops here: more makes no difference to whoever looks.
_MANY = 10_000

_PAUSED = "EXISTS (SELECT FROM outbox_paused p WHERE p.tenant_id = 0 OR p.tenant_id = {tenant})"

# What readiness asks, of all tenants. Due is what somebody should be sending just now: deliveries whose time has come
# at endpoints whose time has come, and intents that no sender has taken over. How long it has waited is told by the
# endpoint, which moves to the end of the line whenever a sender has been there; where one died there, by the delivery.
# What waits for a retry, for a probe or for an operator is counted beside it. Each part goes by a small index and stops
# where the answer no longer changes, so it costs the same however many tenants there are and however long they have
# been sent to. Unseen is what the outbox projection has not seen, be it behind, parked or paused: only tenants are
# looked at with events that some projection has not seen. LIMIT keeps tables from being joined by scans of all of them.
_BACKLOG = f"""
WITH RECURSIVE channels AS (
    (SELECT channel FROM endpoints WHERE due_at IS NOT NULL ORDER BY channel LIMIT 1)
    UNION ALL
    SELECT next.channel FROM channels CROSS JOIN LATERAL (
        SELECT channel FROM endpoints WHERE channel > channels.channel AND due_at IS NOT NULL
        ORDER BY channel LIMIT 1) AS next),
due AS (
    SELECT CASE WHEN e.lease IS NULL THEN greatest(e.due_at, d.due_at) ELSE d.due_at END AS since
    FROM channels CROSS JOIN LATERAL (
        SELECT * FROM endpoints WHERE channel = channels.channel AND due_at <= statement_timestamp()
        ORDER BY due_at OFFSET 0) AS e
    CROSS JOIN LATERAL (
        SELECT due_at FROM deliveries
        WHERE tenant_id = e.tenant_id AND subscription_id = e.subscription_id AND due_at <= statement_timestamp()
        ORDER BY due_at LIMIT $1) AS d
    WHERE {IS_ON.format(tenant="e.tenant_id")}
    LIMIT $1),
untaken AS (
    SELECT i.created_at AS since FROM (SELECT DISTINCT tenant_id FROM outbox_fresh) AS f
    CROSS JOIN LATERAL (
        SELECT created_at FROM outbox_intents
        WHERE tenant_id = f.tenant_id AND NOT suppressed AND position > coalesce((
            SELECT position FROM outbox_settled s WHERE s.tenant_id = f.tenant_id LIMIT 1), 0)
        ORDER BY position LIMIT $1) AS i
    WHERE {IS_ON.format(tenant="f.tenant_id")}
    LIMIT $1),
pending AS (SELECT since FROM due UNION ALL SELECT since FROM untaken)
SELECT
    (SELECT count(*) FROM pending) AS pending,
    (SELECT count(*) FROM due) AS due,
    (SELECT extract(epoch FROM clock_timestamp() - min(since)) FROM pending)::float8 AS pending_seconds,
    (SELECT count(*) FROM (SELECT FROM deliveries WHERE settled_at IS NULL LIMIT {_MANY}) AS w) AS waiting,
    (SELECT count(*) FROM (SELECT FROM deliveries WHERE state = 'parked' LIMIT {_MANY}) AS k) AS parked_deliveries,
    EXISTS (SELECT FROM outbox_paused) AS paused,
    coalesce(lag.events, 0)::bigint AS unseen,
    extract(epoch FROM clock_timestamp() - lag.since)::float8 AS unseen_seconds,
    lag.halted
FROM (
    SELECT sum(h.position - coalesce(c.position, 0)) AS events, min(e.recorded_at) AS since,
        count(*) FILTER (WHERE c.halted_at IS NOT NULL) AS halted
    FROM (
        SELECT tenant_id FROM projection_backlog
        UNION SELECT tenant_id FROM checkpoints WHERE projection = 'outbox' AND halted_at IS NOT NULL
        UNION SELECT c.tenant_id FROM projections p CROSS JOIN LATERAL (
            SELECT tenant_id FROM checkpoints WHERE projection = p.name OFFSET 0) AS c
            WHERE p.name = 'outbox' AND p.paused) AS t
    CROSS JOIN LATERAL (SELECT position FROM ledger_heads WHERE tenant_id = t.tenant_id LIMIT 1) AS h
    LEFT JOIN LATERAL (
        SELECT position, halted_at FROM checkpoints
        WHERE tenant_id = t.tenant_id AND projection = 'outbox' LIMIT 1) AS c ON true
    CROSS JOIN LATERAL (
        SELECT recorded_at FROM events WHERE tenant_id = t.tenant_id AND position > coalesce(c.position, 0)
        ORDER BY position LIMIT 1) AS e
    WHERE h.position > coalesce(c.position, 0)
) AS lag
"""

# How sending stands, for each tenant that anything waits for, or is parked, or where sending is paused.
_STATUS = f"""
SELECT coalesce(t.slug, '(all tenants)') AS slug, w.*, {_PAUSED.format(tenant="f.tenant_id")} AS paused,
    (SELECT count(*) FROM outbox_intents i WHERE i.tenant_id = f.tenant_id AND NOT i.suppressed AND i.position
    > coalesce((
        SELECT position FROM outbox_settled s WHERE s.tenant_id = f.tenant_id), 0)) AS untaken,
    (SELECT count(*) FROM deliveries d WHERE d.tenant_id = f.tenant_id AND d.state = 'parked') AS parked,
    (SELECT count(*) FROM endpoints e WHERE e.tenant_id = f.tenant_id AND e.lease IS NOT NULL
        AND e.due_at > statement_timestamp()) AS leased,
    (SELECT count(*) FROM endpoints e WHERE e.tenant_id = f.tenant_id AND e.failures > 0) AS failing,
    (SELECT count(*) FROM endpoints e WHERE e.tenant_id = f.tenant_id AND e.failures >= {PROBE_AFTER}) AS probed,
    (SELECT position FROM outbox_settled s WHERE s.tenant_id = f.tenant_id) AS settled
FROM (
    SELECT tenant_id FROM deliveries WHERE settled_at IS NULL OR state = 'parked'
    UNION SELECT tenant_id FROM outbox_fresh
    UNION SELECT tenant_id FROM outbox_paused) AS f
LEFT JOIN tenants t ON t.tenant_id = f.tenant_id
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE d.due_at <= statement_timestamp() AND e.due_at <= statement_timestamp()) AS due,
        count(*) FILTER (WHERE (d.due_at <= statement_timestamp() AND e.due_at <= statement_timestamp()) IS NOT TRUE)
            AS waiting,
        extract(epoch FROM statement_timestamp() - min(greatest(d.due_at, e.due_at)) FILTER (
            WHERE d.due_at <= statement_timestamp() AND e.due_at <= statement_timestamp()))::float8
            AS oldest_due_seconds,
        min(greatest(d.due_at, e.due_at)) FILTER (WHERE greatest(d.due_at, e.due_at) > statement_timestamp())
            AS next_attempt_at
    FROM deliveries d LEFT JOIN endpoints e USING (tenant_id, subscription_id)
    WHERE d.tenant_id = f.tenant_id AND d.settled_at IS NULL) AS w
WHERE $1::bigint IS NULL OR f.tenant_id IN ($1, 0)
ORDER BY t.slug LIMIT $2
"""

_LIST = """
SELECT t.slug, 'msg_' || replace(d.intent_id::text, '-', '') AS id, d.subscription_id, d.channel, d.topic,
    d.stream_kind, d.stream_id, d.position, d.state, d.tried, d.due_at, d.answer, d.error, d.created_at
FROM deliveries d JOIN tenants t ON t.tenant_id = d.tenant_id
WHERE ($1::bigint IS NULL OR d.tenant_id = $1) AND ($2::bigint IS NULL OR d.subscription_id = $2)
    AND ($3::text[] IS NULL OR d.state = ANY($3))
ORDER BY d.created_at DESC, d.tenant_id, d.intent_id LIMIT $4
"""

# Which deliveries are meant: those with these ids, or all of a tenant, a subscription, in these states; what ended
# because its subscription is off only once that is on again. Some at a time, those behind ($5, $6).
_CHOSEN = """
SELECT tenant_id, intent_id, subscription_id, stream_kind, stream_id FROM deliveries d
WHERE state = ANY($1) AND ($2::uuid[] IS NULL OR intent_id = ANY($2)) AND ($3::bigint IS NULL OR tenant_id = $3)
    AND ($4::bigint IS NULL OR subscription_id = $4) AND (tenant_id, intent_id) > ($5, $6)
    AND (state <> 'disabled' OR EXISTS (
        SELECT FROM subscriptions s WHERE s.tenant_id = d.tenant_id AND s.subscription_id = d.subscription_id
            AND s.status = 'active'))
ORDER BY tenant_id, intent_id LIMIT $7
"""

# Begins another round of attempts; waking its lane makes it due, unless it is behind an older one.
_RETRY = """
UPDATE deliveries d SET state = 'waiting', attempts = 0, settled_at = NULL, due_at = NULL
FROM unnest($1::bigint[], $2::uuid[]) AS row (tenant_id, intent_id)
WHERE d.tenant_id = row.tenant_id AND d.intent_id = row.intent_id AND d.state = ANY($3)
"""

_DROP = """
UPDATE deliveries d SET state = 'dropped', due_at = NULL, settled_at = statement_timestamp(),
    error = coalesce(d.error, 'dropped by an operator')
FROM unnest($1::bigint[], $2::uuid[]) AS row (tenant_id, intent_id)
WHERE d.tenant_id = row.tenant_id AND d.intent_id = row.intent_id AND d.state = ANY($3)
"""

_PAUSE = "INSERT INTO outbox_paused (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
_RESUME = "DELETE FROM outbox_paused WHERE tenant_id = $1"
_STILL = """
SELECT coalesce(t.slug, '(all tenants)') AS slug FROM outbox_paused p LEFT JOIN tenants t ON t.tenant_id = p.tenant_id
ORDER BY p.tenant_id
"""

_AT_ONCE = 500

RETRIED = ("parked", "dropped", "disabled", "withheld", "waiting")
DROPPED = ("waiting", "parked")
ALL_TENANTS = 0


async def backlog(connection: Connection, at_most: int) -> asyncpg.Record:
    """Return how much of all tenants waits to be told; in the caller's transaction.

    `pending` intents that are due (counted up to `at_most`) and the age of the oldest, how many of them are `due` in
    the ledger of deliveries, all that are `waiting` there, due or not, `parked_deliveries`, whether sending is `paused`
    somewhere, `unseen` events and the age of the oldest, and in how many tenants the outbox projection is `parked`;
    ages are in seconds, NULL where nothing waits.
    """
    await ordering.begin(connection)
    return await connection.fetchrow(_BACKLOG, at_most)


async def status(
    connection: Connection, tenant_id: int | None = None, *, limit: int | None = None
) -> Sequence[asyncpg.Record]:
    """Return how sending stands, a row for each tenant that anything is to be said of, at most `limit`.

    `due` and `waiting` deliveries, the age of the oldest due in seconds, when the next is tried, intents that are
    `untaken`, `parked` deliveries, endpoints that are `leased` by a sender, `failing` or only `probed`, whether it is
    `paused`, and up to which position it is `settled` what is sent.
    """
    return list(await connection.fetch(_STATUS, tenant_id, limit))


async def listing(
    connection: Connection,
    tenant_id: int | None,
    *,
    subscription_id: int | None = None,
    states: Sequence[str] | None = None,
    limit: int = 50,
) -> Sequence[asyncpg.Record]:
    """Return deliveries, the newest first."""
    return list(await connection.fetch(_LIST, tenant_id, subscription_id, states, limit))


class Chosen(NamedTuple):
    """Which deliveries are meant: those with these `ids`, or all of a tenant, of a subscription, in these states."""

    states: Sequence[str]
    ids: Sequence[UUID] | None = None
    tenant_id: int | None = None
    subscription_id: int | None = None


async def retry(database: Database, chosen: Chosen, *, seconds: float) -> int:
    """Have deliveries be tried again, now, with all attempts anew; return how many."""
    return await _move_all(database, _RETRY, chosen, seconds)


async def drop(database: Database, chosen: Chosen, *, seconds: float) -> int:
    """Give deliveries up; what is behind them follows. Return how many."""
    return await _move_all(database, _DROP, chosen, seconds)


async def _move_all(database: Database, change: str, chosen: Chosen, seconds: float) -> int:
    """Move some at a time, each in a transaction of at most `seconds`: nobody waits long for their endpoints."""
    total = 0
    last: tuple[int, UUID] | None = (0, UUID(int=0))
    while last is not None:
        async with database.transaction(seconds) as connection:
            moved, last = await _move(connection, change, chosen, last)
        total += moved
    return total


async def _move(
    connection: Connection, change: str, chosen: Chosen, after: tuple[int, UUID]
) -> tuple[int, tuple[int, UUID] | None]:
    rows = await connection.fetch(
        _CHOSEN, list(chosen.states), chosen.ids, chosen.tenant_id, chosen.subscription_id, *after, _AT_ONCE
    )
    if not rows:
        return 0, None
    await ordering.begin(connection)
    await ordering.lock(connection, ((row["tenant_id"], row["subscription_id"]) for row in rows))
    moved: str = await connection.execute(
        change, [row["tenant_id"] for row in rows], [row["intent_id"] for row in rows], list(chosen.states)
    )
    moved_in = {(row["tenant_id"], row["subscription_id"], row["stream_kind"], row["stream_id"]) for row in rows}
    await ordering.again(connection, moved_in)
    return int(moved.rpartition(" ")[2]), (rows[-1]["tenant_id"], rows[-1]["intent_id"])


async def pause(connection: Connection, tenant_id: int) -> bool:
    """Send nothing more to a tenant's subscriptions, or with `ALL_TENANTS` to any; return whether that is new."""
    done: Any = await connection.execute(_PAUSE, tenant_id)
    return str(done).endswith(" 1")


async def resume(connection: Connection, tenant_id: int) -> bool:
    """Send again; return whether it was paused."""
    done: Any = await connection.execute(_RESUME, tenant_id)
    return str(done).endswith(" 1")


async def paused(connection: Connection) -> list[str]:
    """Return for whom sending is paused: slugs, and `(all tenants)`."""
    return [row["slug"] for row in await connection.fetch(_STILL)]

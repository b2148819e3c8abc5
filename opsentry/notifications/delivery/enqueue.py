"""Intake: intents become deliveries, the ledger of what came of each. Facts, which no rebuild touches.

Intents are taken over in the order of the tenant's ledger, up to a position that only rises: so each is taken over
once, whatever is derived again later, and one that a changed rule gives for an event before that position never is.
"""

from collections.abc import Sequence

from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery import ordering
from opsentry.notifications.delivery.ordering import columns

# Tenants with intents beyond what is settled, each found by the index, as `_BEHIND` of the runner does it.
_FRESH = """
WITH RECURSIVE found AS (
    (SELECT tenant_id, 1 AS number FROM outbox_fresh WHERE tenant_id > $1 ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT next.tenant_id, number + 1 FROM found CROSS JOIN LATERAL (
        SELECT tenant_id FROM outbox_fresh WHERE tenant_id > found.tenant_id ORDER BY tenant_id LIMIT 1) AS next
    WHERE number < $2)
SELECT tenant_id FROM found
"""

_MAKE_SETTLED = "INSERT INTO outbox_settled (tenant_id, position) SELECT unnest($1::bigint[]), 0 ON CONFLICT DO NOTHING"

# What another sender is at is passed over.
_TAKE_SETTLED = """
SELECT tenant_id FROM outbox_settled WHERE tenant_id = ANY($1) ORDER BY tenant_id FOR UPDATE SKIP LOCKED
"""

# Takes over at most $2 intents of each tenant, in one statement, so that intents and the position that they reach are
# of one moment. An event that very many are told of is taken over in parts; the position gets there with the last one.
_TAKE_OVER = """
WITH span AS MATERIALIZED (
    SELECT s.tenant_id, s.position AS since, c.position AS until
    FROM unnest($1::bigint[]) AS mine (tenant_id)
    CROSS JOIN LATERAL (SELECT * FROM outbox_settled WHERE tenant_id = mine.tenant_id LIMIT 1) AS s
    CROSS JOIN LATERAL (
        SELECT position FROM checkpoints WHERE tenant_id = mine.tenant_id AND projection = 'outbox' LIMIT 1) AS c),
fresh AS MATERIALIZED (
    SELECT i.*, row_number() OVER (PARTITION BY span.tenant_id ORDER BY i.position) AS number
    FROM span CROSS JOIN LATERAL (
        SELECT * FROM outbox_intents o
        WHERE tenant_id = span.tenant_id AND position > span.since AND position <= span.until AND NOT EXISTS (
            SELECT FROM deliveries d WHERE d.tenant_id = span.tenant_id AND d.intent_id = o.intent_id)
        ORDER BY position LIMIT $2 + 1) AS i),
taken AS (
    INSERT INTO deliveries (tenant_id, intent_id, subscription_id, stream_kind, stream_id, position, channel, topic,
        created_at, state, settled_at)
    SELECT tenant_id, intent_id, subscription_id, stream_kind, stream_id, position, channel, topic, created_at,
        CASE WHEN suppressed THEN 'suppressed' ELSE 'waiting' END, CASE WHEN suppressed THEN statement_timestamp() END
    FROM fresh WHERE number <= $2
    RETURNING tenant_id, subscription_id, stream_kind, stream_id, channel, state),
reached AS (
    SELECT span.tenant_id, coalesce(
        (SELECT position - 1 FROM fresh WHERE fresh.tenant_id = span.tenant_id AND number > $2), span.until) AS position
    FROM span),
settled AS (
    UPDATE outbox_settled s SET position = greatest(s.position, reached.position) FROM reached
    WHERE s.tenant_id = reached.tenant_id),
noted AS (
    DELETE FROM outbox_fresh f USING reached WHERE f.tenant_id = reached.tenant_id AND f.position <= reached.position)
SELECT DISTINCT tenant_id, subscription_id, stream_kind, stream_id, channel, state = 'waiting' AS waiting FROM taken
"""

_MAKE_ENDPOINTS = """
INSERT INTO endpoints (tenant_id, subscription_id, channel)
SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[], $3::text[]) ON CONFLICT DO NOTHING
"""

# Ends of long ago, and what was tried for them. All lie behind the position up to which it is settled what is sent, so
# that they are gone makes nothing be sent again. What another message tells is kept as long as that.
_PRUNE = """
WITH old AS (
    SELECT d.tenant_id, d.intent_id FROM deliveries d
    WHERE d.settled_at < statement_timestamp() - $1 * interval '1 day'
        AND d.position <= (SELECT s.position FROM outbox_settled s WHERE s.tenant_id = d.tenant_id LIMIT 1)
        AND (d.leader IS NULL OR NOT EXISTS (
            SELECT FROM deliveries l WHERE l.tenant_id = d.tenant_id AND l.intent_id = d.leader))
    ORDER BY d.settled_at LIMIT $2 FOR UPDATE SKIP LOCKED),
attempts AS (
    DELETE FROM delivery_attempts a USING old WHERE a.tenant_id = old.tenant_id AND a.intent_id = old.intent_id),
gone AS (
    DELETE FROM deliveries d USING old WHERE d.tenant_id = old.tenant_id AND d.intent_id = old.intent_id
    RETURNING 1)
SELECT count(*) FROM gone
"""


async def tenants_with_backlog(connection: Connection, after: int, limit: int) -> list[int]:
    """Return tenants, at most `limit`, whose ids are above `after`, with intents that were not taken over; in order."""
    return [row["tenant_id"] for row in await connection.fetch(_FRESH, after, limit)]


async def enqueue_intents(
    connection: Connection, tenant_ids: Sequence[int], burst: float, at_most: int = 10_000
) -> int:
    """Take tenants' intents over, in the caller's transaction; return how many lanes that gave something new.

    Args:
        connection: Inside a transaction.
        tenant_ids: The tenants, at least one; those that another sender is at are passed over.
        burst: For so many seconds after the first change of a thing its message waits for more.
        at_most: So many intents, or one of each tenant, the others later.
    """
    await ordering.begin(connection)
    await connection.execute(_MAKE_SETTLED, tenant_ids)
    mine = [row["tenant_id"] for row in await connection.fetch(_TAKE_SETTLED, tenant_ids)]
    rows = await connection.fetch(_TAKE_OVER, mine, max(1, at_most // len(tenant_ids)))
    if rows:
        endpoints = columns((row["tenant_id"], row["subscription_id"], row["channel"]) for row in rows)
        await connection.execute(_MAKE_ENDPOINTS, *endpoints)
    found = [
        (row["tenant_id"], row["subscription_id"], row["stream_kind"], row["stream_id"])
        for row in rows
        if row["waiting"]
    ]
    await ordering.lock(connection, (lane[:2] for lane in found))
    await ordering.wake(connection, found, burst)
    return len(found)


async def prune_deliveries(connection: Connection, days: float, at_most: int) -> int:
    """Forget at most so many deliveries that ended more than `days` ago; return how many."""
    pruned: int = await connection.fetchval(_PRUNE, days, at_most)
    return pruned

"""Enqueue intents: make a delivery of each. Deliveries are facts, which no rebuild touches.

Intents are enqueued in the order of the tenant's ledger, up to the outbox cursor, which only rises. So each is enqueued
once, however often the outbox is rebuilt. A changed rule may derive an intent for an event before the cursor: that one
is never enqueued.
"""

from collections.abc import Sequence

from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery.ordering import (
    configure_transaction,
    lock_endpoints,
    schedule_and_wake,
    to_columns,
)

# Tenants with an outbox backlog. Each is found by one index lookup; DISTINCT would read all rows of each tenant.
_TENANTS_WITH_BACKLOG = """
WITH RECURSIVE found AS (
    (SELECT tenant_id, 1 AS number FROM outbox_backlog WHERE tenant_id > $1 ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT next.tenant_id, number + 1 FROM found CROSS JOIN LATERAL (
        SELECT tenant_id FROM outbox_backlog WHERE tenant_id > found.tenant_id ORDER BY tenant_id LIMIT 1) AS next
    WHERE number < $2)
SELECT tenant_id FROM found
"""

_CREATE_CURSORS = (
    "INSERT INTO outbox_cursors (tenant_id, position) SELECT unnest($1::bigint[]), 0 ON CONFLICT DO NOTHING"
)

# Skips tenants that another sender is enqueuing for.
_LOCK_CURSORS = """
SELECT tenant_id FROM outbox_cursors WHERE tenant_id = ANY($1) ORDER BY tenant_id FOR UPDATE SKIP LOCKED
"""

# Enqueues at most $2 intents of each tenant, in one statement: the intents and the cursor are of one moment. An event
# with more intents than the limit is enqueued in parts; the cursor passes it with the last part.
_ENQUEUE = """
WITH span AS MATERIALIZED (
    SELECT s.tenant_id, s.position AS since, c.position AS until
    FROM unnest($1::bigint[]) AS locked (tenant_id)
    CROSS JOIN LATERAL (SELECT * FROM outbox_cursors WHERE tenant_id = locked.tenant_id LIMIT 1) AS s
    CROSS JOIN LATERAL (
        SELECT position FROM checkpoints WHERE tenant_id = locked.tenant_id AND projection = 'outbox' LIMIT 1) AS c),
backlog AS MATERIALIZED (
    SELECT i.*, row_number() OVER (PARTITION BY span.tenant_id ORDER BY i.position) AS number
    FROM span CROSS JOIN LATERAL (
        SELECT * FROM outbox_intents o
        WHERE tenant_id = span.tenant_id AND position > span.since AND position <= span.until AND NOT EXISTS (
            SELECT FROM deliveries d WHERE d.tenant_id = span.tenant_id AND d.intent_id = o.intent_id)
        ORDER BY position LIMIT $2 + 1) AS i),
enqueued AS (
    INSERT INTO deliveries (tenant_id, intent_id, subscription_id, stream_kind, stream_id, position, channel, topic,
        created_at, state, finalized_at)
    SELECT tenant_id, intent_id, subscription_id, stream_kind, stream_id, position, channel, topic, created_at,
        CASE WHEN suppressed THEN 'suppressed' ELSE 'pending' END, CASE WHEN suppressed THEN statement_timestamp() END
    FROM backlog WHERE number <= $2
    RETURNING tenant_id, subscription_id, stream_kind, stream_id, channel, state),
reached AS (
    SELECT span.tenant_id, coalesce(
        (SELECT position - 1 FROM backlog b WHERE b.tenant_id = span.tenant_id AND number > $2), span.until) AS position
    FROM span),
moved AS (
    UPDATE outbox_cursors s SET position = greatest(s.position, reached.position) FROM reached
    WHERE s.tenant_id = reached.tenant_id),
removed AS (
    DELETE FROM outbox_backlog b USING reached WHERE b.tenant_id = reached.tenant_id AND b.position <= reached.position)
SELECT DISTINCT tenant_id, subscription_id, stream_kind, stream_id, channel, state = 'pending' AS is_pending
FROM enqueued
"""

_CREATE_ENDPOINTS = """
INSERT INTO endpoints (tenant_id, subscription_id, channel)
SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[], $3::text[]) ON CONFLICT DO NOTHING
"""

# Deletes old final deliveries with their attempts. All lie before the outbox cursor, so none is sent again. A coalesced
# delivery is kept as long as the one that reported it.
_PRUNE = """
WITH old AS (
    SELECT d.tenant_id, d.intent_id FROM deliveries d
    WHERE d.finalized_at < statement_timestamp() - $1 * interval '1 day'
        AND d.position <= (SELECT s.position FROM outbox_cursors s WHERE s.tenant_id = d.tenant_id LIMIT 1)
        AND (d.coalesced_into IS NULL OR NOT EXISTS (
            SELECT FROM deliveries l WHERE l.tenant_id = d.tenant_id AND l.intent_id = d.coalesced_into))
    ORDER BY d.finalized_at LIMIT $2 FOR UPDATE SKIP LOCKED),
attempts AS (
    DELETE FROM delivery_attempts a USING old WHERE a.tenant_id = old.tenant_id AND a.intent_id = old.intent_id),
gone AS (
    DELETE FROM deliveries d USING old WHERE d.tenant_id = old.tenant_id AND d.intent_id = old.intent_id
    RETURNING 1)
SELECT count(*) FROM gone
"""


async def tenants_with_backlog(connection: Connection, after_tenant_id: int, limit: int) -> list[int]:
    """Return the ids of at most `limit` tenants, above `after_tenant_id` and in order, with intents to enqueue."""
    return [row["tenant_id"] for row in await connection.fetch(_TENANTS_WITH_BACKLOG, after_tenant_id, limit)]


async def enqueue_intents(
    connection: Connection, tenant_ids: Sequence[int], coalesce_seconds: float, limit: int = 10_000
) -> int:
    """Enqueue intents of tenants, in the caller's transaction; return the number of ordering keys with new deliveries.

    Args:
        connection: A connection inside a transaction.
        tenant_ids: The tenants, at least one. Those that another sender is enqueuing for are skipped.
        coalesce_seconds: The time that the first delivery of a stream waits for further changes.
        limit: The limit of intents, but at least one for each tenant. The others follow with the next call.
    """
    await configure_transaction(connection)
    await connection.execute(_CREATE_CURSORS, tenant_ids)
    locked = [row["tenant_id"] for row in await connection.fetch(_LOCK_CURSORS, tenant_ids)]
    rows = await connection.fetch(_ENQUEUE, locked, max(1, limit // len(tenant_ids)))
    if rows:
        endpoints = to_columns((row["tenant_id"], row["subscription_id"], row["channel"]) for row in rows)
        await connection.execute(_CREATE_ENDPOINTS, *endpoints)
    keys = [
        (row["tenant_id"], row["subscription_id"], row["stream_kind"], row["stream_id"])
        for row in rows
        if row["is_pending"]
    ]
    await lock_endpoints(connection, (key[:2] for key in keys))
    await schedule_and_wake(connection, keys, coalesce_seconds)
    return len(keys)


async def prune_deliveries(connection: Connection, retention_days: float, limit: int) -> int:
    """Delete at most `limit` deliveries that were finalized more than `retention_days` ago; return their number."""
    pruned: int = await connection.fetchval(_PRUNE, retention_days, limit)
    return pruned

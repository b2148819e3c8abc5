"""Keep the order of deliveries that share an ordering key: one subscription and one stream.

Only the oldest pending delivery of an ordering key ever has a `next_attempt_at`; its end sets that of the next one.
A transaction that changes deliveries of an endpoint holds the lock of the endpoint's row. So none misses a delivery
that another transaction has just added or finalized.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery.retry_policy import PROBE_AFTER_FAILURES

EndpointKey: TypeAlias = tuple[int, int]
"""(tenant id, subscription id)"""
OrderingKey: TypeAlias = tuple[int, int, str, int]
"""(tenant id, subscription id, stream kind, stream id)"""

# The limit of each transaction of a sender, from waiting for a connection to the commit.
TRANSACTION_TIMEOUT_SECONDS = 10.0

# True if sending is paused neither for everyone (tenant 0) nor for the tenant. Evaluated once per statement.
SENDING_IS_ENABLED = """
NOT EXISTS (SELECT FROM sending_pauses WHERE tenant_id = 0)
    AND {tenant} <> ALL(ARRAY(SELECT tenant_id FROM sending_pauses))
"""

# The server ends a session that idles while it holds locks that others wait for. Index scans are forced: cached plans
# rest on old statistics, often from before thousands of rows arrived.
_CONFIGURE = """
SELECT set_config('idle_in_transaction_session_timeout', '3s', true), set_config('enable_seqscan', 'off', true),
    set_config('enable_sort', 'off', true), set_config('jit', 'off', true)
"""

# Locks endpoints in the order of the arrays. All callers sort them alike, so no two wait for each other.
_LOCK_ENDPOINTS = """
SELECT e.* FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id) CROSS JOIN LATERAL (
    SELECT tenant_id, subscription_id FROM endpoints
    WHERE tenant_id = row.tenant_id AND subscription_id = row.subscription_id LIMIT 1 FOR UPDATE) AS e
"""

# Schedules the oldest pending delivery of each ordering key, $5 seconds after its event was recorded, so that further
# changes of the same stream can be coalesced with it. Messages about the subscription itself never wait.
_SCHEDULE_OLDEST = """
WITH oldest AS MATERIALIZED (
    SELECT key.tenant_id, first.* FROM (
        SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[])
            AS row (tenant_id, subscription_id, stream_kind, stream_id)) AS key
    CROSS JOIN LATERAL (
        SELECT intent_id, stream_kind, created_at, next_attempt_at FROM deliveries
        WHERE tenant_id = key.tenant_id AND subscription_id = key.subscription_id AND stream_kind = key.stream_kind
            AND stream_id = key.stream_id AND finalized_at IS NULL
        ORDER BY created_at, position LIMIT 1) AS first)
UPDATE deliveries d SET next_attempt_at = greatest(statement_timestamp(), oldest.created_at
    + CASE WHEN oldest.stream_kind = 'subscription' THEN 0 ELSE $5 END * interval '1 second')
FROM oldest WHERE oldest.next_attempt_at IS NULL AND d.tenant_id = oldest.tenant_id AND d.intent_id = oldest.intent_id
    AND d.state = 'pending'
"""

# A delivery that returns to an ordering key may be older than the scheduled one. None is scheduled until the oldest is.
_UNSCHEDULE = """
UPDATE deliveries d SET next_attempt_at = NULL
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[])
    AS row (tenant_id, subscription_id, stream_kind, stream_id)) AS key
WHERE d.tenant_id = key.tenant_id AND d.subscription_id = key.subscription_id AND d.stream_kind = key.stream_kind
    AND d.stream_id = key.stream_id AND d.finalized_at IS NULL AND d.next_attempt_at IS NOT NULL
"""

# The time of the next attempt at an endpoint `e`.
NEXT_ATTEMPT_AT = """
(SELECT d.next_attempt_at FROM deliveries d WHERE d.tenant_id = e.tenant_id AND d.subscription_id = e.subscription_id
    AND d.next_attempt_at IS NOT NULL ORDER BY d.next_attempt_at LIMIT 1)
"""

# A leased endpoint is left alone: its sender looks again when it releases it. A backoff stays in force.
_WAKE_ENDPOINTS = f"""
UPDATE endpoints e SET available_at = least(e.available_at, greatest({NEXT_ATTEMPT_AT}, e.backoff_until))
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id)) AS woken
WHERE e.tenant_id = woken.tenant_id AND e.subscription_id = woken.subscription_id AND e.lease IS NULL
"""

# Ends a backoff. A probed endpoint comes one failure below the limit: if it accepts one message, the rest follows.
_END_BACKOFF = f"""
UPDATE endpoints e SET available_at = least(e.available_at, statement_timestamp()), backoff_until = NULL,
    consecutive_failures = least(e.consecutive_failures, {PROBE_AFTER_FAILURES - 1})
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id)) AS row
WHERE e.tenant_id = row.tenant_id AND e.subscription_id = row.subscription_id
    AND (e.lease IS NULL OR e.available_at < statement_timestamp())
"""


async def configure_transaction(connection: Connection) -> None:
    """Set the planner options and timeouts that work on deliveries needs, for the caller's transaction."""
    await connection.execute(_CONFIGURE)


async def lock_endpoints(connection: Connection, endpoints: Iterable[EndpointKey]) -> None:
    """Lock endpoints for the caller's transaction, as every change of their deliveries requires."""
    if keys := sorted(set(endpoints)):
        await connection.fetch(_LOCK_ENDPOINTS, *to_columns(keys))


async def schedule_oldest(connection: Connection, keys: Iterable[OrderingKey], coalesce_seconds: float) -> None:
    """Schedule the oldest pending delivery of each key, at least one, `coalesce_seconds` after its event.

    The caller holds the locks of the endpoints.
    """
    await connection.execute(_SCHEDULE_OLDEST, *to_columns(keys), coalesce_seconds)


async def schedule_and_wake(connection: Connection, keys: Iterable[OrderingKey], coalesce_seconds: float = 0.0) -> None:
    """Schedule the oldest pending delivery of each key, and make its endpoint available then.

    The caller holds the locks of the endpoints.
    """
    if scheduled := list(keys):
        await schedule_oldest(connection, scheduled, coalesce_seconds)
        await connection.execute(_WAKE_ENDPOINTS, *to_columns(scheduled)[:2])


async def reschedule_now(connection: Connection, keys: Iterable[OrderingKey]) -> None:
    """Schedule the oldest delivery of each key now, after one returned to `pending`, and end any backoff.

    The caller holds the locks of the endpoints.
    """
    if returned := list(keys):
        await connection.execute(_UNSCHEDULE, *to_columns(returned))
        await schedule_and_wake(connection, returned)
        await connection.execute(_END_BACKOFF, *to_columns({key[:2] for key in returned}))


def to_columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    """Return rows, at least one, as the columns that `unnest` takes."""
    return [list(column) for column in zip(*rows, strict=True)]

"""Record the results of attempts and release endpoints, as long as the sender still holds the leases."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery.leases import DueDelivery, LeasedEndpoint
from opsentry.notifications.delivery.ordering import (
    NEXT_ATTEMPT_AT,
    OrderingKey,
    configure_transaction,
    lock_endpoints,
    schedule_oldest,
    to_columns,
)
from opsentry.notifications.delivery.retry_policy import (
    DISABLE_AFTER_DAYS,
    PROBE_AFTER_FAILURES,
    EndpointHealth,
)

# The limit of deliveries that one statement moves to `disabled`.
_DISABLE_BATCH = 5_000

# Locks the endpoints whose lease is still the given one. Results of others are refused.
_LOCK_LEASED = """
SELECT e.* FROM unnest($1::bigint[], $2::bigint[], $3::uuid[]) AS row (tenant_id, subscription_id, lease)
CROSS JOIN LATERAL (
    SELECT tenant_id, subscription_id, lease FROM endpoints
    WHERE tenant_id = row.tenant_id AND subscription_id = row.subscription_id AND lease = row.lease LIMIT 1 FOR UPDATE
    ) AS e
"""

# `delay` is the seconds until the next attempt, NULL for a final state; `duration_ms` is NULL if there was no attempt.
# A delivery that somebody else finalized meanwhile, for example an operator, stays as it is. So does one whose attempt
# is recorded already, which the caller cannot know if the connection was lost during the commit. Where an older
# delivery of the ordering key returned meanwhile, the retry waits behind it.
_RECORD = """
WITH results AS (
    SELECT * FROM unnest($1::bigint[], $2::uuid[], $3::text[], $4::float8[], $5::int[], $6::text[], $7::int[],
        $8::int[]) AS row (tenant_id, intent_id, state, delay, response_status, error, duration_ms, attempts_total)),
moved AS (
    UPDATE deliveries d SET state = r.state, next_attempt_at = CASE WHEN r.delay IS NOT NULL AND NOT EXISTS (
            SELECT FROM deliveries o WHERE o.tenant_id = d.tenant_id AND o.subscription_id = d.subscription_id
                AND o.stream_kind = d.stream_kind AND o.stream_id = d.stream_id AND o.finalized_at IS NULL
                AND (o.created_at, o.position) < (d.created_at, d.position))
            THEN statement_timestamp() + r.delay * interval '1 second' END,
        finalized_at = CASE WHEN r.delay IS NULL THEN statement_timestamp() END,
        response_status = r.response_status, error = r.error,
        attempts_in_round = d.attempts_in_round + (r.duration_ms IS NOT NULL)::int,
        attempts_total = d.attempts_total + (r.duration_ms IS NOT NULL)::int
    FROM results r
    WHERE d.tenant_id = r.tenant_id AND d.intent_id = r.intent_id AND d.state = 'pending'
        AND d.attempts_total = r.attempts_total
    RETURNING d.tenant_id, d.intent_id, d.attempts_total)
INSERT INTO delivery_attempts (tenant_id, intent_id, number, attempted_at, duration_ms, response_status, error)
SELECT m.tenant_id, m.intent_id, m.attempts_total, statement_timestamp() - r.duration_ms * interval '1 millisecond',
    r.duration_ms, r.response_status, r.error
FROM moved m JOIN results r USING (tenant_id, intent_id) WHERE r.duration_ms IS NOT NULL
ON CONFLICT DO NOTHING
"""

# Ends pending deliveries of disabled subscriptions, up to the position for which the read model knows that they are
# disabled. At most $4 of each; the rest follows when the endpoint is looked at again.
_DISABLE = """
UPDATE deliveries d SET state = 'disabled', next_attempt_at = NULL, finalized_at = statement_timestamp(),
    error = coalesce(d.error, 'the subscription is disabled')
FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS off (tenant_id, subscription_id, projected_position)
CROSS JOIN LATERAL (
    SELECT intent_id FROM deliveries
    WHERE tenant_id = off.tenant_id AND subscription_id = off.subscription_id AND finalized_at IS NULL
        AND position <= off.projected_position
    LIMIT $4) AS ending
WHERE d.tenant_id = off.tenant_id AND d.intent_id = ending.intent_id
RETURNING d.tenant_id, d.subscription_id, d.stream_kind, d.stream_id
"""

# Releases endpoints, to the end of the line. If the subscription changed meanwhile, it may have another endpoint, or a
# repaired one, so its health starts again from the defaults.
_RELEASE = f"""
WITH released AS (
    SELECT r.*, version IS NOT DISTINCT FROM (
        SELECT s.version FROM subscriptions s
        WHERE s.tenant_id = r.tenant_id AND s.subscription_id = r.subscription_id LIMIT 1) AS is_unchanged, (
        SELECT d.next_attempt_at FROM deliveries d
        WHERE d.tenant_id = r.tenant_id AND d.subscription_id = r.subscription_id AND d.next_attempt_at IS NOT NULL
        ORDER BY d.next_attempt_at LIMIT 1) AS next_attempt_at
    FROM unnest($1::bigint[], $2::bigint[], $3::int[], $4::int[], $5::float8[], $6::bool[], $7::int[])
        AS r (tenant_id, subscription_id, consecutive_failures, concurrency, backoff, has_failed, version))
UPDATE endpoints e SET lease = NULL,
    consecutive_failures = CASE WHEN is_unchanged THEN r.consecutive_failures ELSE 0 END,
    concurrency = CASE WHEN is_unchanged THEN r.concurrency ELSE 1 END,
    backoff_until = CASE WHEN is_unchanged THEN statement_timestamp() + r.backoff * interval '1 second' END,
    failing_since = CASE WHEN is_unchanged AND r.consecutive_failures > 0
        THEN coalesce(e.failing_since, statement_timestamp()) END,
    available_at = CASE WHEN next_attempt_at IS NOT NULL
        THEN greatest(next_attempt_at,
            statement_timestamp() + CASE WHEN is_unchanged THEN r.backoff END * interval '1 second',
            statement_timestamp()) END
FROM released r WHERE e.tenant_id = r.tenant_id AND e.subscription_id = r.subscription_id
RETURNING e.tenant_id, e.subscription_id, r.has_failed AND e.consecutive_failures >= {PROBE_AFTER_FAILURES}
    AND e.failing_since < statement_timestamp() - interval '{DISABLE_AFTER_DAYS} days' AS is_failing
"""

# Once the subscription is enabled again, the endpoint starts from the defaults. Remaining deliveries are looked at when
# they are due.
_RESET_HEALTH = f"""
UPDATE endpoints e SET consecutive_failures = 0, failing_since = NULL, concurrency = 1, backoff_until = NULL,
    available_at = CASE WHEN lease IS NOT NULL THEN available_at ELSE {NEXT_ATTEMPT_AT} END
WHERE tenant_id = $1 AND subscription_id = $2
"""


class DeliveryResult(NamedTuple):
    """The result of one delivery.

    Attributes:
        delivery: The delivery.
        state: Its next state; `pending` if it is to be tried again.
        delay: The seconds until the next attempt; `None` for a final state.
        response_status: The HTTP or SMTP status of the response, if any.
        error: The reason, in words for the tenant; `None` for a success.
        duration_ms: The duration of the attempt; `None` if there was none that says anything about the endpoint.
    """

    delivery: DueDelivery
    state: str
    delay: float | None = None
    response_status: int | None = None
    error: str | None = None
    duration_ms: int | None = None


class Release(NamedTuple):
    """The way an endpoint is given back.

    Attributes:
        health: Its health after the turn.
        has_failed: True if an attempt of this turn failed.
        is_disabled: True if its subscription is disabled or removed: all its pending deliveries end.
    """

    health: EndpointHealth = EndpointHealth()
    has_failed: bool = False
    is_disabled: bool = False


class EndpointResults(NamedTuple):
    """Results of one endpoint to record together. With a `release`, they are the last of this lease."""

    endpoint: LeasedEndpoint
    results: Sequence[DeliveryResult]
    release: Release | None = None


async def record_results(
    connection: Connection, batch: Sequence[EndpointResults], coalesce_seconds: float
) -> list[LeasedEndpoint]:
    """Record results and release endpoints, in the caller's transaction. Skips endpoints whose lease was lost.

    Returns:
        The released endpoints that have failed for `DISABLE_AFTER_DAYS` and are to be disabled.
    """
    await configure_transaction(connection)
    leases = {(each.endpoint.tenant_id, each.endpoint.subscription_id, each.endpoint.lease) for each in batch}
    held = {tuple(row) for row in await connection.fetch(_LOCK_LEASED, *to_columns(sorted(leases)))}
    batch = [
        each for each in batch if (each.endpoint.tenant_id, each.endpoint.subscription_id, each.endpoint.lease) in held
    ]
    if results := [result for each in batch for result in each.results]:
        await connection.execute(_RECORD, *to_columns(map(_result_row, results)))
    released = [(each.endpoint, each.release) for each in batch if each.release is not None]
    finalized = [result.delivery.ordering_key for result in results if result.delay is None]
    if disabled := [endpoint for endpoint, release in released if release.is_disabled]:
        finalized += await _disable_pending(connection, disabled)
    if finalized:
        await schedule_oldest(connection, finalized, coalesce_seconds)
    if not released:
        return []
    rows = await connection.fetch(_RELEASE, *to_columns(_release_row(*each) for each in released))
    failing = {(row["tenant_id"], row["subscription_id"]) for row in rows if row["is_failing"]}
    return [endpoint for endpoint, _ in released if (endpoint.tenant_id, endpoint.subscription_id) in failing]


async def disable_pending(connection: Connection, endpoint: LeasedEndpoint) -> None:
    """End the pending deliveries of a subscription that was disabled, in the caller's transaction."""
    key = (endpoint.tenant_id, endpoint.subscription_id)
    await configure_transaction(connection)
    await lock_endpoints(connection, [key])
    if finalized := await _disable_pending(connection, [endpoint]):
        await schedule_oldest(connection, finalized, 0.0)
    await connection.execute(_RESET_HEALTH, *key)


async def _disable_pending(connection: Connection, endpoints: Sequence[LeasedEndpoint]) -> list[OrderingKey]:
    keys = [(each.tenant_id, each.subscription_id, each.projected_position) for each in endpoints]
    rows = await connection.fetch(_DISABLE, *to_columns(keys), max(1, _DISABLE_BATCH // len(keys)))
    return [(row["tenant_id"], row["subscription_id"], row["stream_kind"], row["stream_id"]) for row in rows]


def _result_row(result: DeliveryResult) -> tuple[Any, ...]:
    return (
        result.delivery.tenant_id,
        result.delivery.intent_id,
        result.state,
        result.delay,
        result.response_status,
        result.error,
        result.duration_ms,
        result.delivery.attempts_total,
    )


def _release_row(endpoint: LeasedEndpoint, release: Release) -> tuple[Any, ...]:
    health = release.health
    return (
        endpoint.tenant_id,
        endpoint.subscription_id,
        health.consecutive_failures,
        health.concurrency,
        health.backoff_seconds,
        release.has_failed,
        endpoint.version,
    )

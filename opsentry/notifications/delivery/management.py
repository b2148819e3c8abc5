"""Operate the sending of deliveries: measure the backlog, show its status, retry, cancel, pause and resume."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import asyncpg

from opsentry.infrastructure.postgres import Connection, Database, fetch_one
from opsentry.notifications.delivery.ordering import (
    SENDING_IS_ENABLED,
    configure_transaction,
    lock_endpoints,
    reschedule_now,
)
from opsentry.notifications.delivery.retry_policy import PROBE_AFTER_FAILURES

ALL_TENANTS = 0

# Counting stops here: a larger number tells an operator nothing more.
_COUNT_LIMIT = 10_000
# The limit of deliveries that one transaction retries or cancels, so that nobody waits long for their endpoints.
_MOVE_BATCH = 500

# Answers readiness for all tenants. Due is work that a sender should do now: due deliveries at available endpoints, and
# intents to enqueue. Its age counts from the endpoint's `available_at`, which every release moves to the end of the
# line; if a lease expired, from the delivery's. Deliveries that are scheduled or exhausted are counted beside it.
# `unseen` events are those that the outbox projection has not applied, because it lags, is halted or is paused; only
# tenants with a projection backlog are looked at. Each part uses a small index and stops where the answer no longer
# changes: the cost depends neither on the number of tenants nor on the history. LIMIT and OFFSET keep the planner from
# joining whole tables.
_BACKLOG = f"""
WITH RECURSIVE channels AS (
    (SELECT channel FROM endpoints WHERE available_at IS NOT NULL ORDER BY channel LIMIT 1)
    UNION ALL
    SELECT next.channel FROM channels CROSS JOIN LATERAL (
        SELECT channel FROM endpoints WHERE channel > channels.channel AND available_at IS NOT NULL
        ORDER BY channel LIMIT 1) AS next),
due_deliveries AS (
    SELECT CASE WHEN e.lease IS NULL THEN greatest(e.available_at, d.next_attempt_at) ELSE d.next_attempt_at END
        AS since
    FROM channels CROSS JOIN LATERAL (
        SELECT * FROM endpoints WHERE channel = channels.channel AND available_at <= statement_timestamp()
        ORDER BY available_at OFFSET 0) AS e
    CROSS JOIN LATERAL (
        SELECT next_attempt_at FROM deliveries
        WHERE tenant_id = e.tenant_id AND subscription_id = e.subscription_id
            AND next_attempt_at <= statement_timestamp()
        ORDER BY next_attempt_at LIMIT $1) AS d
    WHERE {SENDING_IS_ENABLED.format(tenant="e.tenant_id")}
    LIMIT $1),
intents AS (
    SELECT i.created_at AS since FROM (SELECT DISTINCT tenant_id FROM outbox_backlog) AS b
    CROSS JOIN LATERAL (
        SELECT created_at FROM outbox_intents
        WHERE tenant_id = b.tenant_id AND NOT suppressed AND position > coalesce((
            SELECT position FROM outbox_cursors c WHERE c.tenant_id = b.tenant_id LIMIT 1), 0)
        ORDER BY position LIMIT $1) AS i
    WHERE {SENDING_IS_ENABLED.format(tenant="b.tenant_id")}
    LIMIT $1),
due AS (SELECT since FROM due_deliveries UNION ALL SELECT since FROM intents)
SELECT
    (SELECT count(*) FROM due) AS due,
    (SELECT count(*) FROM due_deliveries) AS due_deliveries,
    (SELECT extract(epoch FROM clock_timestamp() - min(since)) FROM due)::float8 AS oldest_due_seconds,
    (SELECT count(*) FROM (SELECT FROM deliveries WHERE finalized_at IS NULL LIMIT {_COUNT_LIMIT}) AS p)
        AS pending_deliveries,
    (SELECT count(*) FROM (SELECT FROM deliveries WHERE state = 'exhausted' LIMIT {_COUNT_LIMIT}) AS x)
        AS exhausted_deliveries,
    EXISTS (SELECT FROM sending_pauses) AS is_paused,
    coalesce(lag.events, 0)::bigint AS unseen_events,
    extract(epoch FROM clock_timestamp() - lag.since)::float8 AS oldest_unseen_seconds,
    lag.halted AS halted_tenants
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

# One row for each tenant with pending or exhausted deliveries, an outbox backlog, or paused sending.
_STATUS = f"""
SELECT coalesce(t.slug, '(all tenants)') AS slug, w.*,
    EXISTS (SELECT FROM sending_pauses p WHERE p.tenant_id = 0 OR p.tenant_id = f.tenant_id) AS paused,
    (SELECT count(*) FROM outbox_intents i WHERE i.tenant_id = f.tenant_id AND NOT i.suppressed AND i.position
        > coalesce((SELECT position FROM outbox_cursors c WHERE c.tenant_id = f.tenant_id), 0)) AS outbox_backlog,
    (SELECT count(*) FROM deliveries d WHERE d.tenant_id = f.tenant_id AND d.state = 'exhausted') AS exhausted,
    (SELECT count(*) FROM endpoints e WHERE e.tenant_id = f.tenant_id AND e.lease IS NOT NULL
        AND e.available_at > statement_timestamp()) AS leased,
    (SELECT count(*) FROM endpoints e WHERE e.tenant_id = f.tenant_id AND e.consecutive_failures > 0) AS failing,
    (SELECT count(*) FROM endpoints e
        WHERE e.tenant_id = f.tenant_id AND e.consecutive_failures >= {PROBE_AFTER_FAILURES}) AS probed,
    (SELECT position FROM outbox_cursors c WHERE c.tenant_id = f.tenant_id) AS outbox_cursor
FROM (
    SELECT tenant_id FROM deliveries WHERE finalized_at IS NULL OR state = 'exhausted'
    UNION SELECT tenant_id FROM outbox_backlog
    UNION SELECT tenant_id FROM sending_pauses) AS f
LEFT JOIN tenants t ON t.tenant_id = f.tenant_id
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE p.is_due) AS due, count(*) FILTER (WHERE p.is_due IS NOT TRUE) AS scheduled,
        extract(epoch FROM statement_timestamp() - min(p.attempt_at) FILTER (WHERE p.is_due))::float8
            AS oldest_due_seconds,
        min(p.attempt_at) FILTER (WHERE p.attempt_at > statement_timestamp()) AS next_attempt_at
    FROM (
        SELECT greatest(d.next_attempt_at, e.available_at) AS attempt_at,
            d.next_attempt_at <= statement_timestamp() AND e.available_at <= statement_timestamp() AS is_due
        FROM deliveries d LEFT JOIN endpoints e USING (tenant_id, subscription_id)
        WHERE d.tenant_id = f.tenant_id AND d.finalized_at IS NULL) AS p) AS w
WHERE $1::bigint IS NULL OR f.tenant_id IN ($1, 0)
ORDER BY t.slug LIMIT $2
"""

_LIST = """
SELECT t.slug, 'msg_' || replace(d.intent_id::text, '-', '') AS id, d.subscription_id, d.channel, d.topic,
    d.stream_kind, d.stream_id, d.position, d.state, d.attempts_total, d.next_attempt_at, d.response_status, d.error,
    d.created_at
FROM deliveries d JOIN tenants t ON t.tenant_id = d.tenant_id
WHERE ($1::bigint IS NULL OR d.tenant_id = $1) AND ($2::bigint IS NULL OR d.subscription_id = $2)
    AND ($3::text[] IS NULL OR d.state = ANY($3))
ORDER BY d.created_at DESC, d.tenant_id, d.intent_id LIMIT $4
"""

# The next batch of a selection, behind ($5, $6). A disabled delivery is selected only once its subscription is active
# again.
_SELECT = """
SELECT tenant_id, intent_id, subscription_id, stream_kind, stream_id FROM deliveries d
WHERE state = ANY($1) AND ($2::uuid[] IS NULL OR intent_id = ANY($2)) AND ($3::bigint IS NULL OR tenant_id = $3)
    AND ($4::bigint IS NULL OR subscription_id = $4) AND (tenant_id, intent_id) > ($5, $6)
    AND (state <> 'disabled' OR EXISTS (
        SELECT FROM subscriptions s WHERE s.tenant_id = d.tenant_id AND s.subscription_id = d.subscription_id
            AND s.status = 'active'))
ORDER BY tenant_id, intent_id LIMIT $7
"""

_RETRY = """
UPDATE deliveries d SET state = 'pending', attempts_in_round = 0, finalized_at = NULL, next_attempt_at = NULL
FROM unnest($1::bigint[], $2::uuid[]) AS row (tenant_id, intent_id)
WHERE d.tenant_id = row.tenant_id AND d.intent_id = row.intent_id AND d.state = ANY($3)
"""

_CANCEL = """
UPDATE deliveries d SET state = 'cancelled', next_attempt_at = NULL, finalized_at = statement_timestamp(),
    error = coalesce(d.error, 'cancelled by an operator')
FROM unnest($1::bigint[], $2::uuid[]) AS row (tenant_id, intent_id)
WHERE d.tenant_id = row.tenant_id AND d.intent_id = row.intent_id AND d.state = ANY($3)
"""

_PAUSE = "INSERT INTO sending_pauses (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
_RESUME = "DELETE FROM sending_pauses WHERE tenant_id = $1"
_PAUSED_TENANTS = """
SELECT coalesce(t.slug, '(all tenants)') AS slug FROM sending_pauses p LEFT JOIN tenants t ON t.tenant_id = p.tenant_id
ORDER BY p.tenant_id
"""


class SendingBacklog(NamedTuple):
    """The work that waits for senders and for the outbox projection, of all tenants.

    Attributes:
        due: Due deliveries and intents to enqueue, counted up to the given limit.
        due_deliveries: The due deliveries among them.
        oldest_due_seconds: The age of the oldest; `None` if nothing is due.
        pending_deliveries: All pending deliveries, due or not, counted up to a limit.
        exhausted_deliveries: Deliveries that wait for an operator, counted up to a limit.
        is_paused: True if sending is paused for any tenant.
        unseen_events: Events that the outbox projection has not applied.
        oldest_unseen_seconds: The age of the oldest; `None` if there is none.
        halted_tenants: The tenants in which the outbox projection is halted.
    """

    due: int
    due_deliveries: int
    oldest_due_seconds: float | None
    pending_deliveries: int
    exhausted_deliveries: int
    is_paused: bool
    unseen_events: int
    oldest_unseen_seconds: float | None
    halted_tenants: int


class DeliverySelection(NamedTuple):
    """A selection of deliveries: all that meet every condition.

    Attributes:
        states: States of the deliveries.
        ids: Their intents; `None` for all.
        tenant_id: Their tenant; `None` for all.
        subscription_id: Their subscription, which needs `tenant_id` as it is unique within the tenant; `None` for all.
    """

    states: Sequence[str]
    ids: Sequence[UUID] | None = None
    tenant_id: int | None = None
    subscription_id: int | None = None


async def measure_backlog(connection: Connection, limit: int) -> SendingBacklog:
    """Measure the backlog of all tenants, in the caller's transaction. Counting of due work stops at `limit`."""
    await configure_transaction(connection)
    return SendingBacklog(*await fetch_one(connection, _BACKLOG, limit))


async def sending_status(
    connection: Connection, tenant_id: int | None = None, *, limit: int | None = None
) -> Sequence[asyncpg.Record]:
    """Return the status of sending: one row for each tenant with anything to report, at most `limit`, by slug.

    Columns: `slug` (`(all tenants)` for a pause of all), `due` and `scheduled` deliveries, `oldest_due_seconds`,
    `next_attempt_at`, `paused`, `outbox_backlog` (intents to enqueue), `exhausted` deliveries, endpoints that are
    `leased`, `failing` or `probed`, and `outbox_cursor`.
    """
    return list(await connection.fetch(_STATUS, tenant_id, limit))


async def list_all_deliveries(
    connection: Connection,
    tenant_id: int | None,
    *,
    subscription_id: int | None = None,
    states: Sequence[str] | None = None,
    limit: int = 50,
) -> Sequence[asyncpg.Record]:
    """Return deliveries of one tenant or all, newest first.

    Raises:
        ValueError: There is a `subscription_id` without a tenant.
    """
    _require_tenant(tenant_id, subscription_id)
    return list(await connection.fetch(_LIST, tenant_id, subscription_id, states, limit))


async def retry_deliveries(database: Database, selection: DeliverySelection, *, seconds: float) -> int:
    """Put deliveries back to `pending` and attempt them now, with all attempts again; return their number.

    Args:
        database: The database with the deliveries.
        selection: The deliveries, in `states.RETRYABLE_STATES`.
        seconds: The limit of each transaction; there may be many.

    Raises:
        ValueError: The selection has a subscription without a tenant.
    """
    return await _move_all(database, _RETRY, selection, seconds)


async def cancel_deliveries(database: Database, selection: DeliverySelection, *, seconds: float) -> int:
    """Cancel deliveries, so that younger ones of the same ordering key follow; return their number.

    Args:
        database: The database with the deliveries.
        selection: The deliveries, in `states.CANCELLABLE_STATES`.
        seconds: The limit of each transaction; there may be many.

    Raises:
        ValueError: The selection has a subscription without a tenant.
    """
    return await _move_all(database, _CANCEL, selection, seconds)


async def pause_sending(connection: Connection, tenant_id: int) -> bool:
    """Pause sending for a tenant, or for `ALL_TENANTS`; return whether that is new. Attempts in flight end."""
    done: str = await connection.execute(_PAUSE, tenant_id)
    return done.endswith(" 1")


async def resume_sending(connection: Connection, tenant_id: int) -> bool:
    """Resume sending for a tenant, or for `ALL_TENANTS`; return whether it was paused."""
    done: str = await connection.execute(_RESUME, tenant_id)
    return done.endswith(" 1")


async def paused_tenants(connection: Connection) -> list[str]:
    """Return the slugs of tenants with paused sending, and `(all tenants)` for a pause of all."""
    return [row["slug"] for row in await connection.fetch(_PAUSED_TENANTS)]


def _require_tenant(tenant_id: int | None, subscription_id: int | None) -> None:
    if subscription_id is not None and tenant_id is None:
        raise ValueError("a subscription id is unique within its tenant only: name the tenant too")


async def _move_all(database: Database, change: str, selection: DeliverySelection, seconds: float) -> int:
    _require_tenant(selection.tenant_id, selection.subscription_id)
    total = 0
    last: tuple[int, UUID] | None = (0, UUID(int=0))
    while last is not None:
        async with database.transaction(seconds) as connection:
            moved, last = await _move_batch(connection, change, selection, last)
        total += moved
    return total


async def _move_batch(
    connection: Connection, change: str, selection: DeliverySelection, after: tuple[int, UUID]
) -> tuple[int, tuple[int, UUID] | None]:
    """Move the batch behind `after`; return its size and its last row, `None` if it is empty."""
    states = list(selection.states)
    rows = await connection.fetch(
        _SELECT, states, selection.ids, selection.tenant_id, selection.subscription_id, *after, _MOVE_BATCH
    )
    if not rows:
        return 0, None
    await configure_transaction(connection)
    await lock_endpoints(connection, ((row["tenant_id"], row["subscription_id"]) for row in rows))
    done: str = await connection.execute(
        change, [row["tenant_id"] for row in rows], [row["intent_id"] for row in rows], states
    )
    keys = {(row["tenant_id"], row["subscription_id"], row["stream_kind"], row["stream_id"]) for row in rows}
    await reschedule_now(connection, keys)
    return int(done.rpartition(" ")[2]), (rows[-1]["tenant_id"], rows[-1]["intent_id"])

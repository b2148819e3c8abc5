"""Lanes: what a subscription is told of one thing, in order.

Of each lane only the oldest delivery that waits is ever due, and what ends it makes the next one due. Whoever moves
deliveries of an endpoint holds the lock of the endpoint's row: so nobody misses that another one has just ended, or has
just come.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

from opsentry.infrastructure.postgres import Connection

# Tenant, subscription; and with a stream's kind and id.
Key: TypeAlias = tuple[int, int]
Lane: TypeAlias = tuple[int, int, str, int]

# Whether nothing is paused, not everywhere and not for a tenant; asked once, however many rows it is held against.
IS_ON = """
NOT EXISTS (SELECT FROM outbox_paused WHERE tenant_id = 0)
    AND {tenant} <> ALL(ARRAY(SELECT tenant_id FROM outbox_paused))
"""

# An endpoint that failed so often in a row is tried with one message at a time.
PROBE_AFTER = 10

# Whoever stands still with locks that others wait for is thrown out by the server. And all goes by indexes: plans are
# made from statistics of another time, here often of a moment before thousands of rows came, and are kept.
_BEGIN = """
SELECT set_config('idle_in_transaction_session_timeout', '3s', true), set_config('enable_seqscan', 'off', true),
    set_config('enable_sort', 'off', true), set_config('jit', 'off', true)
"""

# Locks endpoints in the order of the lists, which is one for all.
_LOCK_ENDPOINTS = """
SELECT e.* FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id) CROSS JOIN LATERAL (
    SELECT tenant_id, subscription_id FROM endpoints
    WHERE tenant_id = row.tenant_id AND subscription_id = row.subscription_id LIMIT 1 FOR UPDATE) AS e
"""

# Makes the oldest delivery of each lane due that is not: $5 seconds after its event was recorded, so that more changes
# of the same thing can come along.
_WAKE_LANES = """
WITH head AS MATERIALIZED (
    SELECT lane.tenant_id, oldest.* FROM (
        SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[])
            AS row (tenant_id, subscription_id, stream_kind, stream_id)) AS lane
    CROSS JOIN LATERAL (
        SELECT intent_id, stream_kind, created_at, due_at FROM deliveries
        WHERE tenant_id = lane.tenant_id AND subscription_id = lane.subscription_id AND stream_kind = lane.stream_kind
            AND stream_id = lane.stream_id AND settled_at IS NULL
        ORDER BY created_at, position LIMIT 1) AS oldest)
UPDATE deliveries d SET due_at = greatest(statement_timestamp(), head.created_at
    + CASE WHEN head.stream_kind = 'subscription' THEN 0 ELSE $5 END * interval '1 second')
FROM head WHERE head.due_at IS NULL AND d.tenant_id = head.tenant_id AND d.intent_id = head.intent_id
    AND d.state = 'waiting'
"""

# What comes back to a lane may be older than what is due there: nothing is, until the lane is woken.
_HUSH_LANES = """
UPDATE deliveries d SET due_at = NULL
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[])
    AS row (tenant_id, subscription_id, stream_kind, stream_id)) AS lane
WHERE d.tenant_id = lane.tenant_id AND d.subscription_id = lane.subscription_id AND d.stream_kind = lane.stream_kind
    AND d.stream_id = lane.stream_id AND d.settled_at IS NULL AND d.due_at IS NOT NULL
"""

# When the next delivery of an endpoint `e` is due.
NEXT_DUE = """
(SELECT d.due_at FROM deliveries d WHERE d.tenant_id = e.tenant_id AND d.subscription_id = e.subscription_id
    AND d.due_at IS NOT NULL ORDER BY d.due_at LIMIT 1)
"""

# One that somebody is at looks again by itself, and one that is to be left alone for a while is left alone.
_WAKE_ENDPOINTS = f"""
UPDATE endpoints e SET due_at = least(e.due_at, greatest({NEXT_DUE}, e.held_until))
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id)) AS woken
WHERE e.tenant_id = woken.tenant_id AND e.subscription_id = woken.subscription_id AND e.lease IS NULL
"""

# Whoever is to be tried again now is looked at now, also where an endpoint was to be left alone for a while; and where
# one was only probed, all that is due follows if the first is taken.
_LOOK = f"""
UPDATE endpoints e SET due_at = least(e.due_at, statement_timestamp()), held_until = NULL,
    failures = least(e.failures, {PROBE_AFTER - 1})
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id)) AS row
WHERE e.tenant_id = row.tenant_id AND e.subscription_id = row.subscription_id
    AND (e.lease IS NULL OR e.due_at < statement_timestamp())
"""


async def begin(connection: Connection) -> None:
    """Set what all work on deliveries needs, for the caller's transaction."""
    await connection.execute(_BEGIN)


async def lock(connection: Connection, endpoints: Iterable[Key]) -> None:
    """Lock endpoints for the caller's transaction: whoever moves their deliveries does."""
    if keys := sorted(set(endpoints)):
        await connection.fetch(_LOCK_ENDPOINTS, *columns(keys))


async def make_due(connection: Connection, lanes: Iterable[Lane], burst: float) -> None:
    """Make the oldest delivery of each lane due, `burst` seconds after its event; the endpoints are locked."""
    await connection.execute(_WAKE_LANES, *columns(lanes), burst)


async def wake(connection: Connection, lanes: Iterable[Lane], burst: float = 0.0) -> None:
    """Make the oldest delivery of each lane due, and have its endpoint be looked at then; the endpoints are locked."""
    if wanted := list(lanes):
        await make_due(connection, wanted, burst)
        await connection.execute(_WAKE_ENDPOINTS, *columns(wanted)[:2])


async def again(connection: Connection, lanes: Iterable[Lane]) -> None:
    """Have lanes go on, now, with the oldest that waits, after something came back to them; endpoints are locked."""
    if wanted := list(lanes):
        await connection.execute(_HUSH_LANES, *columns(wanted))
        await wake(connection, wanted)
        await connection.execute(_LOOK, *columns({lane[:2] for lane in wanted}))


def columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    """Return rows, at least one, as the columns that `unnest` takes."""
    return [list(column) for column in zip(*rows, strict=True)]

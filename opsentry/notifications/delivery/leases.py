"""Lease endpoints to a sender, and take their due deliveries.

A lease lasts a fixed time. Only its holder may record results; see `results`. If a sender dies, its leases expire and
another sender repeats the attempts with the same message ids.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from uuid import UUID

import msgspec

from opsentry.domain.subscription import Subscription
from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.channel import Change
from opsentry.notifications.delivery.ordering import (
    SENDING_IS_ENABLED,
    OrderingKey,
    configure_transaction,
    to_columns,
)
from opsentry.notifications.delivery.retry_policy import EndpointHealth

# Leases endpoints of a channel ($7) with due deliveries, the longest available first. Rows are found by ctid: one that
# moved while it was being locked is left for the next time. Tenants that use their share are skipped ($3). Endpoints
# of concurrency 1 are skipped where those use theirs: in all tenants ($4), or in some ($6).
_LEASE_ENDPOINTS = f"""
UPDATE endpoints e SET lease = $1, available_at = statement_timestamp() + $5 * interval '1 second'
WHERE e.ctid = ANY(ARRAY(
    SELECT due.ctid FROM endpoints due
    WHERE due.channel = $7 AND due.available_at <= statement_timestamp() AND due.tenant_id <> ALL($3)
        AND (due.concurrency > 1 OR (NOT $4 AND due.tenant_id <> ALL($6)))
        AND {SENDING_IS_ENABLED.format(tenant="due.tenant_id")}
    ORDER BY due.available_at LIMIT $2 FOR UPDATE SKIP LOCKED))
RETURNING e.tenant_id, e.subscription_id, e.consecutive_failures, e.concurrency,
    (SELECT s.state FROM subscriptions s
     WHERE s.tenant_id = e.tenant_id AND s.subscription_id = e.subscription_id LIMIT 1) AS state,
    (SELECT s.version FROM subscriptions s
     WHERE s.tenant_id = e.tenant_id AND s.subscription_id = e.subscription_id LIMIT 1) AS version,
    coalesce((SELECT c.position FROM checkpoints c
     WHERE c.tenant_id = e.tenant_id AND c.projection = 'subscriptions' LIMIT 1), 0) AS projected_position
"""

# Takes due deliveries of leased endpoints, at most $3 of each. The first take decides which events the message reports:
# all changes of the same stream within $4 seconds after the first. It coalesces their deliveries into this one.
_TAKE_DELIVERIES = """
WITH due AS (
    SELECT d.* FROM unnest($1::bigint[], $2::bigint[], $3::int[]) AS e (tenant_id, subscription_id, quantum)
    CROSS JOIN LATERAL (
        SELECT tenant_id, intent_id, subscription_id, stream_kind, stream_id, position, topic, created_at,
            last_position, attempts_in_round, attempts_total
        FROM deliveries WHERE tenant_id = e.tenant_id AND subscription_id = e.subscription_id
            AND next_attempt_at <= statement_timestamp()
        ORDER BY next_attempt_at, position LIMIT e.quantum) AS d),
followers AS MATERIALIZED (
    SELECT h.tenant_id, h.intent_id AS coalesced_into, f.intent_id FROM due h CROSS JOIN LATERAL (
        SELECT intent_id FROM deliveries
        WHERE tenant_id = h.tenant_id AND subscription_id = h.subscription_id AND stream_kind = h.stream_kind
            AND stream_id = h.stream_id AND finalized_at IS NULL AND created_at >= h.created_at
            AND created_at < h.created_at + $4 * interval '1 second'
            AND position > h.position AND next_attempt_at IS NULL AND last_position IS NULL
        ORDER BY created_at, position) AS f
    WHERE h.last_position IS NULL AND h.stream_kind <> 'subscription'),
coalesced AS (
    UPDATE deliveries d SET state = 'coalesced', coalesced_into = f.coalesced_into, finalized_at = statement_timestamp()
    FROM followers f WHERE d.tenant_id = f.tenant_id AND d.intent_id = f.intent_id
    RETURNING d.tenant_id, d.coalesced_into, d.position, d.topic, d.created_at),
begun AS (
    UPDATE deliveries d SET last_position = greatest(h.position, (
        SELECT max(c.position) FROM coalesced c WHERE c.tenant_id = h.tenant_id AND c.coalesced_into = h.intent_id))
    FROM due h WHERE h.last_position IS NULL AND d.tenant_id = h.tenant_id AND d.intent_id = h.intent_id)
SELECT h.tenant_id, h.intent_id, h.subscription_id, h.stream_kind, h.stream_id, h.position, h.topic, h.created_at,
    h.attempts_in_round, h.attempts_total, more.positions, more.topics, more.times
FROM due h CROSS JOIN LATERAL (
    SELECT array_agg(position ORDER BY position) AS positions, array_agg(topic ORDER BY position) AS topics,
        array_agg(created_at ORDER BY position) AS times
    FROM (
        SELECT c.position, c.topic, c.created_at FROM coalesced c
        WHERE c.tenant_id = h.tenant_id AND c.coalesced_into = h.intent_id
        UNION
        SELECT f.position, f.topic, f.created_at FROM deliveries f
        WHERE h.last_position > h.position AND f.tenant_id = h.tenant_id AND f.subscription_id = h.subscription_id
            AND f.position BETWEEN h.position + 1 AND h.last_position AND f.coalesced_into = h.intent_id
    ) AS reported) AS more
"""

_decode = msgspec.json.Decoder(Subscription).decode


class LeasedEndpoint(NamedTuple):
    """An endpoint that this process holds a lease of.

    Attributes:
        tenant_id: The tenant.
        subscription_id: The subscription, unique within the tenant.
        lease: The random id of the lease.
        health: The health at the time of the lease.
        subscription: The subscription's state; `None` if the read model does not have it yet.
        version: The subscription's version; `None` as above.
        projected_position: The position up to which the subscriptions read model has seen the ledger.
    """

    tenant_id: int
    subscription_id: int
    lease: UUID
    health: EndpointHealth
    subscription: Subscription | None
    version: int | None
    projected_position: int


class DueDelivery(NamedTuple):
    """A delivery to attempt now.

    Attributes:
        tenant_id: The tenant.
        intent_id: The intent, from which the message id derives.
        subscription_id: The subscription, unique within the tenant.
        stream_kind: `incident`, `maintenance` or `subscription`.
        stream_id: The stream's id, unique within tenant and kind.
        attempts_in_round: The attempts since the delivery was last put back to `pending`.
        attempts_total: All attempts.
        changes: The events that its message reports, oldest first; at least one.
    """

    tenant_id: int
    intent_id: UUID
    subscription_id: int
    stream_kind: str
    stream_id: int
    attempts_in_round: int
    attempts_total: int
    changes: Sequence[Change]

    @property
    def ordering_key(self) -> OrderingKey:
        """Return the key of the deliveries that must keep their order with this one."""
        return self.tenant_id, self.subscription_id, self.stream_kind, self.stream_id

    @property
    def position(self) -> int:
        """Return the position of the last event that the message reports."""
        return self.changes[-1].position


async def lease_endpoints(
    connection: Connection,
    lease: UUID,
    channel: str,
    *,
    lease_seconds: float,
    limit: int,
    skipped_tenants: Sequence[int] = (),
    proven_only: bool = False,
    proven_only_tenants: Sequence[int] = (),
) -> list[LeasedEndpoint]:
    """Lease endpoints with due deliveries, in the caller's transaction.

    Args:
        connection: A connection inside a transaction.
        lease: A new random id.
        channel: The channel of the endpoints.
        lease_seconds: The time until another sender may take them.
        limit: The limit of endpoints.
        skipped_tenants: Tenants that use their whole share.
        proven_only: True to lease only endpoints whose concurrency is above 1.
        proven_only_tenants: Tenants for which alone `proven_only` applies.
    """
    await configure_transaction(connection)
    rows = await connection.fetch(
        _LEASE_ENDPOINTS,
        lease,
        limit,
        list(skipped_tenants),
        proven_only,
        lease_seconds,
        list(proven_only_tenants),
        channel,
    )
    return [
        LeasedEndpoint(
            row["tenant_id"],
            row["subscription_id"],
            lease,
            EndpointHealth(row["consecutive_failures"], row["concurrency"]),
            _decode_subscription(row["state"]),
            row["version"],
            row["projected_position"],
        )
        for row in rows
    ]


async def take_deliveries(
    connection: Connection, endpoints: Iterable[tuple[LeasedEndpoint, int]], coalesce_seconds: float
) -> list[DueDelivery]:
    """Return the due deliveries of leased endpoints, in the transaction of the lease.

    Args:
        connection: A connection inside a transaction.
        endpoints: Each with its limit of deliveries.
        coalesce_seconds: Changes of a stream within this time of the first share one message.
    """
    wanted = [(endpoint.tenant_id, endpoint.subscription_id, limit) for endpoint, limit in endpoints]
    if not wanted:
        return []
    rows = await connection.fetch(_TAKE_DELIVERIES, *to_columns(wanted), coalesce_seconds)
    return [
        DueDelivery(
            row["tenant_id"],
            row["intent_id"],
            row["subscription_id"],
            row["stream_kind"],
            row["stream_id"],
            row["attempts_in_round"],
            row["attempts_total"],
            [
                Change(row["position"], row["topic"], row["created_at"]),
                *map(Change, row["positions"] or (), row["topics"] or (), row["times"] or ()),
            ],
        )
        for row in rows
    ]


def _decode_subscription(state: str | None) -> Subscription | None:
    """Return the read model's state; `None` if newer code wrote it, so that a newer sender has to serve it."""
    try:
        return None if state is None else _decode(state)
    except msgspec.MsgspecError:
        return None

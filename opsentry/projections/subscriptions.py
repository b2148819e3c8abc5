"""The projection `subscriptions`: subscriptions, as `/subscriptions…` serves them."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

import asyncpg
import msgspec

from opsentry.domain import subscription
from opsentry.domain.subscription import Subscription, SubscriptionEvent
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection, fetch_one
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import (
    Replay,
    Streams,
    Table,
    WriterRows,
    by_stream,
    continued,
    replay_streams,
)
from opsentry.projections.page_request import PageRequest

# Selects the stored rows of these subscriptions.
_LOAD = """
SELECT subscription_id, version, created_at, state FROM subscriptions
WHERE tenant_id = $1 AND subscription_id = ANY($2)
"""

_MATCHES = """tenant_id = $1 AND status <> 'removed'
    AND ($2::text IS NULL OR channel = $2) AND ($3::text IS NULL OR status = $3)"""

# Selects a page of subscriptions that are not removed, newest first. $2: a channel, $3: a status; NULL for any.
_SELECT_PAGE = f"""
WITH page AS (
    SELECT subscription_id, body FROM subscriptions WHERE {_MATCHES} ORDER BY subscription_id DESC LIMIT $4 OFFSET $5)
SELECT fresh.*, (SELECT count(*) FROM subscriptions WHERE {_MATCHES}) AS total,
    convert_to((SELECT string_agg(body, ',' ORDER BY subscription_id DESC) FROM page), 'UTF8') AS items
FROM {freshness("subscriptions")}
"""

# Selects the subscription $2 unless it is removed.
_SELECT_ONE = f"""
SELECT fresh.*, s.status, s.version::text AS etag, convert_to(s.body, 'UTF8') AS body
FROM {freshness("subscriptions")}
LEFT JOIN subscriptions s ON s.tenant_id = $1 AND s.subscription_id = $2 AND s.status <> 'removed'
"""

# Selects $5 subscriptions of all tenants that have been pending for more than $1 seconds, oldest first, after the key
# ($2, $3, $4). Rows of a halted projection are stale and skipped. A subquery looks that up for each row: the planner
# could turn a join into a scan of the checkpoints of all tenants.
_SELECT_UNCONFIRMED = """
SELECT created_at, tenant_id, subscription_id FROM subscriptions s
WHERE status = 'pending' AND created_at < statement_timestamp() - $1 * interval '1 second'
    AND (created_at, tenant_id, subscription_id) > ($2, $3, $4) AND (
        SELECT c.halted_at FROM checkpoints c
        WHERE c.tenant_id = s.tenant_id AND c.projection = 'subscriptions') IS NULL
ORDER BY created_at, tenant_id, subscription_id LIMIT $5
"""

# Selects the subscriptions with the target $3 of channel $2 that are not removed, newest first.
_SELECT_BY_TARGET = f"""
SELECT fresh.*, found.* FROM {freshness("subscriptions")} CROSS JOIN (
    SELECT array_agg(subscription_id ORDER BY subscription_id DESC) AS ids,
        array_agg(status ORDER BY subscription_id DESC) AS statuses,
        array_agg(extract(epoch FROM clock_timestamp() - created_at)::float8 ORDER BY subscription_id DESC) AS ages
    FROM subscriptions WHERE tenant_id = $1 AND channel = $2 AND target = $3 AND status <> 'removed') AS found
"""


class SubscriptionView(msgspec.Struct, kw_only=True):
    """A subscription as the API renders it: without secrets and, once removed, without its target."""

    id: int
    channel: str
    target: str
    audience: str
    notify_incidents: bool
    notify_maintenance: bool
    service_ids: tuple[int, ...]
    min_severity: str
    status: str
    disabled_reason: str | None
    created_at: datetime
    updated_at: datetime


class SubscriptionPageFilter(NamedTuple):
    """The subscriptions that a list shows; a field that is `None` admits all.

    Attributes:
        channel: The name of a notification channel.
        status: One of `subscription.STATUSES` but `removed`.
    """

    channel: str | None = None
    status: str | None = None


class _ProjectedSubscription(NamedTuple):
    """The aggregate's state with the times of its first and last event by the ledger's clock."""

    id: int
    state: Subscription
    created_at: datetime
    updated_at: datetime

    def view(self) -> SubscriptionView:
        fields = {name: getattr(self.state, name) for name in _STATE_FIELDS}
        return SubscriptionView(id=self.id, created_at=self.created_at, updated_at=self.updated_at, **fields)


_STATE_FIELDS = [name for name in SubscriptionView.__struct_fields__ if name in Subscription.__struct_fields__]
_decode_state = msgspec.json.Decoder(Subscription).decode


def _evolve(projected: _ProjectedSubscription | None, recorded: RecordedEvent) -> _ProjectedSubscription:
    state = subscription.evolve(
        None if projected is None else projected.state, cast("SubscriptionEvent", recorded.event)
    )
    created_at = recorded.recorded_at if projected is None else projected.created_at
    return _ProjectedSubscription(recorded.stream_id, state, created_at, recorded.recorded_at)


def render(history: Sequence[RecordedEvent]) -> bytes:
    """Return the subscription as JSON: the same bytes that a read of its row gives.

    Args:
        history: All events of the subscription, in order; at least one.
    """
    ((projected, _),) = replay_streams(by_stream(history), {}, _evolve)
    return msgspec.json.encode(projected.view())


SUBSCRIPTIONS = Table(
    "subscriptions",
    ("subscription_id", "version", "status", "channel", "target", "created_at", "state", "body"),
    keys=1,
    of_streams={subscription.KIND: "subscription_id BETWEEN $2 AND $3"},
)


class Subscriptions:
    """The projection `subscriptions`."""

    name = "subscriptions"
    version = 1
    writer = "write_subscriptions"
    kinds = (subscription.KIND,)
    tables = (SUBSCRIPTIONS,)

    async def prepare(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> WriterRows:
        """Return a row for each subscription."""
        streams = by_stream(events)
        stored = {}
        if ids := continued(streams):
            for stream_id, version, created_at, state in await connection.fetch(_LOAD, tenant_id, ids):
                # `updated_at` is not stored. A row without a newer event is not written, and a newer event sets it.
                projected = _ProjectedSubscription(stream_id, _decode_state(state), created_at, created_at)
                stored[stream_id] = (version, projected)
        return [_rows(streams, stored)]

    def replayer(self) -> Replay:
        """Return a function that computes the rows of whole streams."""
        return lambda _kind, streams: {SUBSCRIPTIONS.name: _rows(streams, {})}


def _rows(streams: Streams, stored: Mapping[int, tuple[int, _ProjectedSubscription]]) -> list[tuple[Any, ...]]:
    return [
        (
            projected.id,
            version,
            projected.state.status,
            projected.state.channel,
            projected.state.target,
            projected.created_at,
            msgspec.json.encode(projected.state).decode(),
            msgspec.json.encode(projected.view()).decode(),
        )
        for projected, version in replay_streams(streams, stored, _evolve)
    ]


async def select_subscriptions(
    connection: Connection, tenant_id: int, filter_: SubscriptionPageFilter, page: PageRequest
) -> asyncpg.Record:
    """Return `total` and `items` (the inside of a JSON array) of the tenant's subscriptions, newest first."""
    return await fetch_one(connection, _SELECT_PAGE, tenant_id, *filter_, *page)


async def select_subscription(connection: Connection, tenant_id: int, subscription_id: int) -> asyncpg.Record:
    """Return `body`, `etag` and `status` of a subscription; NULL if it does not exist or is removed."""
    return await fetch_one(connection, _SELECT_ONE, tenant_id, subscription_id)


async def select_by_target(connection: Connection, tenant_id: int, channel: str, target: str) -> asyncpg.Record:
    """Return `ids`, `statuses` and `ages` (in seconds) of the subscriptions with this target, newest first.

    All three are NULL if there is none. `target` is the one that responses show.
    """
    return await fetch_one(connection, _SELECT_BY_TARGET, tenant_id, channel, target)


class UnconfirmedSubscription(NamedTuple):
    """A pending subscription; also the key after which the next batch starts."""

    created_at: datetime
    tenant_id: int
    subscription_id: int


FIRST_UNCONFIRMED = UnconfirmedSubscription(datetime.fromtimestamp(0, UTC), 0, 0)
"""The key that comes before all unconfirmed subscriptions."""


async def select_unconfirmed(
    connection: Connection, seconds: float, limit: int, after: UnconfirmedSubscription = FIRST_UNCONFIRMED
) -> list[UnconfirmedSubscription]:
    """Return subscriptions of all tenants that have been pending for longer than `seconds`, oldest first.

    Args:
        connection: The database.
        seconds: The age at least.
        limit: The number of subscriptions at most.
        after: The last subscription of the batch before.
    """
    rows = await connection.fetch(_SELECT_UNCONFIRMED, seconds, *after, limit)
    return [UnconfirmedSubscription(*row) for row in rows]

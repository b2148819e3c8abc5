"""Subscriptions: serves `/subscriptions…`, and tells the sender whom it sends to."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

import asyncpg
import msgspec

from opsentry.domain import subscription
from opsentry.domain.subscription import Subscription, SubscriptionEvent
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import Replay, Streams, Table, by_stream, continued, replay_streams
from opsentry.projections.page_request import PageRequest

# The rows that this batch goes on from.
_LOAD = """
SELECT subscription_id, version, created_at, state FROM subscriptions
WHERE tenant_id = $1 AND subscription_id = ANY($2)
"""

# One row for each subscription, whatever the number of its events in the batch.
_STORE = """
INSERT INTO subscriptions (tenant_id, subscription_id, version, status, channel, target, created_at, state, body)
SELECT $1, * FROM unnest($2::bigint[], $3::int[], $4::text[], $5::text[], $6::text[], $7::timestamptz[], $8::text[],
                         $9::text[])
ON CONFLICT (tenant_id, subscription_id) DO UPDATE SET
    version = excluded.version, status = excluded.status, target = excluded.target, state = excluded.state,
    body = excluded.body
WHERE subscriptions.version < excluded.version
"""

_FOUND = """tenant_id = $1 AND status <> 'removed'
    AND ($2::text IS NULL OR channel = $2) AND ($3::text IS NULL OR status = $3)"""

# A page of those that there are, the newest first, as one JSON array's inside. $2 channel, $3 status: NULL for any.
_LIST = f"""
WITH page AS (
    SELECT subscription_id, body FROM subscriptions WHERE {_FOUND} ORDER BY subscription_id DESC LIMIT $4 OFFSET $5)
SELECT fresh.*, (SELECT count(*) FROM subscriptions WHERE {_FOUND}) AS total,
    convert_to((SELECT string_agg(body, ',' ORDER BY subscription_id DESC) FROM page), 'UTF8') AS items
FROM {freshness("subscriptions")}
"""

# One that there is.
_ONE = f"""
SELECT fresh.*, s.status, s.version::text AS etag, convert_to(s.body, 'UTF8') AS body
FROM {freshness("subscriptions")}
LEFT JOIN subscriptions s ON s.tenant_id = $1 AND s.subscription_id = $2 AND s.status <> 'removed'
"""

# What the sender has to know of these, of removed ones too.
_FOR_SENDING = "SELECT subscription_id, state FROM subscriptions WHERE tenant_id = $1 AND subscription_id = ANY($2)"

# Which have been pending for more than $1 seconds, of all tenants, the oldest first; some at a time, those behind
# ($2, $3, $4). Rows of a halted projection are old and stay so. That is asked row by row: joined, a table with rows of
# every tenant could be read as a whole.
_UNCONFIRMED = """
SELECT created_at, tenant_id, subscription_id FROM subscriptions s
WHERE status = 'pending' AND created_at < statement_timestamp() - $1 * interval '1 second'
    AND (created_at, tenant_id, subscription_id) > ($2, $3, $4) AND (
        SELECT c.halted_at FROM checkpoints c
        WHERE c.tenant_id = s.tenant_id AND c.projection = 'subscriptions') IS NULL
ORDER BY created_at, tenant_id, subscription_id LIMIT $5
"""

# Which of those that there are have a target, the newest first.
_OF_TARGET = f"""
SELECT fresh.*, found.* FROM {freshness("subscriptions")} CROSS JOIN (
    SELECT array_agg(subscription_id ORDER BY subscription_id DESC) AS ids,
        array_agg(status ORDER BY subscription_id DESC) AS statuses,
        array_agg(extract(epoch FROM clock_timestamp() - created_at)::float8 ORDER BY subscription_id DESC) AS ages
    FROM subscriptions WHERE tenant_id = $1 AND channel = $2 AND target = $3 AND status <> 'removed') AS found
"""


class SubscriptionView(msgspec.Struct, kw_only=True):
    """A subscription as the API answers it: no secret is in it, of a removed one no target either."""

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


class _Known(NamedTuple):
    """What is folded: the state, and by the ledger's clock when it began and when it last changed."""

    id: int
    state: Subscription
    created_at: datetime
    updated_at: datetime

    def view(self) -> SubscriptionView:
        """Return the answer."""
        own = {name: getattr(self.state, name) for name in _SHOWN}
        return SubscriptionView(id=self.id, created_at=self.created_at, updated_at=self.updated_at, **own)


_SHOWN = [name for name in SubscriptionView.__struct_fields__ if name in Subscription.__struct_fields__]
_decode = msgspec.json.Decoder(Subscription).decode


def _evolve(known: _Known | None, recorded: RecordedEvent) -> _Known:
    after = subscription.evolve(None if known is None else known.state, cast("SubscriptionEvent", recorded.event))
    created_at = recorded.recorded_at if known is None else known.created_at
    return _Known(recorded.stream_id, after, created_at, recorded.recorded_at)


def render(history: Sequence[RecordedEvent]) -> bytes:
    """Return the subscription as its events, all of them, leave it."""
    ((known, _),) = replay_streams(by_stream(history), {}, _evolve)
    return msgspec.json.encode(known.view())


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
    kinds = (subscription.KIND,)
    tables = (SUBSCRIPTIONS,)

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Write one row for each subscription touched."""
        streams = by_stream(events)
        stored = {}
        if ids := continued(streams):
            for number, version, created_at, state in await connection.fetch(_LOAD, tenant_id, ids):
                # When it last changed is that of an event to come, or the row is not written.
                stored[number] = (version, _Known(number, _decode(state), created_at, created_at))
        await connection.execute(_STORE, tenant_id, *zip(*_rows(streams, stored), strict=True))

    def replayer(self) -> Replay:
        """Return a function that gives the rows of whole streams."""
        return lambda _kind, streams: {SUBSCRIPTIONS.name: _rows(streams, {})}


def _rows(streams: Streams, stored: Mapping[int, tuple[int, _Known]]) -> list[tuple[Any, ...]]:
    return [
        (
            known.id,
            version,
            known.state.status,
            known.state.channel,
            known.state.target,
            known.created_at,
            msgspec.json.encode(known.state).decode(),
            msgspec.json.encode(known.view()).decode(),
        )
        for known, version in replay_streams(streams, stored, _evolve)
    ]


async def select_subscriptions(
    connection: Connection, tenant_id: int, filter_: SubscriptionPageFilter, page: PageRequest
) -> asyncpg.Record:
    """Return `total` and `items` (the inside of a JSON array) of the tenant's subscriptions, the newest first."""
    return await connection.fetchrow(_LIST, tenant_id, *filter_, *page)


async def select_subscription(connection: Connection, tenant_id: int, subscription_id: int) -> asyncpg.Record:
    """Return `body`, `etag` and `status` of one subscription; all NULL if there is none, or none any more."""
    return await connection.fetchrow(_ONE, tenant_id, subscription_id)


async def select_for_sending(connection: Connection, tenant_id: int, ids: Iterable[int]) -> list[asyncpg.Record]:
    """Return `subscription_id` and `state` (a `Subscription` as JSON) of these, removed ones among them."""
    return list(await connection.fetch(_FOR_SENDING, tenant_id, list(ids)))


async def select_by_target(connection: Connection, tenant_id: int, channel: str, target: str) -> asyncpg.Record:
    """Return `ids`, `statuses` and `ages` (in seconds) of subscriptions with this target, the newest first.

    All three are NULL if there are none. The target is the one that answers show.
    """
    return await connection.fetchrow(_OF_TARGET, tenant_id, channel, target)


class Unconfirmed(NamedTuple):
    """A subscription that waits for whoever owns its target, and since when."""

    created_at: datetime
    tenant_id: int
    subscription_id: int


FIRST = Unconfirmed(datetime.fromtimestamp(0, UTC), 0, 0)


async def select_unconfirmed(
    connection: Connection, seconds: float, limit: int, after: Unconfirmed = FIRST
) -> list[Unconfirmed]:
    """Return subscriptions of all tenants that have been pending for longer than that, the oldest first."""
    return [Unconfirmed(*row) for row in await connection.fetch(_UNCONFIRMED, seconds, *after, limit)]

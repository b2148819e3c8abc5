"""Notification intents: who must be told of which event, derived from the log, subscriptions and suppression.

The only projection that looks at more than one stream: at subscriptions and active windows, as of each event. It
keeps what it has to know of them as its own rows.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import TypeVar
from uuid import UUID

import asyncpg
import msgspec

from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.incident import (
    IncidentOpened,
    IncidentReopened,
    IncidentResolved,
    IncidentServicesChanged,
    IncidentSeverityChanged,
    IncidentStatusChanged,
    IncidentUpdated,
    IncidentVisibilityChanged,
)
from opsentry.domain.maintenance import (
    MaintenanceCancelled,
    MaintenanceCompleted,
    MaintenanceScheduled,
    MaintenanceStarted,
    MaintenanceUpdated,
)
from opsentry.domain.status import LEVELS
from opsentry.domain.subscription import Subscription, SubscriptionCreated, SubscriptionRemoved
from opsentry.events.codec import RecordedEvent
from opsentry.postgres import Connection

# All of a tenant's subscriptions and active windows, which are few.
_LOAD_FEW = "SELECT kind, id, state FROM outbox_state WHERE tenant_id = $1 AND kind IN ('subscription', 'active')"

# The incidents and windows that this batch goes on from, each by the index; see the same in incidents.
_LOAD = """
SELECT s.* FROM unnest($2::text[], $3::bigint[]) AS wanted (kind, id) CROSS JOIN LATERAL (
    SELECT kind, id, state FROM outbox_state
    WHERE tenant_id = $1 AND kind = wanted.kind AND id = wanted.id LIMIT 1) AS s
"""

_STORE = """
INSERT INTO outbox_state (tenant_id, kind, id, state) SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::text[])
ON CONFLICT (tenant_id, kind, id) DO UPDATE SET state = excluded.state
"""

_FORGET = """
DELETE FROM outbox_state WHERE tenant_id = $1 AND (kind, id) IN (SELECT * FROM unnest($2::text[], $3::bigint[]))
"""

_STORE_INTENTS = """
INSERT INTO outbox_intents (tenant_id, intent_id, seq, subscription_id, channel, topic, stream_kind, stream_id,
    suppressed, created_at)
SELECT $1, *
FROM unnest($2::uuid[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[], $8::bigint[], $9::bool[],
            $10::timestamptz[])
ON CONFLICT DO NOTHING
"""

_CLEAR = "DELETE FROM outbox_intents WHERE tenant_id = $1"
_CLEAR_STATE = "DELETE FROM outbox_state WHERE tenant_id = $1"

# What readiness asks, of all tenants: intents that wait to be sent, and events that the outbox has not seen yet,
# be it behind or parked. Counting pending ones stops where the answer no longer changes.
_BACKLOG = """
SELECT
    (SELECT count(*) FROM (SELECT FROM outbox_intents WHERE NOT suppressed LIMIT $1) AS waiting) AS pending,
    (SELECT extract(epoch FROM clock_timestamp() - min(created_at)) FROM outbox_intents WHERE NOT suppressed)::float8
        AS pending_seconds,
    coalesce(lag.events, 0)::bigint AS unseen,
    extract(epoch FROM clock_timestamp() - lag.since)::float8 AS unseen_seconds
FROM (
    SELECT sum(h.seq - coalesce(c.position, 0)) AS events, min(e.recorded_at) AS since
    FROM heads h
    LEFT JOIN checkpoints c ON c.tenant_id = h.tenant_id AND c.projection = 'outbox'
    JOIN events e ON e.tenant_id = h.tenant_id AND e.seq = coalesce(c.position, 0) + 1
    WHERE h.seq > coalesce(c.position, 0)
) AS lag
"""

_TOLD = (
    IncidentOpened,
    IncidentUpdated,
    IncidentStatusChanged,
    IncidentSeverityChanged,
    IncidentResolved,
    IncidentReopened,
    MaintenanceScheduled,
    MaintenanceUpdated,
    MaintenanceStarted,
    MaintenanceCompleted,
    MaintenanceCancelled,
)


class Topic(msgspec.Struct, kw_only=True):
    """What the outbox has to know of an incident or a window: none of its words."""

    visibility: str
    service_ids: tuple[int, ...]
    severity: str | None = None
    suppress_alerts: bool = False


class Wish(msgspec.Struct, frozen=True):
    """A subscription and the position since which it holds: it is not told of what came before."""

    since: int
    subscription: Subscription


class Intent(msgspec.Struct, frozen=True):
    """One message that must be sent, or that was withheld by a window with `suppress_alerts`."""

    intent_id: UUID
    seq: int
    subscription_id: int
    channel: str
    topic: str
    stream_kind: str
    stream_id: int
    suppressed: bool


Key = tuple[str, int]


class State(msgspec.Struct):
    """Subscriptions, active windows that suppress alerts, and the incidents and windows of a batch."""

    wishes: dict[int, Wish] = msgspec.field(default_factory=dict)
    active: dict[int, Topic] = msgspec.field(default_factory=dict)
    topics: dict[Key, Topic] = msgspec.field(default_factory=dict)
    changed: dict[Key, msgspec.Struct] = msgspec.field(default_factory=dict)
    forgotten: set[Key] = msgspec.field(default_factory=set)

    def remember(self, key: Key, value: msgspec.Struct) -> None:
        """Note that `value` must be stored."""
        self.changed[key] = value
        self.forgotten.discard(key)

    def forget(self, key: Key) -> None:
        """Note that what is stored under `key` is over."""
        self.changed.pop(key, None)
        self.forgotten.add(key)


def derive(state: State, recorded: RecordedEvent) -> list[Intent]:
    """Fold one event into `state` and return the intents that it gives rise to."""
    if recorded.kind == subscription.KIND:
        _follow_subscription(state, recorded)
        return []
    topic = _follow_topic(state, recorded)
    if not state.wishes or recorded.meta.silent or not isinstance(recorded.event, _TOLD):
        return []
    suppressed = recorded.kind == incident.KIND and any(
        topic.service_ids and set(topic.service_ids) <= set(window.service_ids) for window in state.active.values()
    )
    return [
        Intent(
            intent_id=intent_id(recorded, subscription_id, wish.subscription.channel),
            seq=recorded.seq,
            subscription_id=subscription_id,
            channel=wish.subscription.channel,
            topic=recorded.event.TYPE,
            stream_kind=recorded.kind,
            stream_id=recorded.stream_id,
            suppressed=suppressed,
        )
        for subscription_id, wish in sorted(state.wishes.items())
        if wish.since < recorded.seq and _wants(wish.subscription, recorded, topic)
    ]


def intent_id(recorded: RecordedEvent, subscription_id: int, channel: str) -> UUID:
    """Return the id that this event, subscription and channel always get (an RFC 9562 version 8 UUID)."""
    name = f"{recorded.tenant_id}:{recorded.seq}:{subscription_id}:{channel}"
    digest = bytearray(sha256(name.encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return UUID(bytes=bytes(digest))


def _follow_subscription(state: State, recorded: RecordedEvent) -> None:
    key = (subscription.KIND, recorded.stream_id)
    match recorded.event:
        case SubscriptionCreated() as created:
            value = Wish(recorded.seq, subscription.evolve(None, created))
            state.wishes[recorded.stream_id] = value
            state.remember(key, value)
        case SubscriptionRemoved():
            state.wishes.pop(recorded.stream_id, None)
            state.forget(key)


def _follow_topic(state: State, recorded: RecordedEvent) -> Topic:
    key = (recorded.kind, recorded.stream_id)
    before = state.topics.get(key)
    topic = before
    match recorded.event:
        case IncidentOpened() as event:
            topic = Topic(visibility=event.visibility, service_ids=event.service_ids, severity=event.severity)
        case MaintenanceScheduled() as event:
            topic = Topic(
                visibility=event.visibility, service_ids=event.service_ids, suppress_alerts=event.suppress_alerts
            )
    if topic is None:
        raise ValueError(f"{recorded.event.TYPE} without a beginning")
    match recorded.event:
        case IncidentVisibilityChanged(visibility=visibility):
            topic = msgspec.structs.replace(topic, visibility=visibility)
        case IncidentServicesChanged(service_ids=service_ids):
            topic = msgspec.structs.replace(topic, service_ids=service_ids)
        case IncidentSeverityChanged(severity=severity):
            topic = msgspec.structs.replace(topic, severity=severity)
        case MaintenanceStarted() if topic.suppress_alerts:
            state.active[recorded.stream_id] = topic
            state.remember(("active", recorded.stream_id), topic)
        case MaintenanceCompleted():
            state.active.pop(recorded.stream_id, None)
            state.forget(("active", recorded.stream_id))
    if topic is not before:
        state.topics[key] = topic
        state.remember(key, topic)
    return topic


def _wants(wish: Subscription, recorded: RecordedEvent, topic: Topic) -> bool:
    if not (wish.incidents if recorded.kind == incident.KIND else wish.maintenance):
        return False
    event = recorded.event
    public = topic.visibility == "public" and not (
        isinstance(event, IncidentUpdated | MaintenanceUpdated) and not event.is_public
    )
    if wish.audience == "public" and not public:
        return False
    if wish.service_ids and not set(wish.service_ids) & set(topic.service_ids):
        return False
    return topic.severity is None or LEVELS[topic.severity] >= LEVELS[wish.lowest_severity]


class Outbox:
    """The projection `outbox`."""

    name = "outbox"
    kinds = frozenset({incident.KIND, maintenance.KIND, subscription.KIND})
    tables = ("outbox_intents", "outbox_state")

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Write the intents that `events` give rise to, and what has to be known for the next ones."""
        begun = {(e.kind, e.stream_id) for e in events if e.version == 1}
        state = await _load(connection, tenant_id, {(e.kind, e.stream_id) for e in events} - begun)
        intents = [intent for event in events for intent in derive(state, event)]
        if state.changed:
            kinds, ids = zip(*state.changed, strict=True)
            states = [msgspec.json.encode(value).decode() for value in state.changed.values()]
            await connection.execute(_STORE, tenant_id, kinds, ids, states)
        if state.forgotten:
            kinds, ids = zip(*sorted(state.forgotten), strict=True)
            await connection.execute(_FORGET, tenant_id, kinds, ids)
        if intents:
            recorded_at = {event.seq: event.recorded_at for event in events}
            await connection.execute(
                _STORE_INTENTS,
                tenant_id,
                *([getattr(intent, column) for intent in intents] for column in Intent.__struct_fields__),
                [recorded_at[intent.seq] for intent in intents],
            )

    async def clear(self, connection: Connection, tenant_id: int) -> None:
        """Delete all of the tenant's rows."""
        await connection.execute(_CLEAR, tenant_id)
        await connection.execute(_CLEAR_STATE, tenant_id)


_S = TypeVar("_S", bound=msgspec.Struct)


async def _load(connection: Connection, tenant_id: int, wanted: Iterable[Key]) -> State:
    rows = list(await connection.fetch(_LOAD_FEW, tenant_id))
    if keys := sorted(wanted):
        rows += await connection.fetch(_LOAD, tenant_id, [kind for kind, _ in keys], [id_ for _, id_ in keys])
    state = State()
    for row in rows:
        match row["kind"]:
            case "subscription":
                state.wishes[row["id"]] = _decode(row, Wish)
            case "active":
                state.active[row["id"]] = _decode(row, Topic)
            case _:
                state.topics[row["kind"], row["id"]] = _decode(row, Topic)
    return state


def _decode(row: asyncpg.Record, type_: type[_S]) -> _S:
    return msgspec.json.decode(row["state"], type=type_)


async def backlog(connection: Connection, at_most: int) -> asyncpg.Record:
    """Return how much of all tenants waits to be told.

    `pending` intents (counted up to `at_most`) and the age of the oldest, `unseen` events and the age of the oldest;
    ages are in seconds, NULL where nothing waits.
    """
    return await connection.fetchrow(_BACKLOG, at_most)

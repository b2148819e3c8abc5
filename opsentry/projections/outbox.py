"""Notification intents: who must be told of which event, derived from the log, subscriptions and suppression.

The only projection that looks at more than one stream: at subscriptions and active windows, as of each event. It
keeps what it has to know of them as its own rows.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, Generic, NamedTuple, TypeVar
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
from opsentry.projections.projection import Rows, Streams, Table, by_stream

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
# be it behind, parked or paused. Counting pending ones stops where the answer no longer changes. Only tenants with
# events that some projection has not seen are looked at, so it costs the same however many there are. LIMIT keeps them
# from being joined by scans of whole tables, the ledger's own among them, where statistics are of another time.
_BACKLOG = """
SELECT
    (SELECT count(*) FROM (SELECT FROM outbox_intents WHERE NOT suppressed LIMIT $1) AS waiting) AS pending,
    (SELECT extract(epoch FROM clock_timestamp() - min(created_at)) FROM outbox_intents WHERE NOT suppressed)::float8
        AS pending_seconds,
    coalesce(lag.events, 0)::bigint AS unseen,
    extract(epoch FROM clock_timestamp() - lag.since)::float8 AS unseen_seconds,
    lag.parked
FROM (
    SELECT sum(h.seq - coalesce(c.position, 0)) AS events, min(e.recorded_at) AS since,
        count(*) FILTER (WHERE c.parked_seq IS NOT NULL) AS parked
    FROM (
        SELECT tenant_id FROM unprojected
        UNION SELECT tenant_id FROM checkpoints WHERE projection = 'outbox' AND parked_seq IS NOT NULL
        UNION SELECT c.tenant_id FROM projections p CROSS JOIN LATERAL (
            SELECT tenant_id FROM checkpoints WHERE projection = p.name OFFSET 0) AS c
            WHERE p.name = 'outbox' AND p.paused) AS t
    CROSS JOIN LATERAL (SELECT seq FROM heads WHERE tenant_id = t.tenant_id LIMIT 1) AS h
    LEFT JOIN LATERAL (
        SELECT position, parked_seq FROM checkpoints
        WHERE tenant_id = t.tenant_id AND projection = 'outbox' LIMIT 1) AS c ON true
    CROSS JOIN LATERAL (
        SELECT recorded_at FROM events WHERE tenant_id = t.tenant_id AND seq > coalesce(c.position, 0)
        ORDER BY seq LIMIT 1) AS e
    WHERE h.seq > coalesce(c.position, 0)
) AS lag
"""

_TOLD = frozenset(
    {
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
    }
)


_CHANGES = frozenset(
    {
        IncidentOpened,
        MaintenanceScheduled,
        IncidentVisibilityChanged,
        IncidentServicesChanged,
        IncidentSeverityChanged,
    }
)


class Topic(msgspec.Struct, kw_only=True, gc=False):
    """What the outbox has to know of an incident or a window: none of its words."""

    visibility: str
    service_ids: tuple[int, ...]
    severity: str | None = None
    suppress_alerts: bool = False


class Wish(msgspec.Struct, frozen=True):
    """A subscription and the position since which it holds: it is not told of what came before."""

    since: int
    subscription: Subscription


class Intent(NamedTuple):
    """One message that must be sent, or that was withheld by a window with `suppress_alerts`; a row of its table."""

    intent_id: UUID
    seq: int
    subscription_id: int
    channel: str
    topic: str
    stream_kind: str
    stream_id: int
    suppressed: bool
    created_at: datetime


Key = tuple[str, int]

_FOR_EVER = 2**63

_T = TypeVar("_T")


class _Span(NamedTuple, Generic[_T]):
    """What holds for the events after position `since` and before `until`."""

    since: int
    until: int
    what: _T


class Derived(NamedTuple):
    """What events give rise to: intents, what has to be known for the next events, and what no longer has to."""

    intents: list[Intent]
    known: dict[Key, msgspec.Struct]
    forgotten: set[Key]


class Derivation:
    """Derives intents from streams, kind by kind: subscriptions, then windows, then incidents.

    In this order all that an event of a stream depends on is known, as of that event's own position, however the
    streams interleave in the ledger. So they may be read one after the other, as a rebuild does.

    Args:
        wishes: Subscriptions that there are before the events to come, by id.
        active: Windows that are active then and suppress alerts, by id.
    """

    def __init__(self, wishes: Mapping[int, Wish], active: Mapping[int, Topic]) -> None:
        self._wishes = {number: _Span(wish.since, _FOR_EVER, wish.subscription) for number, wish in wishes.items()}
        self._windows = {number: _Span(0, _FOR_EVER, frozenset(topic.service_ids)) for number, topic in active.items()}
        self._steps: tuple[list[int], list[tuple[frozenset[int], ...]]] | None = None

    def follow(self, kind: str, streams: Streams, topics: Mapping[int, Topic]) -> Derived:
        """Fold the streams' events; `topics` is what is known of those that do not begin here."""
        derived = Derived([], {}, set())
        for number, stream in streams.items():
            if kind == subscription.KIND:
                self._follow_subscription(number, stream, derived)
                continue
            before = topic = topics.get(number)
            for recorded in stream:
                topic = _evolve(topic, recorded)
                if kind == maintenance.KIND:
                    self._follow_window(number, recorded, topic, derived)
                if self._wishes and not recorded.meta.silent and type(recorded.event) in _TOLD:
                    derived.intents.extend(self._intents(recorded, topic))
            if topic is not None and topic is not before:
                derived.known[kind, number] = topic
        return derived

    def _follow_subscription(self, number: int, stream: Sequence[RecordedEvent], derived: Derived) -> None:
        key = (subscription.KIND, number)
        for recorded in stream:
            match recorded.event:
                case SubscriptionCreated() as created:
                    wish = Wish(recorded.seq, subscription.evolve(None, created))
                    self._wishes[number] = _Span(recorded.seq, _FOR_EVER, wish.subscription)
                    derived.known[key] = wish
                case SubscriptionRemoved():
                    _end(self._wishes, number, recorded.seq)
                    derived.known.pop(key, None)
                    derived.forgotten.add(key)

    def _follow_window(self, number: int, recorded: RecordedEvent, topic: Topic, derived: Derived) -> None:
        key = ("active", number)
        match recorded.event:
            case MaintenanceStarted() if topic.suppress_alerts:
                self._windows[number] = _Span(recorded.seq, _FOR_EVER, frozenset(topic.service_ids))
                derived.known[key] = topic
            case MaintenanceCompleted():
                _end(self._windows, number, recorded.seq)
                derived.known.pop(key, None)
                derived.forgotten.add(key)
            case _:
                return
        self._steps = None

    def _intents(self, recorded: RecordedEvent, topic: Topic) -> list[Intent]:
        seq = recorded.seq
        told = [
            (number, wish.channel)
            for number, (since, until, wish) in self._wishes.items()
            if since < seq < until and _wants(wish, recorded, topic)
        ]
        if not told:
            return []
        suppressed = (
            recorded.kind == incident.KIND
            and bool(topic.service_ids)
            and any(services.issuperset(topic.service_ids) for services in self._suppressing(seq))
        )
        return [
            Intent(
                intent_id=intent_id(recorded, number, channel),
                seq=seq,
                subscription_id=number,
                channel=channel,
                topic=recorded.event.TYPE,
                stream_kind=recorded.kind,
                stream_id=recorded.stream_id,
                suppressed=suppressed,
                created_at=recorded.recorded_at,
            )
            for number, channel in told
        ]

    def _suppressing(self, seq: int) -> Sequence[frozenset[int]]:
        """Return the services of each window that suppresses alerts at this position."""
        if self._steps is None:
            # Few are active at once, however many there ever were: what holds between one change and the next.
            edges = [(span.since, number) for number, span in self._windows.items()]
            edges += [(span.until, number) for number, span in self._windows.items()]
            positions: list[int] = []
            steps: list[tuple[frozenset[int], ...]] = [()]
            active: dict[int, frozenset[int]] = {}
            for position, number in sorted(edges):
                if active.pop(number, None) is None:
                    active[number] = self._windows[number].what
                positions.append(position)
                steps.append(tuple(active.values()))
            self._steps = positions, steps
        positions, steps = self._steps
        return steps[bisect_right(positions, seq)]


def _end(spans: dict[int, _Span[_T]], number: int, seq: int) -> None:
    if number in spans:
        spans[number] = spans[number]._replace(until=seq)


def intent_id(recorded: RecordedEvent, subscription_id: int, channel: str) -> UUID:
    """Return the id that this event, subscription and channel always get (an RFC 9562 version 8 UUID)."""
    name = f"{recorded.tenant_id}:{recorded.seq}:{subscription_id}:{channel}"
    digest = bytearray(sha256(name.encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return UUID(bytes=bytes(digest))


def _evolve(topic: Topic | None, recorded: RecordedEvent) -> Topic:
    """Fold one event of an incident or a window."""
    if topic is not None and type(recorded.event) not in _CHANGES:
        return topic
    match recorded.event:
        case IncidentOpened() as event:
            return Topic(visibility=event.visibility, service_ids=event.service_ids, severity=event.severity)
        case MaintenanceScheduled() as event:
            return Topic(
                visibility=event.visibility, service_ids=event.service_ids, suppress_alerts=event.suppress_alerts
            )
    if topic is None:
        raise ValueError(f"{recorded.event.TYPE} without a beginning")
    match recorded.event:
        case IncidentVisibilityChanged(visibility=visibility):
            return msgspec.structs.replace(topic, visibility=visibility)
        case IncidentServicesChanged(service_ids=service_ids):
            return msgspec.structs.replace(topic, service_ids=service_ids)
        case IncidentSeverityChanged(severity=severity):
            return msgspec.structs.replace(topic, severity=severity)
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


_KINDS = (subscription.KIND, maintenance.KIND, incident.KIND)
INTENTS = Table(
    "outbox_intents",
    Intent._fields,
    keys=1,
    of_streams={kind: f"stream_kind = '{kind}' AND stream_id BETWEEN $2 AND $3" for kind in _KINDS},
)
STATE = Table(
    "outbox_state",
    ("kind", "id", "state"),
    keys=2,
    of_streams={
        subscription.KIND: f"kind = '{subscription.KIND}' AND id BETWEEN $2 AND $3",
        maintenance.KIND: f"kind IN ('{maintenance.KIND}', 'active') AND id BETWEEN $2 AND $3",
        incident.KIND: f"kind = '{incident.KIND}' AND id BETWEEN $2 AND $3",
    },
)


class Outbox:
    """The projection `outbox`."""

    name = "outbox"
    version = 1
    kinds = _KINDS
    tables = (INTENTS, STATE)

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Write the intents that `events` give rise to, and what has to be known for the next ones."""
        begun = {(e.kind, e.stream_id) for e in events if e.version == 1}
        derivation, topics = await _load(connection, tenant_id, {(e.kind, e.stream_id) for e in events} - begun)
        for kind in self.kinds:
            streams = by_stream(event for event in events if event.kind == kind)
            derived = derivation.follow(kind, streams, topics.get(kind, {}))
            if derived.known:
                await connection.execute(_STORE, tenant_id, *zip(*_state_rows(derived), strict=True))
            if derived.forgotten:
                await connection.execute(_FORGET, tenant_id, *zip(*sorted(derived.forgotten), strict=True))
            if derived.intents:
                await connection.execute(_STORE_INTENTS, tenant_id, *zip(*derived.intents, strict=True))

    def deriver(self) -> Callable[[str, Streams], Rows]:
        """Return a function that gives the rows of whole streams."""
        derivation = Derivation({}, {})

        def derive(kind: str, streams: Streams) -> Rows:
            derived = derivation.follow(kind, streams, {})
            return {INTENTS.name: list(derived.intents), STATE.name: _state_rows(derived)}

        return derive

    async def clear(self, connection: Connection, tenant_id: int) -> None:
        """Delete all of the tenant's rows."""
        await connection.execute(_CLEAR, tenant_id)
        await connection.execute(_CLEAR_STATE, tenant_id)


_S = TypeVar("_S", bound=msgspec.Struct)


def _state_rows(derived: Derived) -> list[tuple[Any, ...]]:
    return [(kind, number, msgspec.json.encode(value).decode()) for (kind, number), value in derived.known.items()]


async def _load(
    connection: Connection, tenant_id: int, wanted: Iterable[Key]
) -> tuple[Derivation, dict[str, dict[int, Topic]]]:
    """Return what there is to derive from, and the topics that are `wanted`, by kind and id."""
    rows = list(await connection.fetch(_LOAD_FEW, tenant_id))
    if keys := sorted(wanted):
        rows += await connection.fetch(_LOAD, tenant_id, [kind for kind, _ in keys], [id_ for _, id_ in keys])
    wishes: dict[int, Wish] = {}
    topics: dict[str, dict[int, Topic]] = {}
    for row in rows:
        if row["kind"] == subscription.KIND:
            wishes[row["id"]] = _decode(row, Wish)
        else:
            topics.setdefault(row["kind"], {})[row["id"]] = _decode(row, Topic)
    return Derivation(wishes, topics.get("active", {})), topics


def _decode(row: asyncpg.Record, type_: type[_S]) -> _S:
    return msgspec.json.decode(row["state"], type=type_)


async def backlog(connection: Connection, at_most: int) -> asyncpg.Record:
    """Return how much of all tenants waits to be told.

    `pending` intents (counted up to `at_most`) and the age of the oldest, `unseen` events and the age of the oldest,
    and in how many tenants the outbox is `parked`; ages are in seconds, NULL where nothing waits.
    """
    return await connection.fetchrow(_BACKLOG, at_most)

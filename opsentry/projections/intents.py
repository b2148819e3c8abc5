"""Notification intents, derived: who must be told of which event. Pure; `outbox` keeps what comes of it as rows."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Generic, NamedTuple, TypeVar
from uuid import UUID

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
from opsentry.projections.projection import Streams

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
    channel: str
    audience: str
    incidents: bool
    maintenance: bool
    service_ids: tuple[int, ...]
    lowest_severity: str

    @classmethod
    def of(cls, since: int, state: Subscription) -> "Wish":
        """Return what a subscription wants, without its words."""
        return cls(since, *(getattr(state, name) for name in cls.__struct_fields__[1:]))


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
        self._wishes = {number: _Span(wish.since, _FOR_EVER, wish) for number, wish in wishes.items()}
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
                    wish = Wish.of(recorded.seq, subscription.evolve(None, created))
                    self._wishes[number] = _Span(recorded.seq, _FOR_EVER, wish)
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


def _wants(wish: Wish, recorded: RecordedEvent, topic: Topic) -> bool:
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

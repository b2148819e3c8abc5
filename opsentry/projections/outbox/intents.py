"""Notification intents, derived: who must be told of which event. Pure; `outbox` keeps what comes of it as rows."""

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar
from uuid import UUID

import msgspec

from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.incident import (
    IncidentOpened,
    IncidentReopened,
    IncidentResolved,
    IncidentSeverityChanged,
    IncidentStatusChanged,
    IncidentUpdated,
)
from opsentry.domain.maintenance import (
    MaintenanceCancelled,
    MaintenanceCompleted,
    MaintenanceReminded,
    MaintenanceRescheduled,
    MaintenanceScheduled,
    MaintenanceStarted,
    MaintenanceUpdated,
)
from opsentry.domain.subscription import SubscriptionCreated, SubscriptionTestRequested
from opsentry.events.codec import RecordedEvent
from opsentry.projections.engine.projection import Streams
from opsentry.projections.outbox.rules import SubscriberFilter, Topic, evolve, evolve_filter, matches

# What is told once about an incident that was withheld by a window, when the window is over and the incident is not.
STILL_OPEN = "incident.still_open"

_TOLD = frozenset(
    {
        IncidentOpened,
        IncidentUpdated,
        IncidentStatusChanged,
        IncidentSeverityChanged,
        IncidentResolved,
        IncidentReopened,
        MaintenanceScheduled,
        MaintenanceRescheduled,
        MaintenanceReminded,
        MaintenanceUpdated,
        MaintenanceStarted,
        MaintenanceCompleted,
        MaintenanceCancelled,
    }
)


class Intent(NamedTuple):
    """One message that must be sent, or that was withheld by a window with `suppress_alerts`; a row of its table."""

    intent_id: UUID
    position: int
    subscription_id: int
    channel: str
    topic: str
    stream_kind: str
    stream_id: int
    suppressed: bool
    created_at: datetime


Key = tuple[str, int]

_FOR_EVER = 2**63
_position = attrgetter("position")

_T = TypeVar("_T")


class _Span(NamedTuple, Generic[_T]):
    """What holds for the events after position `since` and before `until`."""

    since: int
    until: int
    what: _T


def tells(recorded: RecordedEvent) -> bool:
    """Return whether all subscriptions may have to be told of the event, or of what it ends."""
    return type(recorded.event) in _TOLD and not recorded.meta.silent


class Derived(NamedTuple):
    """What events give rise to: intents, what has to be known for the next events, and what no longer has to."""

    intents: list[Intent]
    known: dict[Key, msgspec.Struct]
    forgotten: set[Key]


class Derivation:
    """Derives intents from streams, kind by kind: subscriptions, then windows, then incidents.

    In this order all that an event of a stream depends on is known, as of that event's own position, however the
    streams interleave in the ledger. So they may be read one after the other, as a rebuild does. Of what is known
    already, events that were seen before are passed over.

    Args:
        filters: Subscriptions that there are before the events to come, by id.
        active: Windows that are active then and suppress alerts, by id.
    """

    def __init__(self, filters: Mapping[int, SubscriberFilter], active: Mapping[int, Topic]) -> None:
        self._filters = dict(filters)
        self._spans = {
            n: [_Span(subscriber_filter.since, _FOR_EVER, subscriber_filter)]
            for n, subscriber_filter in filters.items()
            if subscriber_filter.active
        }
        self._windows = {n: _Span(topic.since, _FOR_EVER, frozenset(topic.service_ids)) for n, topic in active.items()}
        self._ends: list[RecordedEvent] = []
        self._steps: tuple[list[int], list[tuple[frozenset[int], ...]]] | None = None

    def follow(self, kind: str, streams: Streams, topics: Mapping[int, Topic]) -> Derived:
        """Fold the streams' events; `topics` is what is known already of some of them.

        A stream without events is an incident that nothing happened to, but perhaps to the window that withheld it.
        """
        derived = Derived([], {}, set())
        for number, stream in streams.items():
            if kind == subscription.KIND:
                self._follow_subscription(number, stream, derived)
                continue
            topic = before = topics.get(number)
            for recorded in stream:
                topic = self._sum_up(number, topic, recorded.position, derived)
                if topic is None or recorded.position > topic.since:
                    topic = self._follow_event(evolve(topic, recorded), recorded, derived)
            topic = self._sum_up(number, topic, _FOR_EVER, derived)
            if topic is not None and topic is not before:
                derived.known[kind, number] = topic
        return derived

    def _follow_subscription(self, number: int, stream: Sequence[RecordedEvent], derived: Derived) -> None:
        subscriber_filter = before = self._filters.get(number)
        for recorded in stream:
            if subscriber_filter is not None and recorded.position <= subscriber_filter.since:
                continue
            earlier, subscriber_filter = subscriber_filter, evolve_filter(subscriber_filter, recorded)
            if subscriber_filter is not earlier:
                spans = self._spans.setdefault(number, [])
                if earlier is not None and earlier.active:
                    spans[-1] = spans[-1]._replace(until=recorded.position)
                if subscriber_filter is not None and subscriber_filter.active:
                    spans.append(_Span(recorded.position, _FOR_EVER, subscriber_filter))
            match recorded.event:
                # A pending one is asked whether it matches to be told; a test is for the one that asked for it.
                case SubscriptionCreated(pending=True) | SubscriptionTestRequested():
                    if subscriber_filter is not None and not recorded.meta.silent:
                        derived.intents.append(_intent(recorded, number, subscriber_filter.channel))
        if subscriber_filter is None:
            self._filters.pop(number, None)
            derived.forgotten.add((subscription.KIND, number))
        elif subscriber_filter is not before:
            self._filters[number] = subscriber_filter
            derived.known[subscription.KIND, number] = subscriber_filter

    def _follow_event(self, topic: Topic, recorded: RecordedEvent, derived: Derived) -> Topic:
        """Note what a window does to others, tell what is worth telling; return the topic as that leaves it."""
        if recorded.kind == maintenance.KIND:
            self._follow_window(recorded, topic, derived)
        if not tells(recorded):
            return topic
        suppressed = recorded.kind == incident.KIND and self._withheld(topic, recorded.position)
        for number, channel in self._matching(recorded.kind, topic, recorded):
            derived.intents.append(_intent(recorded, number, channel, suppressed=suppressed))
        muted = suppressed and not isinstance(recorded.event, IncidentResolved)
        if muted or topic.muted:
            return msgspec.structs.replace(topic, since=recorded.position, muted=muted)
        return topic

    def _follow_window(self, recorded: RecordedEvent, topic: Topic, derived: Derived) -> None:
        number = recorded.stream_id
        key = ("active", number)
        match recorded.event:
            case MaintenanceStarted() if topic.suppress_alerts:
                self._windows[number] = _Span(recorded.position, _FOR_EVER, frozenset(topic.service_ids))
                derived.known[key] = topic
            case MaintenanceCompleted() if number in self._windows:
                self._windows[number] = self._windows[number]._replace(until=recorded.position)
                if not recorded.meta.silent:
                    insort(self._ends, recorded, key=_position)
                derived.known.pop(key, None)
                derived.forgotten.add(key)
            case _:
                return
        self._steps = None

    def _sum_up(self, number: int, topic: Topic | None, before: int, derived: Derived) -> Topic | None:
        """Tell that an incident is still open, at the first end of a window before this position that lets it be told.

        Whoever missed what was withheld hears of it once, then.
        """
        if topic is None or not topic.muted:
            return topic
        for end in self._ends[bisect_right(self._ends, topic.since, key=_position) :]:
            if end.position >= before:
                break
            if not self._withheld(topic, end.position):
                for subscription_id, channel in self._matching(incident.KIND, topic, end):
                    derived.intents.append(_intent(end, subscription_id, channel, still_open=number))
                return msgspec.structs.replace(topic, since=end.position, muted=False)
        return topic

    def _matching(self, kind: str, topic: Topic, recorded: RecordedEvent) -> Iterator[tuple[int, str]]:
        """Yield each subscription that matches to be told as of the event, and its channel."""
        position = recorded.position
        for number, spans in self._spans.items():
            for since, until, subscriber_filter in spans:
                if since < position < until and matches(subscriber_filter, kind, topic, recorded):
                    yield number, subscriber_filter.channel

    def _withheld(self, topic: Topic, position: int) -> bool:
        """Return whether a window suppresses what is told of an incident at this position."""
        services = topic.service_ids
        return bool(services) and any(covered.issuperset(services) for covered in self._suppressing(position))

    def _suppressing(self, position: int) -> Sequence[frozenset[int]]:
        """Return the services of each window that suppresses alerts at this position."""
        if self._steps is None:
            # Few are active at once, however many there ever were: what holds between one change and the next.
            edges = [(span.since, number) for number, span in self._windows.items()]
            edges += [(span.until, number) for number, span in self._windows.items()]
            positions: list[int] = []
            steps: list[tuple[frozenset[int], ...]] = [()]
            active: dict[int, frozenset[int]] = {}
            for edge, number in sorted(edges):
                if active.pop(number, None) is None:
                    active[number] = self._windows[number].what
                positions.append(edge)
                steps.append(tuple(active.values()))
            self._steps = positions, steps
        positions, steps = self._steps
        return steps[bisect_right(positions, position)]


def _intent(
    recorded: RecordedEvent,
    subscription_id: int,
    channel: str,
    *,
    suppressed: bool = False,
    still_open: int | None = None,
) -> Intent:
    """Return the intent that tells of an event, or, at the end of a window, of the incident that is `still_open`."""
    kind, stream_id, topic = recorded.kind, recorded.stream_id, recorded.event.TYPE
    if still_open is not None:
        kind, stream_id, topic = incident.KIND, still_open, STILL_OPEN
    return Intent(
        intent_id=intent_id(recorded, subscription_id, channel, still_open),
        position=recorded.position,
        subscription_id=subscription_id,
        channel=channel,
        topic=topic,
        stream_kind=kind,
        stream_id=stream_id,
        suppressed=suppressed,
        created_at=recorded.recorded_at,
    )


def intent_id(recorded: RecordedEvent, subscription_id: int, channel: str, still_open: int | None = None) -> UUID:
    """Return the id that this event, subscription and channel always get (an RFC 9562 version 8 UUID).

    The end of a window may tell of several incidents that are `still_open`, each with an id of its own.
    """
    name = f"{recorded.tenant_id}:{recorded.position}:{subscription_id}:{channel}"
    if still_open is not None:
        name += f":{incident.KIND}:{still_open}"
    digest = bytearray(sha256(name.encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return UUID(bytes=bytes(digest))

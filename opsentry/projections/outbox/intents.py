"""Generate notification intents from events: which subscription is notified of which event. Pure; see `projection`."""

from bisect import bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from operator import attrgetter
from typing import Generic, NamedTuple, TypeAlias, TypeVar
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
from opsentry.projections.outbox.rules import SubjectState, SubscriberFilter, evolve_filter, evolve_subject

STILL_OPEN = "incident.still_open"
"""The topic of the one notification that follows a window which suppressed those of an incident that is still open."""

ACTIVE = "active"
"""The kind under which the outbox stores an active window that suppresses alerts."""

NOTIFIABLE_EVENTS = frozenset(
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
    """One notification to send, or one that an active window `suppressed`; a row of `outbox_intents`."""

    intent_id: UUID
    position: int
    subscription_id: int
    channel: str
    topic: str
    stream_kind: str
    stream_id: int
    suppressed: bool
    created_at: datetime


StateKey: TypeAlias = tuple[str, int]
"""The kind and id under which the outbox stores a state."""

_NO_END = 2**63
_position = attrgetter("position")

_T = TypeVar("_T")


class _Interval(NamedTuple, Generic[_T]):
    """A value that holds for the events after position `start` and before position `end`."""

    start: int
    end: int
    value: _T


def is_notifiable(recorded: RecordedEvent) -> bool:
    """Return whether subscriptions may be notified of the event, or of the end of the window that it ends."""
    return type(recorded.event) in NOTIFIABLE_EVENTS and not recorded.meta.silent


class OutboxChanges(NamedTuple):
    """The changes that events make: new intents, states to store, and the keys of states to delete."""

    intents: list[Intent]
    states: dict[StateKey, msgspec.Struct]
    deleted: set[StateKey]


class IntentGenerator:
    """Generate intents from streams, kind by kind: first subscriptions, then windows, then incidents.

    In this order everything that an event depends on is known as of the event's position, however the streams
    interleave in the ledger. So a rebuild can read stream by stream. Events that a given state already includes are
    skipped.

    Args:
        filters: The filters of existing subscriptions, by id.
        active: The active windows that suppress alerts, by id.
    """

    def __init__(self, filters: Mapping[int, SubscriberFilter], active: Mapping[int, SubjectState]) -> None:
        self._filters = dict(filters)
        self._filter_intervals = {
            subscription_id: [_Interval(each.since_position, _NO_END, each)]
            for subscription_id, each in filters.items()
            if each.is_active
        }
        self._windows = {
            window_id: _Interval(window.since_position, _NO_END, frozenset(window.service_ids))
            for window_id, window in active.items()
        }
        self._window_ends: list[RecordedEvent] = []
        self._suppression_steps: tuple[list[int], list[tuple[frozenset[int], ...]]] | None = None

    def process(self, kind: str, streams: Streams, subjects: Mapping[int, SubjectState]) -> OutboxChanges:
        """Process the events of streams of one kind.

        Args:
            kind: The kind.
            streams: Events by stream id. A stream without events is an incident that a window withheld: the window's
                end may concern it.
            subjects: The known states of these streams.
        """
        changes = OutboxChanges([], {}, set())
        for stream_id, stream in streams.items():
            if kind == subscription.KIND:
                self._process_subscription(stream_id, stream, changes)
                continue
            subject = before = subjects.get(stream_id)
            for recorded in stream:
                subject = self._notify_still_open(stream_id, subject, recorded.position, changes)
                if subject is None or recorded.position > subject.since_position:
                    subject = self._process_event(evolve_subject(subject, recorded), recorded, changes)
            subject = self._notify_still_open(stream_id, subject, _NO_END, changes)
            if subject is not None and subject is not before:
                changes.states[kind, stream_id] = subject
        return changes

    def _process_subscription(
        self, subscription_id: int, stream: Sequence[RecordedEvent], changes: OutboxChanges
    ) -> None:
        subscriber_filter = before = self._filters.get(subscription_id)
        for recorded in stream:
            if subscriber_filter is not None and recorded.position <= subscriber_filter.since_position:
                continue
            earlier, subscriber_filter = subscriber_filter, evolve_filter(subscriber_filter, recorded)
            if subscriber_filter is not earlier:
                intervals = self._filter_intervals.setdefault(subscription_id, [])
                if earlier is not None and earlier.is_active:
                    intervals[-1] = intervals[-1]._replace(end=recorded.position)
                if subscriber_filter is not None and subscriber_filter.is_active:
                    intervals.append(_Interval(recorded.position, _NO_END, subscriber_filter))
            match recorded.event:
                # The request to confirm and the test go to this subscription alone, whatever its filter says.
                case SubscriptionCreated(pending=True) | SubscriptionTestRequested():
                    if subscriber_filter is not None and not recorded.meta.silent:
                        changes.intents.append(_intent(recorded, subscription_id, subscriber_filter.channel))
        if subscriber_filter is None:
            self._filters.pop(subscription_id, None)
            changes.deleted.add((subscription.KIND, subscription_id))
        elif subscriber_filter is not before:
            self._filters[subscription_id] = subscriber_filter
            changes.states[subscription.KIND, subscription_id] = subscriber_filter

    def _process_event(self, subject: SubjectState, recorded: RecordedEvent, changes: OutboxChanges) -> SubjectState:
        """Add the intents of an event, and return the subject's state after that."""
        if recorded.kind == maintenance.KIND:
            self._process_window(recorded, subject, changes)
        if not is_notifiable(recorded):
            return subject
        suppressed = recorded.kind == incident.KIND and self._is_suppressed(subject, recorded.position)
        for subscription_id, channel in self._matching(recorded.kind, subject, recorded):
            changes.intents.append(_intent(recorded, subscription_id, channel, suppressed=suppressed))
        is_withheld = suppressed and not isinstance(recorded.event, IncidentResolved)
        if is_withheld or subject.is_withheld:
            return msgspec.structs.replace(subject, since_position=recorded.position, is_withheld=is_withheld)
        return subject

    def _process_window(self, recorded: RecordedEvent, window: SubjectState, changes: OutboxChanges) -> None:
        """Track when a window suppresses alerts."""
        window_id = recorded.stream_id
        key = (ACTIVE, window_id)
        match recorded.event:
            case MaintenanceStarted() if window.suppress_alerts:
                self._windows[window_id] = _Interval(recorded.position, _NO_END, frozenset(window.service_ids))
                changes.states[key] = window
            case MaintenanceCompleted() if window_id in self._windows:
                self._windows[window_id] = self._windows[window_id]._replace(end=recorded.position)
                if not recorded.meta.silent:
                    insort(self._window_ends, recorded, key=_position)
                changes.states.pop(key, None)
                changes.deleted.add(key)
            case _:
                return
        self._suppression_steps = None

    def _notify_still_open(
        self, incident_id: int, subject: SubjectState | None, before: int, changes: OutboxChanges
    ) -> SubjectState | None:
        """Add the intents that a withheld incident is still open, at the first window end before position `before`.

        A window end counts only if no other window suppresses the incident then. Each withheld incident is announced
        once.
        """
        if subject is None or not subject.is_withheld:
            return subject
        first = bisect_right(self._window_ends, subject.since_position, key=_position)
        for end in self._window_ends[first:]:
            if end.position >= before:
                break
            if not self._is_suppressed(subject, end.position):
                for subscription_id, channel in self._matching(incident.KIND, subject, end):
                    changes.intents.append(_intent(end, subscription_id, channel, still_open=incident_id))
                return msgspec.structs.replace(subject, since_position=end.position, is_withheld=False)
        return subject

    def _matching(self, kind: str, subject: SubjectState, recorded: RecordedEvent) -> Iterator[tuple[int, str]]:
        """Yield the id and channel of each subscription that matches as of the event."""
        for subscription_id, intervals in self._filter_intervals.items():
            for start, end, subscriber_filter in intervals:
                if start < recorded.position < end and subscriber_filter.matches(kind, subject, recorded):
                    yield subscription_id, subscriber_filter.channel

    def _is_suppressed(self, subject: SubjectState, position: int) -> bool:
        """Return whether one window that is active at this position covers all services of an incident."""
        services = subject.service_ids
        return bool(services) and any(covered.issuperset(services) for covered in self._suppressed_services(position))

    def _suppressed_services(self, position: int) -> Sequence[frozenset[int]]:
        """Return the services of each window that suppresses alerts at this position."""
        if self._suppression_steps is None:
            # Few windows are active at once, however many there were. So each step between two changes lists them.
            edges = [(interval.start, window_id) for window_id, interval in self._windows.items()]
            edges += [(interval.end, window_id) for window_id, interval in self._windows.items()]
            positions: list[int] = []
            steps: list[tuple[frozenset[int], ...]] = [()]
            active: dict[int, frozenset[int]] = {}
            for edge, window_id in sorted(edges):
                if active.pop(window_id, None) is None:
                    active[window_id] = self._windows[window_id].value
                positions.append(edge)
                steps.append(tuple(active.values()))
            self._suppression_steps = positions, steps
        positions, steps = self._suppression_steps
        return steps[bisect_right(positions, position)]


def _intent(
    recorded: RecordedEvent,
    subscription_id: int,
    channel: str,
    *,
    suppressed: bool = False,
    still_open: int | None = None,
) -> Intent:
    """Return the intent for an event or, at the end of a window, for the incident `still_open`."""
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
    """Derive the id of an intent from its event, subscription and channel (an RFC 9562 version 8 UUID).

    The same arguments always give the same id, so a rebuild changes none. The end of a window may announce several
    incidents that are `still_open`, each with its own id.
    """
    name = f"{recorded.tenant_id}:{recorded.position}:{subscription_id}:{channel}"
    if still_open is not None:
        name += f":{incident.KIND}:{still_open}"
    digest = bytearray(sha256(name.encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return UUID(bytes=bytes(digest))

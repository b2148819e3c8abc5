"""The rules of the outbox: its knowledge of incidents, windows and subscriptions, and which subscriptions match."""

import msgspec

from opsentry.domain import incident, subscription
from opsentry.domain.decider import set_fields
from opsentry.domain.incident import (
    IncidentOpened,
    IncidentReopened,
    IncidentResolved,
    IncidentServicesChanged,
    IncidentSeverityChanged,
    IncidentVisibilityChanged,
)
from opsentry.domain.maintenance import (
    MaintenanceChanged,
    MaintenanceCompleted,
    MaintenanceScheduled,
    MaintenanceStarted,
)
from opsentry.domain.subscription import (
    SubscriptionChanged,
    SubscriptionConfirmed,
    SubscriptionCreated,
    SubscriptionDisabled,
    SubscriptionEnabled,
    SubscriptionRemoved,
)
from opsentry.domain.uptime import LEVELS
from opsentry.events.codec import RecordedEvent
from opsentry.projections.visibility import PUBLIC, is_event_public

_RELEVANT_EVENTS = frozenset(
    {
        IncidentOpened,
        IncidentVisibilityChanged,
        IncidentServicesChanged,
        IncidentSeverityChanged,
        IncidentResolved,
        IncidentReopened,
        MaintenanceScheduled,
        MaintenanceChanged,
        MaintenanceStarted,
        MaintenanceCompleted,
    }
)


class SubjectState(msgspec.Struct, kw_only=True, frozen=True, gc=False, omit_defaults=True):
    """The outbox's knowledge of an incident or a maintenance window; it contains no erasable text.

    Attributes:
        since_position: The position of the event that led to this state; earlier events are already processed.
        visibility: The audience that may see it.
        service_ids: The affected services.
        severity: The severity of an incident.
        worst_severity: The worst severity of an incident since it was opened or reopened.
        suppress_alerts: Whether an active window suppresses notifications of incidents within its services.
        is_withheld: Whether a window suppressed the last notification of an open incident, and none followed.
    """

    since_position: int = 0
    visibility: str
    service_ids: tuple[int, ...]
    severity: str | None = None
    worst_severity: str | None = None
    suppress_alerts: bool = False
    is_withheld: bool = False


class SubscriberFilter(msgspec.Struct, frozen=True):
    """The filter of a subscription, valid for events after `since_position`.

    A pending or disabled subscription is not `is_active`: it receives nothing.
    """

    since_position: int
    channel: str
    audience: str
    notify_incidents: bool
    notify_maintenance: bool
    service_ids: tuple[int, ...]
    min_severity: str
    is_active: bool = True

    def matches(self, kind: str, subject: SubjectState, recorded: RecordedEvent) -> bool:
        """Return whether the subscription is notified of an event.

        The worst severity since an incident was opened decides. So a subscriber who was notified of it is also notified
        when it gets better and when it is resolved.

        Args:
            kind: The stream kind of the subject.
            subject: The incident or maintenance window as of the event.
            recorded: The event.
        """
        if not (self.notify_incidents if kind == incident.KIND else self.notify_maintenance):
            return False
        if self.audience == PUBLIC and not is_event_public(subject.visibility, recorded.event):
            return False
        if self.service_ids and not set(self.service_ids) & set(subject.service_ids):
            return False
        return subject.worst_severity is None or LEVELS[subject.worst_severity] >= LEVELS[self.min_severity]


def evolve_subject(subject: SubjectState | None, recorded: RecordedEvent) -> SubjectState:
    """Apply one event of an incident or a maintenance window; an event without effect returns the same object.

    Raises:
        ValueError: The stream does not start with the event that begins it.
    """
    event, position = recorded.event, recorded.position
    if subject is not None and type(event) not in _RELEVANT_EVENTS:
        return subject
    match event:
        case IncidentOpened(visibility=visibility, service_ids=service_ids, severity=severity):
            return SubjectState(
                since_position=position,
                visibility=visibility,
                service_ids=service_ids,
                severity=severity,
                worst_severity=severity,
            )
        case MaintenanceScheduled(visibility=visibility, service_ids=service_ids, suppress_alerts=suppress_alerts):
            return SubjectState(
                since_position=position,
                visibility=visibility,
                service_ids=service_ids,
                suppress_alerts=suppress_alerts,
            )
    if subject is None:
        raise ValueError(f"the stream starts with {event.TYPE}")
    replace = msgspec.structs.replace
    match event:
        case IncidentVisibilityChanged(visibility=visibility):
            return replace(subject, since_position=position, visibility=visibility)
        case IncidentServicesChanged(service_ids=service_ids):
            return replace(subject, since_position=position, service_ids=service_ids)
        case IncidentSeverityChanged(severity=severity):
            worst = max(severity, subject.worst_severity or severity, key=LEVELS.__getitem__)
            return replace(subject, since_position=position, severity=severity, worst_severity=worst)
        case IncidentResolved():
            return replace(subject, since_position=position, is_withheld=False)
        case IncidentReopened():
            return replace(subject, since_position=position, worst_severity=subject.severity)
        case MaintenanceChanged():
            changed = {n: value for n, value in set_fields(event).items() if n in SubjectState.__struct_fields__}
            return replace(subject, since_position=position, **changed)
    return replace(subject, since_position=position)


def evolve_filter(subscriber_filter: SubscriberFilter | None, recorded: RecordedEvent) -> SubscriberFilter | None:
    """Apply one event of a subscription; an event without effect returns the same object, a removal `None`."""
    event = recorded.event
    if isinstance(event, SubscriptionCreated):
        state = subscription.evolve(None, event)
        fields = {name: getattr(state, name) for name in SubscriberFilter.__struct_fields__ if hasattr(state, name)}
        return SubscriberFilter(since_position=recorded.position, is_active=not event.pending, **fields)
    if subscriber_filter is None or isinstance(event, SubscriptionRemoved):
        return None
    replace = msgspec.structs.replace
    match event:
        case SubscriptionConfirmed() | SubscriptionEnabled():
            after = replace(subscriber_filter, is_active=True)
        case SubscriptionDisabled():
            after = replace(subscriber_filter, is_active=False)
        case SubscriptionChanged():
            changed = {n: value for n, value in set_fields(event).items() if n in SubscriberFilter.__struct_fields__}
            after = replace(subscriber_filter, **changed)
        case _:
            return subscriber_filter
    return subscriber_filter if after == subscriber_filter else replace(after, since_position=recorded.position)

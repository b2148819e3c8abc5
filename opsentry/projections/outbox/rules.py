"""What intents depend on, as the outbox knows it: incidents and windows that are told of, and who matches to hear."""

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
from opsentry.projections.visibility import is_event_public

_CHANGES = frozenset(
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


class Topic(msgspec.Struct, kw_only=True, frozen=True, gc=False, omit_defaults=True):
    """What the outbox has to know of an incident or a window: none of its words.

    Attributes:
        since: The position since which it is so; what came until there has been seen.
        visibility: Who may be told.
        service_ids: The services it touches.
        severity: An incident's.
        worst: The worst that it was since it was opened, or re-opened.
        suppress_alerts: Whether a window withholds what is told of incidents within it.
        muted: Whether the last message about an open incident was withheld, and nobody has heard since.
    """

    since: int = 0
    visibility: str
    service_ids: tuple[int, ...]
    severity: str | None = None
    worst: str | None = None
    suppress_alerts: bool = False
    muted: bool = False


class SubscriberFilter(msgspec.Struct, frozen=True):
    """A subscription and the position since which it holds: it is not told of what came before.

    One that is not `active`, because it is pending or disabled, is told nothing.
    """

    since: int
    channel: str
    audience: str
    notify_incidents: bool
    notify_maintenance: bool
    service_ids: tuple[int, ...]
    min_severity: str
    active: bool = True


def evolve(topic: Topic | None, recorded: RecordedEvent) -> Topic:
    """Fold one event of an incident or a window; one that changes nothing here gives the same object.

    Raises:
        ValueError: The stream does not begin with its beginning.
    """
    event, position = recorded.event, recorded.position
    if topic is not None and type(event) not in _CHANGES:
        return topic
    match event:
        case IncidentOpened(visibility=visibility, service_ids=service_ids, severity=severity):
            return Topic(
                since=position, visibility=visibility, service_ids=service_ids, severity=severity, worst=severity
            )
        case MaintenanceScheduled(visibility=visibility, service_ids=service_ids, suppress_alerts=suppress_alerts):
            return Topic(
                since=position, visibility=visibility, service_ids=service_ids, suppress_alerts=suppress_alerts
            )
    if topic is None:
        raise ValueError(f"{event.TYPE} without a beginning")
    change = msgspec.structs.replace
    match event:
        case IncidentVisibilityChanged(visibility=visibility):
            return change(topic, since=position, visibility=visibility)
        case IncidentServicesChanged(service_ids=service_ids):
            return change(topic, since=position, service_ids=service_ids)
        case IncidentSeverityChanged(severity=severity):
            worst = max(severity, topic.worst or severity, key=LEVELS.__getitem__)
            return change(topic, since=position, severity=severity, worst=worst)
        case IncidentResolved():
            return change(topic, since=position, muted=False)
        case IncidentReopened():
            return change(topic, since=position, worst=topic.severity)
        case MaintenanceChanged():
            kept = {name: value for name, value in set_fields(event).items() if name in Topic.__struct_fields__}
            return change(topic, since=position, **kept)
    return change(topic, since=position)


def evolve_filter(subscriber_filter: SubscriberFilter | None, recorded: RecordedEvent) -> SubscriberFilter | None:
    """Fold one event of a subscription, `None` once it is removed; what changes nothing here gives the same object."""
    event = recorded.event
    if isinstance(event, SubscriptionCreated):
        state = subscription.evolve(None, event)
        values = {name: getattr(state, name) for name in SubscriberFilter.__struct_fields__ if hasattr(state, name)}
        return SubscriberFilter(since=recorded.position, active=not event.pending, **values)
    if subscriber_filter is None or isinstance(event, SubscriptionRemoved):
        return None
    change = msgspec.structs.replace
    match event:
        case SubscriptionConfirmed() | SubscriptionEnabled():
            changed = change(subscriber_filter, active=True)
        case SubscriptionDisabled():
            changed = change(subscriber_filter, active=False)
        case SubscriptionChanged():
            kept = {
                name: value for name, value in set_fields(event).items() if name in SubscriberFilter.__struct_fields__
            }
            changed = change(subscriber_filter, **kept)
        case _:
            return subscriber_filter
    return subscriber_filter if changed == subscriber_filter else change(changed, since=recorded.position)


def matches(subscriber_filter: SubscriberFilter, kind: str, topic: Topic, recorded: RecordedEvent) -> bool:
    """Return whether a subscription matches to be told of `topic`, of this kind, that `recorded` happened.

    An incident counts by the worst that it was since it was opened: whoever was told that it is so bad is also told
    that it no longer is, and that it is over.
    """
    if not (subscriber_filter.notify_incidents if kind == incident.KIND else subscriber_filter.notify_maintenance):
        return False
    if subscriber_filter.audience == "public" and not is_event_public(topic.visibility, recorded.event):
        return False
    if subscriber_filter.service_ids and not set(subscriber_filter.service_ids) & set(topic.service_ids):
        return False
    return topic.worst is None or LEVELS[topic.worst] >= LEVELS[subscriber_filter.min_severity]

"""All events there are, and the state machines they belong to."""

from typing import TypeAlias, get_args

from opsentry.domain.decider import Event
from opsentry.domain.identity import AccessEvent
from opsentry.domain.incident import IncidentEvent
from opsentry.domain.maintenance import MaintenanceEvent
from opsentry.domain.service import ServiceEvent
from opsentry.domain.subscription import SubscriptionEvent

AnyEvent: TypeAlias = AccessEvent | IncidentEvent | MaintenanceEvent | ServiceEvent | SubscriptionEvent

EVENT_TYPES: dict[str, type[Event]] = {event.TYPE: event for event in get_args(AnyEvent)}

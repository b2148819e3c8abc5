"""List all event types of the ledger, for decoding."""

from typing import TypeAlias, get_args

from opsentry.domain.decider import Event
from opsentry.domain.identity import IdentityEvent
from opsentry.domain.incident import IncidentEvent
from opsentry.domain.maintenance import MaintenanceEvent
from opsentry.domain.service import ServiceEvent
from opsentry.domain.subscription import SubscriptionEvent

AnyEvent: TypeAlias = IdentityEvent | IncidentEvent | MaintenanceEvent | ServiceEvent | SubscriptionEvent

EVENT_TYPES: dict[str, type[Event]] = {event.TYPE: event for event in get_args(AnyEvent)}

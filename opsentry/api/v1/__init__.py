"""Version 1 of the API for tenants: one file per resource, each a list of declared operations."""

from collections.abc import Sequence

from opsentry.api.v1 import deliveries, events, health, incidents, maintenance, services, subscriptions, uptime
from opsentry.http.operation import Operation

OPERATIONS: Sequence[Operation] = (
    *health.OPERATIONS,
    *services.OPERATIONS,
    *uptime.OPERATIONS,
    *incidents.OPERATIONS,
    *maintenance.OPERATIONS,
    *subscriptions.OPERATIONS,
    *deliveries.OPERATIONS,
    *events.OPERATIONS,
)

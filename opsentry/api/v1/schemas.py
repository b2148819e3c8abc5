"""The shapes of responses, written down once for the contract. Tests hold every response to them."""

from collections.abc import Sequence
from datetime import datetime

import msgspec

from opsentry.domain.incident import IncidentStatus, Severity
from opsentry.domain.maintenance import MaintenanceStatus
from opsentry.domain.service import ServiceStatus
from opsentry.domain.subscription import Audience, DisabledReason, ListedStatus
from opsentry.domain.visibility import Visibility
from opsentry.events.audit import Entry
from opsentry.http.params import Id, Position
from opsentry.projections.services import ServiceLink


class TimelineEntry(msgspec.Struct):
    """A message of a timeline. Its id is its position in the tenant's ledger."""

    id: Position
    status: str
    message: str
    is_public: bool
    author: str
    created_at: datetime


class Incident(msgspec.Struct, kw_only=True):
    """An incident."""

    id: Id
    title: str
    description: str | None
    status: IncidentStatus
    severity: Severity
    visibility: Visibility
    services: Sequence[ServiceLink]
    service_ids: Sequence[Id]
    root_cause: str | None
    postmortem: str | None
    occurred_at: datetime
    created_at: datetime
    updated_at: datetime
    resolved_at: datetime | None


class IncidentDetail(Incident, kw_only=True):
    """An incident with its timeline, oldest entry first."""

    updates: Sequence[TimelineEntry]


class MaintenanceWindow(msgspec.Struct, kw_only=True):
    """A maintenance window."""

    id: Id
    title: str
    description: str | None
    status: MaintenanceStatus
    visibility: Visibility
    services: Sequence[ServiceLink]
    service_ids: Sequence[Id]
    scheduled_start: datetime
    scheduled_end: datetime
    started_at: datetime | None
    completed_at: datetime | None
    cancelled_at: datetime | None
    exclude_from_sla: bool
    suppress_alerts: bool
    auto_start: bool
    auto_complete: bool
    created_at: datetime
    updated_at: datetime


class MaintenanceDetail(MaintenanceWindow, kw_only=True):
    """A maintenance window with its timeline, oldest entry first."""

    updates: Sequence[TimelineEntry]


class Service(msgspec.Struct, kw_only=True):
    """A service with its present status."""

    id: Id
    slug: str
    name: str
    current_status: ServiceStatus
    visibility: Visibility
    tags: Sequence[str]
    description: str | None
    created_at: datetime


class Subscription(msgspec.Struct, kw_only=True):
    """A subscription. No secret is in it; a secret target is shown in part."""

    id: Id
    channel: str
    target: str
    audience: Audience
    notify_incidents: bool
    notify_maintenance: bool
    service_ids: Sequence[Id]
    min_severity: Severity
    status: ListedStatus
    disabled_reason: DisabledReason | None
    created_at: datetime
    updated_at: datetime


class CreatedSubscription(Subscription, kw_only=True, omit_defaults=True):
    """A new subscription. `secret` is there once, for a channel that signs its messages."""

    secret: str | None = None


class RotatedSubscription(Subscription, kw_only=True):
    """A subscription with its new secret, shown once."""

    secret: str
    previous_valid_until: datetime | None


class IncidentList(msgspec.Struct):
    """A page of incidents, newest first."""

    incidents: Sequence[Incident]
    total: int
    limit: int
    offset: int


class ActiveIncidents(msgspec.Struct):
    """All incidents that are not resolved."""

    incidents: Sequence[Incident]


class MaintenanceList(msgspec.Struct):
    """A page of maintenance windows, the last announced first."""

    maintenance: Sequence[MaintenanceWindow]
    total: int
    limit: int
    offset: int


class UpcomingMaintenance(msgspec.Struct):
    """All scheduled windows of the future, the next one first."""

    maintenance: Sequence[MaintenanceWindow]


class ServiceList(msgspec.Struct):
    """A page of services by name."""

    services: Sequence[Service]
    total: int
    limit: int
    offset: int


class SubscriptionList(msgspec.Struct):
    """A page of subscriptions, the newest first."""

    subscriptions: Sequence[Subscription]
    total: int
    limit: int
    offset: int


class EventPage(msgspec.Struct, kw_only=True):
    """Ledger entries after a position. `next` is the `after` of the next page; null at the end."""

    events: Sequence[Entry]
    after: Position
    limit: int
    next: Position | None


class TokenInfo(msgspec.Struct):
    """A token's tenant and scopes."""

    ok: bool
    tenant_id: int
    token_prefix: str
    scopes: Sequence[str]

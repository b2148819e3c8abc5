"""Enumerations of the contract."""

from typing import Literal, TypeAlias

IncidentStatus: TypeAlias = Literal["investigating", "identified", "monitoring", "resolved"]
Severity: TypeAlias = Literal["informational", "degraded", "partial_outage", "major_outage", "critical"]
Visibility: TypeAlias = Literal["public", "internal"]
MaintenanceStatus: TypeAlias = Literal["scheduled", "active", "completed", "cancelled"]
ServiceStatus: TypeAlias = Literal[
    "operational", "degraded_performance", "partial_outage", "major_outage", "under_maintenance"
]
Audience: TypeAlias = Literal["public", "internal"]
SubscriptionStatus: TypeAlias = Literal["pending", "active", "disabled"]
DisabledReason: TypeAlias = Literal["disabled_by_owner", "endpoint_gone", "endpoint_failing"]

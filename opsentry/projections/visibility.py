"""Decide what the public audience may see: the one definition of public visibility.

The audience `internal` sees everything. The audience `public` sees public resources only, and of those:

| part | visible where |
|---|---|
| incident, maintenance window | its visibility is `public`, then and now |
| linked service | the service's visibility is `public` now |
| timeline entry | the entry is public; its author never is |
| visibility, root cause, postmortem | nowhere |
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from opsentry.domain import incident, maintenance
from opsentry.domain.decider import Event
from opsentry.domain.incident import IncidentUpdated
from opsentry.domain.maintenance import MaintenanceUpdated
from opsentry.infrastructure.postgres import Connection

PUBLIC = "public"

_INTERNAL_FIELDS = frozenset({"visibility", "root_cause", "postmortem"})
_INTERNAL_UPDATE_FIELDS = frozenset({"is_public", "author"})

# The present visibility of a resource, and those of the linked services $3: a service link does not say it.
_SELECT_CURRENT = {
    kind: f"""
SELECT visibility, (
    SELECT coalesce(json_object_agg(service_id, visibility), '{{}}')::text FROM services
    WHERE tenant_id = $1 AND service_id = ANY($3)) AS services
FROM {table} WHERE tenant_id = $1 AND {kind}_id = $2
"""
    for kind, table in ((incident.KIND, "incidents"), (maintenance.KIND, "maintenance"))
}


class CurrentVisibility(NamedTuple):
    """The present visibility of a resource and of the services that it links.

    Attributes:
        visibility: The resource's.
        services: The visibility of each linked service, by id; a service that is not projected yet is missing.
    """

    visibility: str
    services: Mapping[int, str]

    def public_services(self) -> set[int]:
        """Return the ids of the linked services that the public audience may see."""
        return {service_id for service_id, visibility in self.services.items() if is_public(visibility)}


def is_public(visibility: str) -> bool:
    """Return whether the public audience may see a resource with this visibility."""
    return visibility == PUBLIC


def is_event_public(visibility: str, event: Event) -> bool:
    """Return whether the public audience may see an event of a resource that had this visibility then."""
    is_internal_update = isinstance(event, IncidentUpdated | MaintenanceUpdated) and not event.is_public
    return is_public(visibility) and not is_internal_update


def public_part(resource: Mapping[str, Any], service_ids: Collection[int]) -> dict[str, Any]:
    """Return the part of a public incident or maintenance window that the public audience may see.

    Args:
        resource: The resource with its timeline, as the API renders it.
        service_ids: The linked services that are public.
    """
    updates: Sequence[Mapping[str, Any]] = resource["updates"]
    return {
        **{name: value for name, value in resource.items() if name not in _INTERNAL_FIELDS},
        "services": [link for link in resource["services"] if link["id"] in service_ids],
        "service_ids": [service_id for service_id in resource["service_ids"] if service_id in service_ids],
        "updates": [
            {name: value for name, value in update.items() if name not in _INTERNAL_UPDATE_FIELDS}
            for update in updates
            if update["is_public"]
        ],
    }


async def select_current_visibility(
    connection: Connection, tenant_id: int, kind: str, stream_id: int, service_ids: Sequence[int]
) -> CurrentVisibility | None:
    """Return the present visibility of an incident or a maintenance window, and of the services that it links.

    The result is `None` if the resource is not projected yet.
    """
    row = await connection.fetchrow(_SELECT_CURRENT[kind], tenant_id, stream_id, service_ids)
    if row is None:
        return None
    return CurrentVisibility(row["visibility"], msgspec.json.decode(row["services"], type=dict[int, str]))

"""What a message tells: the thing as it was then, with what its audience may see, and what kind of news that is."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from opsentry.domain import incident, maintenance
from opsentry.identity import tenants
from opsentry.infrastructure.postgres import Database
from opsentry.infrastructure.single_flight import Recent
from opsentry.projections.as_of import AsOfQueries
from opsentry.projections.engine.projector import PositionNotReached

# Many are told the same at once. Kept no longer, because what was made internal or erased must not be told on.
_SECONDS = 1.0
_TENANT_SECONDS = 10.0
_KEPT = 200
_TENANTS_KEPT = 1_000

_NOT_PUBLIC = ("visibility", "root_cause", "postmortem")
_NOT_PUBLIC_OF_UPDATES = ("is_public", "author")

# Whether the thing is public now, and which of its services; a service's link does not say so.
_NOW = {
    kind: f"""
SELECT visibility, (
    SELECT coalesce(json_object_agg(service_id, visibility), '{{}}')::text FROM services
    WHERE tenant_id = $1 AND service_id = ANY($3)) AS services
FROM {table} WHERE tenant_id = $1 AND {kind}_id = $2
"""
    for kind, table in ((incident.KIND, "incidents"), (maintenance.KIND, "maintenance"))
}

_TENANT = "SELECT slug, name FROM tenants WHERE tenant_id = $1"

Subject: TypeAlias = Mapping[str, Any]


class MessageBuilder:
    """Says what things looked like, to whom."""

    def __init__(self, as_of_queries: AsOfQueries, database: Database) -> None:
        self._as_of_queries = as_of_queries
        self._database = database
        self._subjects: Recent[tuple[int, str, int, int, str], Subject | None] = Recent(_SECONDS, _KEPT)
        self._tenants: Recent[int, Mapping[str, str]] = Recent(_TENANT_SECONDS, _TENANTS_KEPT)

    async def tenant(self, tenant_id: int) -> Mapping[str, str]:
        """Return the tenant's `slug` and `name`, which may be some seconds old.

        Raises:
            TenantNotFound: There is none with this id.
            DatabaseUnavailable: The database was lost.
        """
        return await self._tenants.get(tenant_id, lambda: self._tenant(tenant_id))

    async def compose(self, tenant_id: int, kind: str, stream_id: int, position: int, audience: str) -> Subject | None:
        """Return an incident or a window as it was at `position`; `None` if the audience may not see it.

        The shape is the API's. The audience `internal` sees all. What is told the `public` was public at `position` and
        is public now, give or take a second, and has no root cause, no postmortem, no services that are internal, and
        of the timeline what is public, without authors.

        Raises:
            PositionNotReached: Read models do not show it yet.
            DatabaseUnavailable: The database was lost.
        """
        key = (tenant_id, kind, stream_id, position, audience)
        return await self._subjects.get(key, lambda: self._compose(*key))

    async def _compose(self, tenant_id: int, kind: str, stream_id: int, position: int, audience: str) -> Subject | None:
        at = self._as_of_queries.get_incident if kind == incident.KIND else self._as_of_queries.get_maintenance
        one = await at(tenant_id, stream_id, position)
        if one is None:
            return None
        subject: dict[str, Any] = msgspec.json.decode(one.body)
        if audience != "public":
            return subject
        linked = [service["id"] for service in subject["services"]]
        row = await self._database.fetchrow(_NOW[kind], tenant_id, stream_id, linked)
        if row is None:
            raise PositionNotReached(f"{kind} {stream_id} cannot be shown yet")
        if subject["visibility"] != "public" or row["visibility"] != "public":
            return None
        visibilities = msgspec.json.decode(row["services"])
        if len(visibilities) < len(linked):
            # They are in the ledger, so they will come: rather late than what nobody knows to be public.
            raise PositionNotReached(f"a service of {kind} {stream_id} cannot be shown yet")
        return _public(subject, {int(number) for number, seen in visibilities.items() if seen == "public"})

    async def _tenant(self, tenant_id: int) -> Mapping[str, str]:
        row = await self._database.fetchrow(_TENANT, tenant_id)
        if row is None:
            raise tenants.TenantNotFound(f"no tenant has the id {tenant_id}")
        return {"slug": row["slug"], "name": row["name"]}


def _public(subject: Subject, services: set[int]) -> Subject:
    shown = {name: value for name, value in subject.items() if name not in _NOT_PUBLIC}
    shown["services"] = [service for service in subject["services"] if service["id"] in services]
    shown["service_ids"] = [number for number in subject["service_ids"] if number in services]
    shown["updates"] = [
        {name: value for name, value in update.items() if name not in _NOT_PUBLIC_OF_UPDATES}
        for update in subject["updates"]
        if update["is_public"]
    ]
    return shown


# ------------------------------------------------------------------------------------------------ types of messages

# What other events are called in a message.
_TYPES = {
    "incident.status_changed": "incident.updated",
    "incident.visibility_changed": "incident.updated",
    "incident.services_changed": "incident.updated",
    "incident.edited": "incident.updated",
    "incident.redacted": "incident.updated",
    "maintenance.changed": "maintenance.updated",
    "maintenance.edited": "maintenance.updated",
    "maintenance.redacted": "maintenance.updated",
    "maintenance.reminded": "maintenance.reminder",
    "subscription.created": "subscription.confirm",
    "subscription.test_requested": "subscription.test",
}
# Of several events, the last of the first of these groups that any belongs to says what the message is.
_FIRST = (
    {
        "incident.opened",
        "incident.resolved",
        "incident.reopened",
        "maintenance.scheduled",
        "maintenance.rescheduled",
        "maintenance.started",
        "maintenance.completed",
        "maintenance.cancelled",
    },
    {"incident.severity_changed"},
)


def message_type(topics: Sequence[str]) -> str:
    """Return the type of a message that tells events of these types, at least one, oldest first."""
    types = [_TYPES.get(topic, topic) for topic in topics]
    for group in _FIRST:
        if found := [each for each in types if each in group]:
            return found[-1]
    return types[-1]

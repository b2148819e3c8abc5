"""What a message tells: the thing as it was then, with what its audience may see, and what kind of news that is."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from opsentry.domain import incident
from opsentry.identity import tenants
from opsentry.infrastructure.postgres import Database
from opsentry.infrastructure.single_flight import TtlCache
from opsentry.projections import visibility
from opsentry.projections.as_of import AsOfQueries
from opsentry.projections.engine.projector import PositionNotReached

# Many are told the same at once. Kept no longer, because what was made internal or erased must not be told on.
_SECONDS = 1.0
_TENANT_SECONDS = 10.0
_KEPT = 200
_TENANTS_KEPT = 1_000

_TENANT = "SELECT slug, name FROM tenants WHERE tenant_id = $1"

Subject: TypeAlias = Mapping[str, Any]


class MessageBuilder:
    """Says what things looked like, to whom."""

    def __init__(self, as_of_queries: AsOfQueries, database: Database) -> None:
        self._as_of_queries = as_of_queries
        self._database = database
        self._subjects: TtlCache[tuple[int, str, int, int, str], Subject | None] = TtlCache(
            lambda key: self._compose(*key), ttl_seconds=_SECONDS, max_entries=_KEPT
        )
        self._tenants: TtlCache[int, Mapping[str, str]] = TtlCache(
            self._tenant, ttl_seconds=_TENANT_SECONDS, max_entries=_TENANTS_KEPT
        )

    async def tenant(self, tenant_id: int) -> Mapping[str, str]:
        """Return the tenant's `slug` and `name`, which may be some seconds old.

        Raises:
            TenantNotFound: There is none with this id.
            DatabaseUnavailable: The database was lost.
        """
        return await self._tenants.get(tenant_id)

    async def compose(self, tenant_id: int, kind: str, stream_id: int, position: int, audience: str) -> Subject | None:
        """Return an incident or a window as it was at `position`; `None` if the audience may not see it.

        The shape is the API's. The audience `internal` sees all. What is told the `public` was public at `position` and
        is public now, give or take a second, and has no root cause, no postmortem, no services that are internal, and
        of the timeline what is public, without authors.

        Raises:
            PositionNotReached: Read models do not show it yet.
            DatabaseUnavailable: The database was lost.
        """
        return await self._subjects.get((tenant_id, kind, stream_id, position, audience))

    async def _compose(self, tenant_id: int, kind: str, stream_id: int, position: int, audience: str) -> Subject | None:
        at = self._as_of_queries.get_incident if kind == incident.KIND else self._as_of_queries.get_maintenance
        one = await at(tenant_id, stream_id, position)
        if one is None:
            return None
        subject: dict[str, Any] = msgspec.json.decode(one.body)
        if audience != "public":
            return subject
        linked = [service["id"] for service in subject["services"]]
        async with self._database.connection() as connection:
            now = await visibility.select_current_visibility(connection, tenant_id, kind, stream_id, linked)
        if now is None:
            raise PositionNotReached(f"{kind} {stream_id} cannot be shown yet")
        if not (visibility.is_public(subject["visibility"]) and visibility.is_public(now.visibility)):
            return None
        if len(now.services) < len(linked):
            # They are in the ledger, so they will come: rather late than what nobody knows to be public.
            raise PositionNotReached(f"a service of {kind} {stream_id} cannot be shown yet")
        return visibility.public_part(subject, now.public_services())

    async def _tenant(self, tenant_id: int) -> Mapping[str, str]:
        row = await self._database.fetchrow(_TENANT, tenant_id)
        if row is None:
            raise tenants.TenantNotFound(f"no tenant has the id {tenant_id}")
        return {"slug": row["slug"], "name": row["name"]}


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

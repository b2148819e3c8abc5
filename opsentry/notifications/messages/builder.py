"""Build the content of messages: the subject as of a position, and the type of news.

`projections/visibility.py` decides what the public audience may see.
"""

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

# Many subscriptions receive the same subject at once. The time is short, because a message must not contain what has
# since been made internal or redacted.
_SUBJECT_TTL_SECONDS = 1.0
_TENANT_TTL_SECONDS = 10.0
_MAX_SUBJECTS = 200
_MAX_TENANTS = 1_000

Subject: TypeAlias = Mapping[str, Any]
_SubjectKey: TypeAlias = tuple[int, str, int, int, str]


class MessageBuilder:
    """Look up the subjects and tenants of messages; equal look-ups share one answer."""

    def __init__(self, as_of_queries: AsOfQueries, database: Database) -> None:
        self._as_of_queries = as_of_queries
        self._database = database
        self._subjects: TtlCache[_SubjectKey, Subject | None] = TtlCache(
            lambda key: self._build_subject(*key), ttl_seconds=_SUBJECT_TTL_SECONDS, max_entries=_MAX_SUBJECTS
        )
        self._tenants: TtlCache[int, Mapping[str, str]] = TtlCache(
            self._find_tenant, ttl_seconds=_TENANT_TTL_SECONDS, max_entries=_MAX_TENANTS
        )

    async def get_tenant(self, tenant_id: int) -> Mapping[str, str]:
        """Return the tenant's `slug` and `name`, at most ten seconds old.

        Raises:
            TenantNotFound: No tenant has this id.
            DatabaseUnavailable: The database cannot be reached.
        """
        return await self._tenants.get(tenant_id)

    async def build_subject(
        self, tenant_id: int, kind: str, stream_id: int, position: int, audience: str
    ) -> Subject | None:
        """Return an incident or a maintenance window as of `position`, in the shape of the API.

        The audience `public` gets the public part. A change of visibility takes effect within a second.

        Args:
            tenant_id: The tenant.
            kind: `incident` or `maintenance`.
            stream_id: The id of the incident or the window.
            position: The position of the last reported event.
            audience: `public` or `internal`.

        Returns:
            The decoded JSON, or `None` if the audience may not see the subject.

        Raises:
            PositionNotReached: The projections lack the subject or one of its services.
            DatabaseUnavailable: The database cannot be reached.
        """
        return await self._subjects.get((tenant_id, kind, stream_id, position, audience))

    async def _build_subject(
        self, tenant_id: int, kind: str, stream_id: int, position: int, audience: str
    ) -> Subject | None:
        get = self._as_of_queries.get_incident if kind == incident.KIND else self._as_of_queries.get_maintenance
        rendered = await get(tenant_id, stream_id, position)
        if rendered is None:
            return None
        subject: dict[str, Any] = msgspec.json.decode(rendered.body)
        if audience != "public":
            return subject
        linked = [service["id"] for service in subject["services"]]
        async with self._database.connection() as connection:
            now = await visibility.select_current_visibility(connection, tenant_id, kind, stream_id, linked)
        if now is None:
            raise PositionNotReached(f"{kind} {stream_id} is not projected yet")
        if not (visibility.is_public(subject["visibility"]) and visibility.is_public(now.visibility)):
            return None
        if len(now.services) < len(linked):
            # The ledger has them, so a later attempt finds them. A late message is better than one that reveals an
            # internal service.
            raise PositionNotReached(f"a service of {kind} {stream_id} is not projected yet")
        return visibility.public_part(subject, now.public_services())

    async def _find_tenant(self, tenant_id: int) -> Mapping[str, str]:
        async with self._database.connection() as connection:
            row = await tenants.find_tenant_by_id(connection, tenant_id)
        return {"slug": row["slug"], "name": row["name"]}


# ------------------------------------------------------------------------------------------------ types of messages

# The message type of each event that has none of its own name.
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
# The most important news of several events decides the type: the last event of the first group that has any.
_PRIORITIES = (
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
    """Return the type of a message that reports these events.

    Args:
        topics: The events' types, oldest first; at least one.
    """
    types = [_TYPES.get(topic, topic) for topic in topics]
    for group in _PRIORITIES:
        if found := [type_ for type_ in types if type_ in group]:
            return found[-1]
    return types[-1]

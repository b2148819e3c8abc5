"""Import the records of a Statuspage export into a tenant's ledger.

Events keep the original times as `occurred_at`, and each record keeps its id, so a second import adds only new records.
Imported events are silent: subscribers are not notified.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

import msgspec

from opsentry.application.application import Application
from opsentry.application.caller import WRITE_PERMISSIONS, Caller
from opsentry.domain import incident, maintenance, service
from opsentry.domain.decider import normal_ids
from opsentry.domain.incident import IncidentOpened, IncidentUpdated
from opsentry.domain.maintenance import MaintenanceScheduled, MaintenanceUpdated
from opsentry.domain.service import ServiceRegistered
from opsentry.events import store
from opsentry.events.codec import RecordedEvent
from opsentry.events.store import Append, Appended, NewEvent, Reserved, VersionConflict
from opsentry.importing.statuspage import (
    ComponentLink,
    IncidentRecord,
    IncidentUpdate,
    MaintenanceRecord,
    MaintenanceUpdate,
    StatuspageExport,
)
from opsentry.importing.translation import (
    IMPORTED,
    SEVERITIES,
    DatedEvent,
    assign_slugs,
    has_text,
    incident_events,
    maintenance_events,
)

CONCURRENT_RECORDS = 64


class SkippedRecord(msgspec.Struct, frozen=True):
    """A part of the file that was not imported, and the reason."""

    record: str
    reason: str


class ImportResult(msgspec.Struct):
    """Count the imported records and events.

    Attributes:
        services: New services.
        incidents: New incidents.
        maintenance: New maintenance windows.
        updates: New updates of incidents and windows.
        events: New events, those of updates included.
        unchanged: Records that the ledger had already.
        skipped: Parts of the file that were not imported.
    """

    services: int = 0
    incidents: int = 0
    maintenance: int = 0
    updates: int = 0
    events: int = 0
    unchanged: int = 0
    skipped: list[SkippedRecord] = []


async def import_statuspage(
    app: Application, caller: Caller, export: StatuspageExport, advance: Callable[[], None]
) -> ImportResult:
    """Append the missing events of each record in one transaction per record; call `advance` after each record.

    An interrupted import leaves whole records. A second run adds the rest.

    Args:
        app: The application.
        caller: The caller; needs the write permissions of services, incidents and maintenance.
        export: The checked content of a file.
        advance: Called once per component, incident and window.

    Raises:
        MissingPermission: The caller lacks a permission.
        DatabaseUnavailable, OutcomeUnknown, TenantBusy: See `Appender.append`. Run the import again.
    """
    for kind in (service.KIND, incident.KIND, maintenance.KIND):
        caller.require(WRITE_PERMISSIONS[kind])
    return await _Import(app, caller.tenant_id, advance).run(export)


class _Import:
    """One import into one tenant's ledger."""

    def __init__(self, app: Application, tenant_id: int, advance: Callable[[], None]) -> None:
        self._app = app
        self._tenant_id = tenant_id
        self._advance = advance
        self._result = ImportResult()
        self._slots = asyncio.Semaphore(CONCURRENT_RECORDS)

    async def run(self, export: StatuspageExport) -> ImportResult:
        service_ids = await self._import_services(export)
        page_id = export.page.id
        await asyncio.gather(
            *(self._import_incident(page_id, record, service_ids) for record in reversed(export.incidents)),
            *(self._import_window(page_id, record, service_ids) for record in reversed(export.scheduled_maintenances)),
        )
        await self._app.projector.catch_up(self._tenant_id, 0)
        return self._result

    async def _import_services(self, export: StatuspageExport) -> dict[str, int]:
        """Register the new components as services; return the service id of each component id."""
        history_start = _history_start(export)
        slugs = assign_slugs(component for component in export.components if not component.group)
        service_ids: dict[str, int] = {}
        for component in export.components:
            self._advance()
            if component.group:
                self._skip(f"component {component.id} ({component.name})", "groups are not services")
                continue
            registered = ServiceRegistered(
                slug=slugs[component.id],
                name=component.name,
                description=component.description or None,
                visibility="public",
            )
            registered_at = min(component.created_at or history_start, history_start)
            outcome = await self._create(
                service.KIND, service.slug_reservation(registered.slug), [(registered, registered_at)]
            )
            match outcome:
                case Appended(stream_id=stream_id):
                    self._result.services += 1
                    self._result.events += 1
                case Reserved(stream_id=stream_id):
                    self._result.unchanged += 1
                case _:
                    raise TypeError(f"component {component.id}: {outcome}")
            service_ids[component.id] = stream_id
        return service_ids

    async def _import_incident(self, page_id: str, record: IncidentRecord, service_ids: dict[str, int]) -> None:
        name = f"incident {record.id} ({record.name})"
        if record.impact not in SEVERITIES:
            self._skip(f"impact of {name}", f"{record.impact} is no severity; imported as informational")
        linked = self._linked_services(name, record.components, service_ids)
        async with self._slots:
            added = await self._append_missing(
                incident.KIND,
                f"statuspage:{page_id}:incident:{record.id}",
                lambda history: incident_events(record, linked, history),
            )
        self._count_updates(name, record.incident_updates, added)
        self._result.incidents += any(isinstance(event, IncidentOpened) for event, _ in added)
        self._advance()

    async def _import_window(self, page_id: str, record: MaintenanceRecord, service_ids: dict[str, int]) -> None:
        name = f"maintenance {record.id} ({record.name})"
        linked = self._linked_services(name, record.components, service_ids)
        async with self._slots:
            added = await self._append_missing(
                maintenance.KIND,
                f"statuspage:{page_id}:maintenance:{record.id}",
                lambda history: maintenance_events(record, linked, history),
            )
        self._count_updates(name, record.incident_updates, added)
        self._result.maintenance += any(isinstance(event, MaintenanceScheduled) for event, _ in added)
        self._advance()

    async def _append_missing(
        self, kind: str, reservation: str, missing: Callable[[Sequence[RecordedEvent]], list[DatedEvent]]
    ) -> list[DatedEvent]:
        """Append the events that `missing` returns for the stream's history; return them.

        The reservation finds the stream of an earlier import. A version conflict means that another import of the page
        runs at the same time, so the history is read again.
        """
        stream_id = 0
        events = missing(())
        outcome = await self._create(kind, reservation, events)
        while not isinstance(outcome, Appended):
            if not isinstance(outcome, Reserved | VersionConflict):
                raise TypeError(f"{reservation}: {outcome}")
            if isinstance(outcome, Reserved):
                stream_id = outcome.stream_id
            async with self._app.database.connection() as connection:
                history = await store.read_stream(connection, self._tenant_id, kind, stream_id)
            events = missing(history)
            if not events:
                self._result.unchanged += 1
                return []
            outcome = await self._app.appender.append(
                self._to_append(kind, stream_id, history[-1].version, events, None)
            )
        self._result.events += len(events)
        return events

    async def _create(self, kind: str, reservation: str, events: Sequence[DatedEvent]) -> store.Outcome:
        return await self._app.appender.append(self._to_append(kind, 0, 0, events, reservation))

    def _to_append(
        self, kind: str, stream_id: int, version: int, events: Sequence[DatedEvent], reservation: str | None
    ) -> Append:
        return Append(
            tenant_id=self._tenant_id,
            kind=kind,
            stream_id=stream_id,
            expected_version=version,
            events=[NewEvent(event, IMPORTED, occurred_at) for event, occurred_at in events],
            reservation=reservation,
        )

    def _linked_services(
        self, name: str, links: Iterable[ComponentLink], service_ids: dict[str, int]
    ) -> tuple[int, ...]:
        found = []
        for link in links:
            if link.id in service_ids:
                found.append(service_ids[link.id])
            else:
                self._skip(f"component {link.id} ({link.name}) of {name}", "not among the file's components")
        return normal_ids(found)

    def _count_updates(
        self, name: str, updates: Iterable[IncidentUpdate | MaintenanceUpdate], added: list[DatedEvent]
    ) -> None:
        self._result.updates += sum(isinstance(event, IncidentUpdated | MaintenanceUpdated) for event, _ in added)
        for update in updates:
            if not has_text(update):
                self._skip(f"update {update.id} of {name}", "it has no text; only its status was imported")

    def _skip(self, record: str, reason: str) -> None:
        self._result.skipped.append(SkippedRecord(record, reason))


def _history_start(export: StatuspageExport) -> datetime:
    """Return the earliest time of a record. A component without a time of its own is taken to exist since then."""
    times = [r.created_at for r in export.incidents] + [r.created_at for r in export.scheduled_maintenances]
    return min(times, default=datetime.now(UTC))

"""Writes a page's records to a tenant's ledger.

What is written keeps the original times as `occurred_at`, and each record its id, so that reading the same file again,
or a later one of the same page, adds only what is new. Nobody is notified of history.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

import msgspec

from opsentry.domain import incident, maintenance, service
from opsentry.domain.decider import normal_ids
from opsentry.domain.incident import (
    IncidentOpened,
    IncidentUpdated,
)
from opsentry.domain.maintenance import (
    MaintenanceScheduled,
    MaintenanceUpdated,
)
from opsentry.domain.service import ServiceRegistered
from opsentry.events import store
from opsentry.events.appender import Appender
from opsentry.events.codec import RecordedEvent
from opsentry.events.store import Append, Appended, NewEvent, Reserved, VersionConflict
from opsentry.importing.statuspage import (
    ComponentLink,
    Export,
    IncidentRecord,
    IncidentUpdate,
    MaintenanceRecord,
    MaintenanceUpdate,
)
from opsentry.importing.translation import (
    IMPORTED,
    SEVERITIES,
    Dated,
    has_text,
    incident_events,
    maintenance_events,
    slugs,
)
from opsentry.infrastructure.postgres import Database
from opsentry.projections.engine.projector import Projector

_AT_ONCE = 64


class Skipped(msgspec.Struct, frozen=True):
    """Something that was not taken, and why."""

    what: str
    why: str


class Result(msgspec.Struct):
    """What an import came to: counts of what was added, and what was there already."""

    services: int = 0
    incidents: int = 0
    maintenance: int = 0
    updates: int = 0
    events: int = 0
    unchanged: int = 0
    skipped: list[Skipped] = []


class Importer:
    """Writes a file's content to one tenant's ledger."""

    def __init__(self, database: Database, appender: Appender, projector: Projector, tenant_id: int) -> None:
        self._database = database
        self._appender = appender
        self._projector = projector
        self._tenant_id = tenant_id
        self._result = Result()
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def load(self, export: Export, advance: Callable[[], None]) -> Result:
        """Write what the ledger lacks, one record whole or not at all; call `advance` after each.

        Killed half-way, it can be run again and adds the rest.

        Raises:
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: As `Appender.append`; running it again is safe.
        """
        services = await self._services(export, advance)
        page = export.page.id
        await asyncio.gather(
            *(self._incident(page, record, services, advance) for record in reversed(export.incidents)),
            *(self._window(page, record, services, advance) for record in reversed(export.scheduled_maintenances)),
        )
        await self._projector.catch_up(self._tenant_id, 0)
        return self._result

    async def _services(self, export: Export, advance: Callable[[], None]) -> dict[str, int]:
        """Return the service id of each component, registering those that are new."""
        moments = [r.created_at for r in export.incidents] + [r.created_at for r in export.scheduled_maintenances]
        began = min(moments, default=datetime.now(UTC))
        names = slugs(component for component in export.components if not component.group)
        found: dict[str, int] = {}
        for component in export.components:
            advance()
            if component.group:
                self._skip(f"component {component.id} ({component.name})", "groups are not services")
                continue
            registered = ServiceRegistered(
                slug=names[component.id],
                name=component.name,
                description=component.description or None,
                visibility="public",
            )
            # A component without a date of its own was there when the page's history begins.
            since = began if component.created_at is None else min(component.created_at, began)
            outcome = await self._begin(service.KIND, service.slug_reservation(registered.slug), [(registered, since)])
            match outcome:
                case Appended(stream_id=stream_id):
                    self._result.services += 1
                    self._result.events += 1
                case Reserved(stream_id=stream_id):
                    self._result.unchanged += 1
                case _:
                    raise TypeError(f"component {component.id}: {outcome}")
            found[component.id] = stream_id
        return found

    async def _incident(
        self, page: str, record: IncidentRecord, services: dict[str, int], advance: Callable[[], None]
    ) -> None:
        what = f"incident {record.id} ({record.name})"
        if record.impact not in SEVERITIES:
            self._skip(f"impact of {what}", f"{record.impact} is no severity; taken as informational")
        service_ids = self._linked(what, record.components, services)
        async with self._at_once:
            added = await self._bring_up(
                incident.KIND,
                f"statuspage:{page}:incident:{record.id}",
                lambda history: incident_events(record, service_ids, history),
            )
        self._count(what, record.incident_updates, added)
        self._result.incidents += any(isinstance(event, IncidentOpened) for event, _ in added)
        advance()

    async def _window(
        self, page: str, record: MaintenanceRecord, services: dict[str, int], advance: Callable[[], None]
    ) -> None:
        what = f"maintenance {record.id} ({record.name})"
        service_ids = self._linked(what, record.components, services)
        async with self._at_once:
            added = await self._bring_up(
                maintenance.KIND,
                f"statuspage:{page}:maintenance:{record.id}",
                lambda history: maintenance_events(record, service_ids, history),
            )
        self._count(what, record.incident_updates, added)
        self._result.maintenance += any(isinstance(event, MaintenanceScheduled) for event, _ in added)
        advance()

    async def _bring_up(
        self, kind: str, reservation: str, lacking: Callable[[Sequence[RecordedEvent]], list[Dated]]
    ) -> list[Dated]:
        """Append what a stream lacks; return it."""
        stream_id = 0
        events = lacking(())
        outcome = await self._begin(kind, reservation, events)
        while not isinstance(outcome, Appended):
            if not isinstance(outcome, Reserved | VersionConflict):
                raise TypeError(f"{reservation}: {outcome}")
            if isinstance(outcome, Reserved):
                stream_id = outcome.stream_id
            async with self._database.connection() as connection:
                history = await store.read_stream(connection, self._tenant_id, kind, stream_id)
            events = lacking(history)
            if not events:
                self._result.unchanged += 1
                return []
            outcome = await self._appender.append(self._append(kind, stream_id, history[-1].version, events, None))
        self._result.events += len(events)
        return events

    async def _begin(self, kind: str, reservation: str, events: Sequence[Dated]) -> store.Outcome:
        return await self._appender.append(self._append(kind, 0, 0, events, reservation))

    def _append(
        self, kind: str, stream_id: int, version: int, events: Sequence[Dated], reservation: str | None
    ) -> Append:
        return Append(
            tenant_id=self._tenant_id,
            kind=kind,
            stream_id=stream_id,
            expected_version=version,
            events=[NewEvent(event, IMPORTED, moment) for event, moment in events],
            reservation=reservation,
        )

    def _linked(self, what: str, links: Iterable[ComponentLink], services: dict[str, int]) -> tuple[int, ...]:
        known = []
        for link in links:
            if link.id in services:
                known.append(services[link.id])
            else:
                self._skip(f"component {link.id} ({link.name}) of {what}", "not among the file's components")
        return normal_ids(known)

    def _count(self, what: str, updates: Iterable[IncidentUpdate | MaintenanceUpdate], added: list[Dated]) -> None:
        self._result.updates += sum(isinstance(e, IncidentUpdated | MaintenanceUpdated) for e, _ in added)
        for update in updates:
            if not has_text(update):
                self._skip(f"update {update.id} of {what}", "it has no text; its status was taken")

    def _skip(self, what: str, why: str) -> None:
        self._result.skipped.append(Skipped(what, why))

"""Reads Statuspage's v2 JSON (`incidents`, `scheduled_maintenances`, `components`) into a tenant's ledger.

The file is read and checked whole before anything is written. What is written keeps the original times as
`occurred_at`, and each record its id, so that reading the same file again, or a later one of the same page, adds only
what is new. Nobody is notified of history.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec

from opsentry.domain import incident, maintenance, service
from opsentry.domain.decider import InvalidField, check_text, check_title, normal_ids
from opsentry.domain.events import AnyEvent
from opsentry.domain.incident import (
    IncidentEvent,
    IncidentOpened,
    IncidentReopened,
    IncidentResolved,
    IncidentStatusChanged,
    IncidentUpdated,
)
from opsentry.domain.maintenance import (
    MaintenanceCompleted,
    MaintenanceEvent,
    MaintenanceScheduled,
    MaintenanceStarted,
    MaintenanceUpdated,
)
from opsentry.domain.service import ServiceRegistered
from opsentry.events import log
from opsentry.events.codec import Actor, Meta, RecordedEvent
from opsentry.events.log import Append, Appended, Claimed, Conflict, NewEvent
from opsentry.events.writer import Writer
from opsentry.postgres import Database
from opsentry.projections.runner import Runner

SEVERITIES = {"none": "informational", "minor": "degraded", "major": "partial_outage", "critical": "major_outage"}

_META = Meta(Actor("import"), silent=True)
_AT_ONCE = 64

Moment = Annotated[datetime, msgspec.Meta(tz=True)]
Dated = tuple[AnyEvent, datetime]


class Malformed(Exception):
    """The file cannot be read; the message names the place. Nothing was written."""


# ---------------------------------------------------------------------------------------------- the file's shapes


class Page(msgspec.Struct):
    """The page that the file is of."""

    id: str
    name: str = ""


class Component(msgspec.Struct):
    """What becomes a service."""

    id: str
    name: str
    description: str | None = None
    group: bool = False
    created_at: Moment | None = None


class ComponentLink(msgspec.Struct):
    """A component as incidents name it."""

    id: str
    name: str


class IncidentUpdate(msgspec.Struct):
    """An entry of an incident's timeline."""

    id: str
    status: Literal["investigating", "identified", "monitoring", "resolved", "postmortem"]
    created_at: Moment
    body: str | None = None
    display_at: Moment | None = None


class IncidentRecord(msgspec.Struct):
    """An incident; `incident_updates` are newest first."""

    id: str
    name: str
    status: Literal["investigating", "identified", "monitoring", "resolved", "postmortem"]
    impact: Literal["none", "minor", "major", "critical", "maintenance"]
    created_at: Moment
    incident_updates: list[IncidentUpdate]
    components: list[ComponentLink] = []
    started_at: Moment | None = None
    resolved_at: Moment | None = None


class MaintenanceUpdate(msgspec.Struct):
    """An entry of a window's timeline."""

    id: str
    status: Literal["scheduled", "in_progress", "verifying", "completed"]
    created_at: Moment
    body: str | None = None
    display_at: Moment | None = None


class MaintenanceRecord(msgspec.Struct):
    """A maintenance window; `incident_updates` are newest first."""

    id: str
    name: str
    status: Literal["scheduled", "in_progress", "verifying", "completed"]
    created_at: Moment
    scheduled_for: Moment
    scheduled_until: Moment
    incident_updates: list[MaintenanceUpdate]
    components: list[ComponentLink] = []


class Export(msgspec.Struct):
    """A whole file."""

    page: Page
    components: list[Component]
    incidents: list[IncidentRecord]
    scheduled_maintenances: list[MaintenanceRecord] = []


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


def read(path: Path) -> Export:
    """Return the file's content, checked.

    Raises:
        Malformed: Names the place of the first thing that is wrong.
    """
    try:
        export = msgspec.json.decode(path.read_bytes(), type=Export)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        raise Malformed(f"{place.rstrip('`').lstrip('.') or 'the file'}: {problem}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"not well-formed JSON: {error}") from None
    _check(export)
    return export


def _check(export: Export) -> None:
    """Refuse what has the right types and still cannot be."""
    try:
        check_title("page.id", export.page.id)
    except InvalidField as error:
        raise Malformed(str(error)) from None
    sections: tuple[tuple[str, Sequence[Component | IncidentRecord | MaintenanceRecord]], ...] = (
        ("components", export.components),
        ("incidents", export.incidents),
        ("scheduled_maintenances", export.scheduled_maintenances),
    )
    for section, records in sections:
        seen: set[str] = set()
        for index, record in enumerate(records):
            place = f"{section}[{index}]"
            if record.id in seen:
                raise Malformed(f"{place}.id: {record.id} stands twice")
            seen.add(record.id)
            _check_words(place, record)
            _check_updates(place, record)
            if isinstance(record, MaintenanceRecord) and record.scheduled_until <= record.scheduled_for:
                raise Malformed(f"{place}.scheduled_until: must be after scheduled_for")


def _check_updates(place: str, record: Component | IncidentRecord | MaintenanceRecord) -> None:
    _check_moments(place, record)
    if isinstance(record, Component):
        return
    updates: Sequence[IncidentUpdate | MaintenanceUpdate] = record.incident_updates
    seen: set[str] = set()
    for index, update in enumerate(updates):
        if update.id in seen:
            raise Malformed(f"{place}.incident_updates[{index}].id: {update.id} stands twice")
        seen.add(update.id)
        _check_moments(f"{place}.incident_updates[{index}]", update)


def _check_moments(place: str, record: msgspec.Struct) -> None:
    for name in record.__struct_fields__:
        moment = getattr(record, name)
        if isinstance(moment, datetime):
            try:
                moment.astimezone(UTC)
            except OverflowError:
                raise Malformed(f"{place}.{name}: is out of range") from None


def _check_words(place: str, record: Component | IncidentRecord | MaintenanceRecord) -> None:
    try:
        check_title("id", record.id)
        check_title("name", record.name)
        if isinstance(record, Component):
            check_text("description", record.description)
            return
        updates: Sequence[IncidentUpdate | MaintenanceUpdate] = record.incident_updates
        for index, update in enumerate(updates):
            check_text(f"incident_updates[{index}].body", update.body)
    except InvalidField as error:
        raise Malformed(f"{place}.{error}") from None


# ---------------------------------------------------------------------------------------------- what it means


def incident_events(
    record: IncidentRecord, service_ids: tuple[int, ...], history: Sequence[RecordedEvent] = ()
) -> list[Dated]:
    """Return what the ledger lacks of an incident, given what it has of it."""
    events: list[Dated] = []
    updates = _in_order(record.incident_updates)
    began = min([record.started_at or record.created_at, record.created_at, *(_when(u) for u in updates[:1])])
    state = incident.DECIDER.fold(cast("IncidentEvent", recorded.event) for recorded in history)
    if state is None:
        opened = IncidentOpened(
            title=record.name,
            severity=SEVERITIES.get(record.impact, "informational"),
            visibility="public",
            service_ids=service_ids,
            source=record.id,
        )
        events.append((opened, began))
        state = incident.evolve(None, opened)
    taken = [(recorded.event, recorded.occurred_at) for recorded in history if recorded.meta.actor == _META.actor]
    status = state.status
    moment = began
    for moment, wanted, moves, update in _steps(record, updates, began):
        if update is not None and update.id in state.sources:
            continue
        # What has no text leaves no id behind: it was taken where the moves that it makes were.
        if (update is None or not _has_text(update)) and all((move, moment) in taken for move in moves):
            continue
        events += [(event, moment) for event in _moved(status, wanted)]
        status = wanted
        if update is not None and _has_text(update):
            events.append((IncidentUpdated(message=update.body, status=status, source=update.id), moment))
    # An entry that was put in between leaves the incident where it is now, not where it was then.
    if events and status != (now := _incident_status(record.status)):
        events += [(event, moment) for event in _moved(status, now)]
    return events


def _steps(
    record: IncidentRecord, updates: Sequence[Any], began: datetime
) -> list[tuple[datetime, str, list[AnyEvent], Any]]:
    """Return (moment, status, how it gets there from the one before, entry) for each entry, oldest first.

    Where the entries do not lead to the status that the record has now, one more step without an entry does.
    """
    steps: list[tuple[datetime, str, list[AnyEvent], Any]] = []
    status = "investigating"
    moment = began
    for update in updates:
        wanted = _incident_status(update.status)
        moment = _when(update)
        steps.append((moment, wanted, _moved(status, wanted), update))
        status = wanted
    now = _incident_status(record.status)
    if status != now:
        if now == "resolved" and record.resolved_at is not None:
            moment = max(moment, record.resolved_at)
        steps.append((moment, now, _moved(status, now), None))
    return steps


def _incident_status(status: str) -> str:
    return "resolved" if status == "postmortem" else status


def _has_text(update: IncidentUpdate | MaintenanceUpdate) -> bool:
    return bool(update.body and update.body.strip())


def _moved(current: str, wanted: str) -> list[AnyEvent]:
    if current == wanted:
        return []
    if wanted == "resolved":
        return [IncidentResolved()]
    if current != "resolved":
        return [IncidentStatusChanged(status=wanted)]
    return [IncidentReopened(), *([] if wanted == "investigating" else [IncidentStatusChanged(status=wanted)])]


def maintenance_events(
    record: MaintenanceRecord, service_ids: tuple[int, ...], history: Sequence[RecordedEvent] = ()
) -> list[Dated]:
    """Return what the ledger lacks of a window, given what it has of it."""
    events: list[Dated] = []
    updates = _in_order(record.incident_updates)
    state = maintenance.DECIDER.fold(cast("MaintenanceEvent", recorded.event) for recorded in history)
    if state is None:
        scheduled = MaintenanceScheduled(
            title=record.name,
            scheduled_start=record.scheduled_for.astimezone(UTC),
            scheduled_end=record.scheduled_until.astimezone(UTC),
            visibility="public",
            service_ids=service_ids,
            source=record.id,
        )
        events.append((scheduled, min([record.created_at, *(_when(u) for u in updates[:1])])))
        state = maintenance.evolve(None, scheduled)
    status = state.status
    for update in updates:
        if update.id in state.sources:
            continue
        moment = _when(update)
        moves = _window_moves(status, update.status)
        events += [(event, moment) for event in moves]
        status = _window_status(status, moves)
        if _has_text(update):
            events.append((MaintenanceUpdated(message=update.body, status=status, source=update.id), moment))
    # What the entries do not say went as planned: left open, the scheduler would move it, and tell of it, today.
    planned = {MaintenanceStarted.TYPE: record.scheduled_for, MaintenanceCompleted.TYPE: record.scheduled_until}
    events += [(event, planned[event.TYPE]) for event in _window_moves(status, record.status)]
    return events


def _window_moves(current: str, wanted: str) -> list[AnyEvent]:
    moves: list[AnyEvent] = []
    if wanted != "scheduled" and current == "scheduled":
        moves.append(MaintenanceStarted())
        current = "active"
    if wanted == "completed" and current == "active":
        moves.append(MaintenanceCompleted())
    return moves


def _window_status(current: str, moves: Sequence[AnyEvent]) -> str:
    if not moves:
        return current
    return "completed" if isinstance(moves[-1], MaintenanceCompleted) else "active"


def _in_order(updates: Sequence[IncidentUpdate] | Sequence[MaintenanceUpdate]) -> list[Any]:
    """Return updates oldest first; those of one moment in the order they were written, the file's reversed."""
    oldest_first: list[Any] = list(reversed(updates))
    oldest_first.sort(key=_when)
    return oldest_first


def _when(update: IncidentUpdate | MaintenanceUpdate) -> datetime:
    return update.display_at or update.created_at


def slugs(components: Iterable[Component]) -> dict[str, str]:
    """Return a slug for each component id; components of one name are told apart by their ids."""
    taken: set[str] = set()
    found: dict[str, str] = {}
    for component in components:
        words = re.sub(r"[^a-z0-9]+", "-", component.name.lower()).strip("-")
        unique = re.sub(r"[^a-z0-9]+", "-", component.id.lower()).strip("-")
        slug = words[:63].strip("-") or unique[:63].strip("-") or "service"
        if slug in taken:
            slug = f"{slug[:40].strip('-')}-{unique[:22]}".strip("-")
        stem, numbers = slug[:56].strip("-"), count(2)
        while slug in taken:
            slug = f"{stem}-{next(numbers)}"
        taken.add(slug)
        found[component.id] = slug
    return found


# ---------------------------------------------------------------------------------------------- writing it


class Importer:
    """Writes a file's content to one tenant's ledger."""

    def __init__(self, database: Database, writer: Writer, runner: Runner, tenant_id: int) -> None:
        self._database = database
        self._writer = writer
        self._runner = runner
        self._tenant_id = tenant_id
        self._result = Result()
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def load(self, export: Export, advance: Callable[[], None]) -> Result:
        """Write what the ledger lacks, one record whole or not at all; call `advance` after each.

        Killed half-way, it can be run again and adds the rest.

        Raises:
            DatabaseUnavailable, OutcomeUnknown, TenantBusy: As `Writer.append`; running it again is safe.
        """
        services = await self._services(export, advance)
        page = export.page.id
        await asyncio.gather(
            *(self._incident(page, record, services, advance) for record in reversed(export.incidents)),
            *(self._window(page, record, services, advance) for record in reversed(export.scheduled_maintenances)),
        )
        await self._runner.catch_up(self._tenant_id, 0)
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
            outcome = await self._begin(service.KIND, service.claim(registered.slug), [(registered, since)])
            match outcome:
                case Appended(stream_id=stream_id):
                    self._result.services += 1
                    self._result.events += 1
                case Claimed(stream_id=stream_id):
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
        self, kind: str, claim: str, lacking: Callable[[Sequence[RecordedEvent]], list[Dated]]
    ) -> list[Dated]:
        """Append what a stream lacks; return it."""
        stream_id = 0
        events = lacking(())
        outcome = await self._begin(kind, claim, events)
        while not isinstance(outcome, Appended):
            if not isinstance(outcome, Claimed | Conflict):
                raise TypeError(f"{claim}: {outcome}")
            if isinstance(outcome, Claimed):
                stream_id = outcome.stream_id
            async with self._database.connection() as connection:
                history = await log.read_stream(connection, self._tenant_id, kind, stream_id)
            events = lacking(history)
            if not events:
                self._result.unchanged += 1
                return []
            outcome = await self._writer.append(self._append(kind, stream_id, history[-1].version, events, None))
        self._result.events += len(events)
        return events

    async def _begin(self, kind: str, claim: str, events: Sequence[Dated]) -> log.Outcome:
        return await self._writer.append(self._append(kind, 0, 0, events, claim))

    def _append(self, kind: str, stream_id: int, version: int, events: Sequence[Dated], claim: str | None) -> Append:
        return Append(
            tenant_id=self._tenant_id,
            kind=kind,
            stream_id=stream_id,
            expected_version=version,
            events=[NewEvent(event, _META, moment) for event, moment in events],
            claim=claim,
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
            if not _has_text(update):
                self._skip(f"update {update.id} of {what}", "it has no text; its status was taken")

    def _skip(self, what: str, why: str) -> None:
        self._result.skipped.append(Skipped(what, why))

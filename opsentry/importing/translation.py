"""What a page's records mean as events: what the ledger lacks of each, given what it has."""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Any, cast

from opsentry.domain import incident, maintenance
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
from opsentry.events.codec import Actor, Meta, RecordedEvent
from opsentry.importing.statuspage import (
    Component,
    IncidentRecord,
    IncidentUpdate,
    MaintenanceRecord,
    MaintenanceUpdate,
)

SEVERITIES = {"none": "informational", "minor": "degraded", "major": "partial_outage", "critical": "major_outage"}

IMPORTED = Meta(Actor("importer"), silent=True)

Dated = tuple[AnyEvent, datetime]


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
    taken = [(recorded.event, recorded.occurred_at) for recorded in history if recorded.meta.actor == IMPORTED.actor]
    status = state.status
    moment = began
    for moment, wanted, moves, update in _steps(record, updates, began):
        if update is not None and update.id in state.sources:
            continue
        # What has no text leaves no id behind: it was taken where the moves that it makes were.
        if (update is None or not has_text(update)) and all((move, moment) in taken for move in moves):
            continue
        events += [(event, moment) for event in _moved(status, wanted)]
        status = wanted
        if update is not None and has_text(update):
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


def has_text(update: IncidentUpdate | MaintenanceUpdate) -> bool:
    """Tell whether an update makes an entry of the timeline."""
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
        if has_text(update):
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

"""Translate the records of a page into the events that the ledger lacks, given the events that it has."""

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

# An event and its `occurred_at`.
DatedEvent = tuple[AnyEvent, datetime]


def incident_events(
    record: IncidentRecord, service_ids: tuple[int, ...], history: Sequence[RecordedEvent] = ()
) -> list[DatedEvent]:
    """Return the missing events of an incident in order.

    Args:
        record: The incident in the file.
        service_ids: The affected services.
        history: The events of an earlier import, and of people since.
    """
    events: list[DatedEvent] = []
    updates = _in_order(record.incident_updates)
    opened_at = min([record.started_at or record.created_at, record.created_at, *(_when(u) for u in updates[:1])])
    state = incident.DECIDER.fold(cast("IncidentEvent", recorded.event) for recorded in history)
    if state is None:
        opened = IncidentOpened(
            title=record.name,
            severity=SEVERITIES.get(record.impact, "informational"),
            visibility="public",
            service_ids=service_ids,
            source=record.id,
        )
        events.append((opened, opened_at))
        state = incident.evolve(None, opened)
    taken = [(recorded.event, recorded.occurred_at) for recorded in history if recorded.meta.actor == IMPORTED.actor]
    status = state.status
    moment = opened_at
    for moment, target, moves, update in _steps(record, updates, opened_at):
        if update is not None and update.id in state.sources:
            continue
        # An update without text leaves no id in the ledger. The moves that it makes show that it was imported.
        if (update is None or not has_text(update)) and all((move, moment) in taken for move in moves):
            continue
        events += [(event, moment) for event in _moves(status, target)]
        status = target
        if update is not None and has_text(update):
            events.append((IncidentUpdated(message=update.body, status=status, source=update.id), moment))
    # An update inserted before imported ones must not change the present status.
    if events and status != (now := _incident_status(record.status)):
        events += [(event, moment) for event in _moves(status, now)]
    return events


def _steps(
    record: IncidentRecord, updates: Sequence[Any], opened_at: datetime
) -> list[tuple[datetime, str, list[AnyEvent], Any]]:
    """Return (time, status, moves to that status, update) for each update, oldest first.

    If the updates do not lead to the present status of the record, one more step without an update does.
    """
    steps: list[tuple[datetime, str, list[AnyEvent], Any]] = []
    status = "investigating"
    moment = opened_at
    for update in updates:
        target = _incident_status(update.status)
        moment = _when(update)
        steps.append((moment, target, _moves(status, target), update))
        status = target
    now = _incident_status(record.status)
    if status != now:
        if now == "resolved" and record.resolved_at is not None:
            moment = max(moment, record.resolved_at)
        steps.append((moment, now, _moves(status, now), None))
    return steps


def _incident_status(status: str) -> str:
    return "resolved" if status == "postmortem" else status


def has_text(update: IncidentUpdate | MaintenanceUpdate) -> bool:
    """Return whether an update has a text. Others only change the status."""
    return bool(update.body and update.body.strip())


def _moves(current: str, target: str) -> list[AnyEvent]:
    if current == target:
        return []
    if target == "resolved":
        return [IncidentResolved()]
    if current != "resolved":
        return [IncidentStatusChanged(status=target)]
    return [IncidentReopened(), *([] if target == "investigating" else [IncidentStatusChanged(status=target)])]


def maintenance_events(
    record: MaintenanceRecord, service_ids: tuple[int, ...], history: Sequence[RecordedEvent] = ()
) -> list[DatedEvent]:
    """Return the missing events of a maintenance window in order.

    Args:
        record: The window in the file.
        service_ids: The affected services.
        history: The events of an earlier import, and of people since.
    """
    events: list[DatedEvent] = []
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
    # Moves without an update happened as planned. Without them the scheduler would start the old window today.
    planned = {MaintenanceStarted.TYPE: record.scheduled_for, MaintenanceCompleted.TYPE: record.scheduled_until}
    events += [(event, planned[event.TYPE]) for event in _window_moves(status, record.status)]
    return events


def _window_moves(current: str, target: str) -> list[AnyEvent]:
    moves: list[AnyEvent] = []
    if target != "scheduled" and current == "scheduled":
        moves.append(MaintenanceStarted())
        current = "active"
    if target == "completed" and current == "active":
        moves.append(MaintenanceCompleted())
    return moves


def _window_status(current: str, moves: Sequence[AnyEvent]) -> str:
    if not moves:
        return current
    return "completed" if isinstance(moves[-1], MaintenanceCompleted) else "active"


def _in_order(updates: Sequence[IncidentUpdate] | Sequence[MaintenanceUpdate]) -> list[Any]:
    """Return updates oldest first; updates of equal time in the order of writing, which the file reverses."""
    oldest_first: list[Any] = list(reversed(updates))
    oldest_first.sort(key=_when)
    return oldest_first


def _when(update: IncidentUpdate | MaintenanceUpdate) -> datetime:
    return update.display_at or update.created_at


def assign_slugs(components: Iterable[Component]) -> dict[str, str]:
    """Return a unique slug for each component id. The ids distinguish components of equal name."""
    taken: set[str] = set()
    found: dict[str, str] = {}
    for component in components:
        name = re.sub(r"[^a-z0-9]+", "-", component.name.lower()).strip("-")
        unique = re.sub(r"[^a-z0-9]+", "-", component.id.lower()).strip("-")
        slug = name[:63].strip("-") or unique[:63].strip("-") or "service"
        if slug in taken:
            slug = f"{slug[:40].strip('-')}-{unique[:22]}".strip("-")
        stem, numbers = slug[:56].strip("-"), count(2)
        while slug in taken:
            slug = f"{stem}-{next(numbers)}"
        taken.add(slug)
        found[component.id] = slug
    return found

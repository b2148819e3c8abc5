"""Maintenance windows: `scheduled → active → completed`, or `scheduled → cancelled`.

That a window's hour has come is an event like any other: the scheduler starts and completes windows by command.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import ClassVar, TypeAlias, assert_never

import msgspec
from msgspec import UNSET, UnsetType

from opsentry.domain.decider import (
    REDACTED,
    Decider,
    Event,
    IllegalTransition,
    InvalidField,
    check_choice,
    check_text,
    check_title,
    normal_ids,
    set_fields,
)
from opsentry.domain.redaction import RedactionPlan, check_reason

KIND = "maintenance"
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "scheduled": frozenset({"active", "cancelled"}),
    "active": frozenset({"completed"}),
    "completed": frozenset(),
    "cancelled": frozenset(),
}
STATUSES = tuple(TRANSITIONS)
VISIBILITIES = ("public", "internal")
REDACTABLE_FIELDS = ("title", "description")
_TIMES = ("scheduled_start", "scheduled_end")
# What may be changed while a window has this status: what was promised is kept from its beginning on.
_CHANGEABLE = {
    "active": {*REDACTABLE_FIELDS, "scheduled_end", "auto_complete"},
    "completed": {*REDACTABLE_FIELDS},
    "cancelled": {*REDACTABLE_FIELDS},
}


# ---------------------------------------------------------------------------------------------------- events


class MaintenanceScheduled(Event, frozen=True, kw_only=True):
    """A window was announced. `source` names the record it was imported from."""

    TYPE: ClassVar[str] = "maintenance.scheduled"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"title", "description"})
    title: str
    description: str | None = None
    scheduled_start: datetime
    scheduled_end: datetime
    visibility: str
    service_ids: tuple[int, ...] = ()
    exclude_from_sla: bool = False
    suppress_alerts: bool = False
    auto_start: bool = True
    auto_complete: bool = True
    source: str | None = None


class MaintenanceRescheduled(Event, frozen=True, kw_only=True):
    """Its hours are now these, both in UTC; of an active window only the end may be another one."""

    TYPE: ClassVar[str] = "maintenance.rescheduled"
    scheduled_start: datetime
    scheduled_end: datetime


class MaintenanceChanged(Event, frozen=True, kw_only=True):
    """Facts about it changed. Those that are `UNSET` stay as they were."""

    TYPE: ClassVar[str] = "maintenance.changed"
    visibility: str | UnsetType = UNSET
    service_ids: tuple[int, ...] | UnsetType = UNSET
    exclude_from_sla: bool | UnsetType = UNSET
    suppress_alerts: bool | UnsetType = UNSET
    auto_start: bool | UnsetType = UNSET
    auto_complete: bool | UnsetType = UNSET


class MaintenanceReminded(Event, frozen=True, kw_only=True):
    """It begins soon: who is told of it hears so once more."""

    TYPE: ClassVar[str] = "maintenance.reminded"


class MaintenanceStarted(Event, frozen=True, kw_only=True):
    """Work has begun."""

    TYPE: ClassVar[str] = "maintenance.started"


class MaintenanceCompleted(Event, frozen=True, kw_only=True):
    """Work is done."""

    TYPE: ClassVar[str] = "maintenance.completed"


class MaintenanceCancelled(Event, frozen=True, kw_only=True):
    """The window will not happen."""

    TYPE: ClassVar[str] = "maintenance.cancelled"


class MaintenanceUpdated(Event, frozen=True, kw_only=True):
    """A message was added to the timeline, while the window had `status`."""

    TYPE: ClassVar[str] = "maintenance.updated"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"message"})
    message: str
    status: str
    is_public: bool = True
    source: str | None = None


class MaintenanceEdited(Event, frozen=True, kw_only=True):
    """Words about it changed. Those that are `UNSET` stay as they were."""

    TYPE: ClassVar[str] = "maintenance.edited"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"title", "description"})
    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET


class MaintenanceRedacted(Event, frozen=True, kw_only=True):
    """The words of the events with these versions were erased; of the window itself, `fields` now read `[redacted]`.

    `reason` is what people wrote too, and can be erased like everything else.
    """

    TYPE: ClassVar[str] = "maintenance.redacted"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"reason"})
    versions: tuple[int, ...]
    fields: tuple[str, ...] = ()
    reason: str


MaintenanceEvent: TypeAlias = (
    MaintenanceScheduled
    | MaintenanceRescheduled
    | MaintenanceChanged
    | MaintenanceReminded
    | MaintenanceStarted
    | MaintenanceCompleted
    | MaintenanceCancelled
    | MaintenanceUpdated
    | MaintenanceEdited
    | MaintenanceRedacted
)


# ---------------------------------------------------------------------------------------------------- state


class Maintenance(msgspec.Struct, frozen=True, kw_only=True):
    """A window as its events leave it."""

    title: str
    description: str | None
    status: str
    visibility: str
    service_ids: tuple[int, ...]
    scheduled_start: datetime
    scheduled_end: datetime
    exclude_from_sla: bool
    suppress_alerts: bool
    auto_start: bool
    auto_complete: bool
    reminded: bool = False
    sources: frozenset[str] = frozenset()

    @property
    def due_at(self) -> datetime | None:
        """When the scheduler has to move it on, if it has to."""
        if self.status == "scheduled" and self.auto_start:
            return self.scheduled_start
        if self.status == "active" and self.auto_complete:
            return self.scheduled_end
        return None


def evolve(state: Maintenance | None, event: MaintenanceEvent) -> Maintenance:
    """Fold one event into the state."""
    if isinstance(event, MaintenanceScheduled):
        return Maintenance(
            title=event.title,
            description=event.description,
            status="scheduled",
            visibility=event.visibility,
            service_ids=event.service_ids,
            scheduled_start=event.scheduled_start,
            scheduled_end=event.scheduled_end,
            exclude_from_sla=event.exclude_from_sla,
            suppress_alerts=event.suppress_alerts,
            auto_start=event.auto_start,
            auto_complete=event.auto_complete,
            sources=frozenset() if event.source is None else frozenset({event.source}),
        )
    if state is None:
        raise ValueError(f"{event.TYPE} before {MaintenanceScheduled.TYPE}")
    change = msgspec.structs.replace
    match event:
        case MaintenanceRescheduled():
            start, end = event.scheduled_start, event.scheduled_end
            return change(state, scheduled_start=start, scheduled_end=end, reminded=False)
        case MaintenanceChanged() | MaintenanceEdited():
            return change(state, **set_fields(event))
        case MaintenanceReminded():
            return change(state, reminded=True)
        case MaintenanceStarted():
            return change(state, status="active")
        case MaintenanceCompleted():
            return change(state, status="completed")
        case MaintenanceCancelled():
            return change(state, status="cancelled")
        case MaintenanceUpdated():
            return state if event.source is None else change(state, sources=state.sources | {event.source})
        case MaintenanceRedacted():
            return change(state, **dict.fromkeys(event.fields, REDACTED))
        case _:
            assert_never(event)


# ---------------------------------------------------------------------------------------------------- commands


class ScheduleMaintenance(msgspec.Struct, frozen=True, kw_only=True):
    """Announce a window."""

    title: str
    scheduled_start: datetime
    scheduled_end: datetime
    description: str | None = None
    visibility: str = "public"
    service_ids: tuple[int, ...] = ()
    exclude_from_sla: bool = False
    suppress_alerts: bool = False
    auto_start: bool = True
    auto_complete: bool = True


class ChangeMaintenance(msgspec.Struct, frozen=True, kw_only=True):
    """Change what is set, leave what is `UNSET`."""

    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    scheduled_start: datetime | UnsetType = UNSET
    scheduled_end: datetime | UnsetType = UNSET
    visibility: str | UnsetType = UNSET
    service_ids: tuple[int, ...] | UnsetType = UNSET
    exclude_from_sla: bool | UnsetType = UNSET
    suppress_alerts: bool | UnsetType = UNSET
    auto_start: bool | UnsetType = UNSET
    auto_complete: bool | UnsetType = UNSET


class RemindMaintenance(msgspec.Struct, frozen=True):
    """Remind of a scheduled window that begins soon. Once is enough; one that has begun needs no reminder."""


class StartMaintenance(msgspec.Struct, frozen=True):
    """Begin a scheduled window."""


class CompleteMaintenance(msgspec.Struct, frozen=True):
    """End an active window."""


class CancelMaintenance(msgspec.Struct, frozen=True):
    """RequestContext a scheduled window off."""


class RedactMaintenance(msgspec.Struct, frozen=True, kw_only=True):
    """Erase words, for the reason given."""

    erasure: RedactionPlan
    reason: str


MaintenanceCommand: TypeAlias = (
    ScheduleMaintenance
    | ChangeMaintenance
    | RemindMaintenance
    | StartMaintenance
    | CompleteMaintenance
    | CancelMaintenance
    | RedactMaintenance
)


def decide(state: Maintenance | None, command: MaintenanceCommand) -> Sequence[MaintenanceEvent]:
    """Answer `command` with events, or raise `InvalidField` or `IllegalTransition`."""
    if isinstance(command, ScheduleMaintenance):
        if state is not None:
            raise IllegalTransition("the maintenance window exists already")
        return [_schedule(command)]
    if state is None:
        raise IllegalTransition("the maintenance window does not exist")
    match command:
        case ChangeMaintenance():
            return _change(state, command)
        case RemindMaintenance():
            return [MaintenanceReminded()] if state.status == "scheduled" and not state.reminded else []
        case StartMaintenance():
            return [_move(state, "active", MaintenanceStarted())]
        case CompleteMaintenance():
            return [_move(state, "completed", MaintenanceCompleted())]
        case CancelMaintenance():
            return [_move(state, "cancelled", MaintenanceCancelled())]
        case RedactMaintenance():
            return _redact(command)
        case _:
            assert_never(command)


def _schedule(command: ScheduleMaintenance) -> MaintenanceScheduled:
    _check_times(command.scheduled_start, command.scheduled_end)
    return MaintenanceScheduled(
        title=check_title("title", command.title),
        description=check_text("description", command.description),
        scheduled_start=command.scheduled_start,
        scheduled_end=command.scheduled_end,
        visibility=check_choice("visibility", command.visibility, VISIBILITIES),
        service_ids=normal_ids(command.service_ids),
        exclude_from_sla=command.exclude_from_sla,
        suppress_alerts=command.suppress_alerts,
        auto_start=command.auto_start,
        auto_complete=command.auto_complete,
    )


def _change(state: Maintenance, command: ChangeMaintenance) -> list[MaintenanceEvent]:
    wanted = set_fields(command)
    if "title" in wanted:
        check_title("title", wanted["title"])
    if "description" in wanted:
        check_text("description", wanted["description"])
    if "visibility" in wanted:
        check_choice("visibility", wanted["visibility"], VISIBILITIES)
    if "service_ids" in wanted:
        wanted["service_ids"] = normal_ids(wanted["service_ids"])
    changes = {name: value for name, value in wanted.items() if value != getattr(state, name)}
    fixed = changes.keys() - _CHANGEABLE.get(state.status, changes.keys())
    if fixed:
        names = ", ".join(name for name in changes if name in fixed)
        raise IllegalTransition(f"of a window that is {state.status}, {names} can no longer be changed")
    words = {name: value for name, value in changes.items() if name in REDACTABLE_FIELDS}
    facts = {name: value for name, value in changes.items() if name not in {*REDACTABLE_FIELDS, *_TIMES}}
    events: list[MaintenanceEvent] = []
    if words:
        events.append(msgspec.convert(words, MaintenanceEdited))
    if facts:
        events.append(MaintenanceChanged(**facts))
    if changes.keys() & set(_TIMES):
        times = {name: changes.get(name, getattr(state, name)) for name in _TIMES}
        _check_times(*times.values())
        events.append(MaintenanceRescheduled(**times))
    return events


def _check_times(start: datetime, end: datetime) -> None:
    if end <= start:
        raise InvalidField("scheduled_end", "must be after scheduled_start")


def _redact(command: RedactMaintenance) -> list[MaintenanceEvent]:
    erasure, reason = command.erasure, check_reason(command.reason)
    if not erasure.versions:
        return []
    redacted = MaintenanceRedacted(versions=erasure.versions, fields=erasure.fields, reason=reason)
    return [redacted, *([msgspec.convert(erasure.restated, MaintenanceEdited)] if erasure.restated else [])]


def _move(state: Maintenance, wanted: str, event: MaintenanceEvent) -> MaintenanceEvent:
    if wanted not in TRANSITIONS[state.status]:
        (origin,) = (status for status, following in TRANSITIONS.items() if wanted in following)
        article = "an" if origin[0] in "aeiou" else "a"
        raise IllegalTransition(f"only {article} {origin} window can become {wanted}; this one is {state.status}")
    return event


DECIDER: Decider[Maintenance, MaintenanceCommand, MaintenanceEvent] = Decider(kind=KIND, evolve=evolve, decide=decide)

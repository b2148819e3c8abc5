"""Maintenance windows: schedule, change, start, complete and cancel.

A window that starts or ends on time does so by an event: the scheduler sends the same commands as people do.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Literal, TypeAlias, assert_never, get_args

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
    to_utc,
)
from opsentry.domain.redaction import Redact, Redacted, decide_redaction
from opsentry.domain.visibility import VISIBILITIES

KIND = "maintenance"

MaintenanceStatus: TypeAlias = Literal["scheduled", "active", "completed", "cancelled"]

STATUSES: tuple[MaintenanceStatus, ...] = get_args(MaintenanceStatus)
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "scheduled": frozenset({"active", "cancelled"}),
    "active": frozenset({"completed"}),
    "completed": frozenset(),
    "cancelled": frozenset(),
}
REDACTABLE_FIELDS = ("title", "description")
_TIMES = ("scheduled_start", "scheduled_end")
# Fields that can change in these statuses. Once a window has started, its announced effects are final.
_CHANGEABLE = {
    "active": {*REDACTABLE_FIELDS, "scheduled_end", "auto_complete"},
    **{status: {*REDACTABLE_FIELDS} for status in ("completed", "cancelled")},
}


# ---------------------------------------------------------------------------------------------------- events


class MaintenanceScheduled(Event, frozen=True, kw_only=True):
    """A window was announced. `source` names the record that it was imported from."""

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
    """The window has new times, in UTC. An active window keeps its start."""

    TYPE: ClassVar[str] = "maintenance.rescheduled"
    scheduled_start: datetime
    scheduled_end: datetime


class MaintenanceChanged(Event, frozen=True, kw_only=True):
    """Facts about the window changed. Fields that are `UNSET` keep their values."""

    TYPE: ClassVar[str] = "maintenance.changed"
    visibility: str | UnsetType = UNSET
    service_ids: tuple[int, ...] | UnsetType = UNSET
    exclude_from_sla: bool | UnsetType = UNSET
    suppress_alerts: bool | UnsetType = UNSET
    auto_start: bool | UnsetType = UNSET
    auto_complete: bool | UnsetType = UNSET


class MaintenanceReminded(Event, frozen=True, kw_only=True):
    """The window begins soon; subscribers receive a reminder."""

    TYPE: ClassVar[str] = "maintenance.reminded"


class MaintenanceStarted(Event, frozen=True, kw_only=True):
    """The window became active."""

    TYPE: ClassVar[str] = "maintenance.started"


class MaintenanceCompleted(Event, frozen=True, kw_only=True):
    """An active window ended."""

    TYPE: ClassVar[str] = "maintenance.completed"


class MaintenanceCancelled(Event, frozen=True, kw_only=True):
    """A scheduled window was called off."""

    TYPE: ClassVar[str] = "maintenance.cancelled"


class MaintenanceUpdated(Event, frozen=True, kw_only=True):
    """A message was added to the timeline. `status` is the window's status at that time."""

    TYPE: ClassVar[str] = "maintenance.updated"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"message"})
    message: str
    status: str
    is_public: bool = True
    source: str | None = None


class MaintenanceEdited(Event, frozen=True, kw_only=True):
    """Free text of the window changed. Fields that are `UNSET` keep their values."""

    TYPE: ClassVar[str] = "maintenance.edited"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"title", "description"})
    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET


class MaintenanceRedacted(Redacted, frozen=True, kw_only=True):
    """Erasable text of the window was erased."""

    TYPE: ClassVar[str] = "maintenance.redacted"


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
    """Hold a window's present state."""

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
        """The time at which the scheduler starts or completes the window, `None` if it does neither."""
        if self.status == "scheduled" and self.auto_start:
            return self.scheduled_start
        if self.status == "active" and self.auto_complete:
            return self.scheduled_end
        return None


def evolve(state: Maintenance | None, event: MaintenanceEvent) -> Maintenance:
    """Apply one event to the state."""
    if isinstance(event, MaintenanceScheduled):
        fields = msgspec.structs.asdict(event)
        source = fields.pop("source")
        return Maintenance(**fields, status="scheduled", sources=frozenset() if source is None else frozenset({source}))
    if state is None:
        raise ValueError(f"{event.TYPE} before {MaintenanceScheduled.TYPE}")
    change = msgspec.structs.replace
    match event:
        case MaintenanceRescheduled():
            return change(state, **set_fields(event), reminded=False)
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
    """Change the given fields. Fields that are `UNSET` keep their values."""

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
    """Remind subscribers of a scheduled window. A second reminder, or one after the start, changes nothing."""


class StartMaintenance(msgspec.Struct, frozen=True):
    """Start a scheduled window."""


class CompleteMaintenance(msgspec.Struct, frozen=True):
    """Complete an active window."""


class CancelMaintenance(msgspec.Struct, frozen=True):
    """Cancel a scheduled window."""


class RedactMaintenance(Redact, frozen=True, kw_only=True):
    """Erase text of the window, for a reason."""


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
    """Return the events that `command` causes; raise `InvalidField` or `IllegalTransition` if it is refused."""
    if isinstance(command, ScheduleMaintenance):
        if state is not None:
            raise IllegalTransition("the maintenance window exists already")
        fields = _check_fields(command)
        _check_order(fields["scheduled_start"], fields["scheduled_end"])
        return [MaintenanceScheduled(**fields)]
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
            return decide_redaction(command, MaintenanceRedacted, MaintenanceEdited)
        case _:
            assert_never(command)


def _change(state: Maintenance, command: ChangeMaintenance) -> list[MaintenanceEvent]:
    changes = {name: value for name, value in _check_fields(command).items() if value != getattr(state, name)}
    fixed = changes.keys() - _CHANGEABLE.get(state.status, changes.keys())
    if fixed:
        names = ", ".join(name for name in changes if name in fixed)
        raise IllegalTransition(f"of a window that is {state.status}, {names} can no longer be changed")
    texts = {name: value for name, value in changes.items() if name in REDACTABLE_FIELDS}
    facts = {name: value for name, value in changes.items() if name not in {*REDACTABLE_FIELDS, *_TIMES}}
    events: list[MaintenanceEvent] = [msgspec.convert(texts, MaintenanceEdited)] if texts else []
    events += [MaintenanceChanged(**facts)] if facts else []
    if changes.keys() & set(_TIMES):
        times = {name: changes.get(name, getattr(state, name)) for name in _TIMES}
        _check_order(times["scheduled_start"], times["scheduled_end"])
        events.append(MaintenanceRescheduled(**times))
    return events


def _check_fields(command: ScheduleMaintenance | ChangeMaintenance) -> dict[str, Any]:
    """Return the given fields by name, valid and normalised."""
    fields = set_fields(command)
    if "title" in fields:
        check_title("title", fields["title"])
    check_text("description", fields.get("description"))
    for name in [name for name in _TIMES if name in fields]:
        fields[name] = to_utc(name, fields[name])
    if "visibility" in fields:
        check_choice("visibility", fields["visibility"], VISIBILITIES)
    if "service_ids" in fields:
        fields["service_ids"] = normal_ids(fields["service_ids"])
    return fields


def _check_order(start: datetime, end: datetime) -> None:
    if end <= start:
        raise InvalidField("scheduled_end", "must be after scheduled_start")


def _move(state: Maintenance, wanted: str, event: MaintenanceEvent) -> MaintenanceEvent:
    if wanted not in TRANSITIONS[state.status]:
        (origin,) = (status for status, following in TRANSITIONS.items() if wanted in following)
        article = "an" if origin[0] in "aeiou" else "a"
        raise IllegalTransition(f"only {article} {origin} window can become {wanted}; this one is {state.status}")
    return event


DECIDER: Decider[Maintenance, MaintenanceCommand, MaintenanceEvent] = Decider(kind=KIND, evolve=evolve, decide=decide)

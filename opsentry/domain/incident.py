"""Incidents: declare, update, resolve and reopen.

The open statuses `investigating`, `identified` and `monitoring` lead to each other and to `resolved`. A resolved
incident can only be reopened, as `investigating`.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias, assert_never, get_args

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
from opsentry.domain.redaction import Redact, Redacted, decide_redaction
from opsentry.domain.visibility import VISIBILITIES

KIND = "incident"

IncidentStatus: TypeAlias = Literal["investigating", "identified", "monitoring", "resolved"]
Severity: TypeAlias = Literal["informational", "degraded", "partial_outage", "major_outage", "critical"]

STATUSES: tuple[IncidentStatus, ...] = get_args(IncidentStatus)
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # from the mildest to the worst
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "investigating": frozenset({"identified", "monitoring", "resolved"}),
    "identified": frozenset({"investigating", "monitoring", "resolved"}),
    "monitoring": frozenset({"investigating", "identified", "resolved"}),
    "resolved": frozenset({"investigating"}),
}
REDACTABLE_FIELDS = ("title", "description", "root_cause", "postmortem")


# ---------------------------------------------------------------------------------------------------- events


class IncidentOpened(Event, frozen=True, kw_only=True):
    """An incident was declared, as `investigating`. `source` names the record that it was imported from."""

    TYPE: ClassVar[str] = "incident.opened"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"title", "description"})
    title: str
    description: str | None = None
    severity: str
    visibility: str
    service_ids: tuple[int, ...] = ()
    source: str | None = None


class IncidentUpdated(Event, frozen=True, kw_only=True):
    """A message was added to the timeline. `status` is the incident's status at that time."""

    TYPE: ClassVar[str] = "incident.updated"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"message"})
    message: str
    status: str
    is_public: bool = True
    source: str | None = None


class IncidentStatusChanged(Event, frozen=True, kw_only=True):
    """The incident moved to another open status."""

    TYPE: ClassVar[str] = "incident.status_changed"
    status: str


class IncidentResolved(Event, frozen=True, kw_only=True):
    """The incident was resolved. Fields that are `UNSET` keep their values."""

    TYPE: ClassVar[str] = "incident.resolved"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"root_cause", "postmortem"})
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class IncidentReopened(Event, frozen=True, kw_only=True):
    """A resolved incident was reopened, as `investigating`."""

    TYPE: ClassVar[str] = "incident.reopened"


class IncidentSeverityChanged(Event, frozen=True, kw_only=True):
    """The severity changed from `previous` to `severity`."""

    TYPE: ClassVar[str] = "incident.severity_changed"
    severity: str
    previous: str


class IncidentVisibilityChanged(Event, frozen=True, kw_only=True):
    """The visibility changed, for the incident's whole history."""

    TYPE: ClassVar[str] = "incident.visibility_changed"
    visibility: str


class IncidentServicesChanged(Event, frozen=True, kw_only=True):
    """The affected services are now exactly these."""

    TYPE: ClassVar[str] = "incident.services_changed"
    service_ids: tuple[int, ...]


class IncidentEdited(Event, frozen=True, kw_only=True):
    """Free text of the incident changed. Fields that are `UNSET` keep their values."""

    TYPE: ClassVar[str] = "incident.edited"
    ERASABLE: ClassVar[frozenset[str]] = frozenset(REDACTABLE_FIELDS)
    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class IncidentRedacted(Redacted, frozen=True, kw_only=True):
    """Erasable text of the incident was erased."""

    TYPE: ClassVar[str] = "incident.redacted"


IncidentEvent: TypeAlias = (
    IncidentOpened
    | IncidentUpdated
    | IncidentStatusChanged
    | IncidentResolved
    | IncidentReopened
    | IncidentSeverityChanged
    | IncidentVisibilityChanged
    | IncidentServicesChanged
    | IncidentEdited
    | IncidentRedacted
)


# ---------------------------------------------------------------------------------------------------- state


class Incident(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Hold an incident's present state."""

    title: str
    description: str | None
    status: str
    severity: str
    visibility: str
    service_ids: tuple[int, ...]
    root_cause: str | None = None
    postmortem: str | None = None
    sources: frozenset[str] = frozenset()


def evolve(state: Incident | None, event: IncidentEvent) -> Incident:
    """Apply one event to the state."""
    if isinstance(event, IncidentOpened):
        return Incident(
            title=event.title,
            description=event.description,
            status="investigating",
            severity=event.severity,
            visibility=event.visibility,
            service_ids=event.service_ids,
            sources=frozenset() if event.source is None else frozenset({event.source}),
        )
    if state is None:
        raise ValueError(f"{event.TYPE} before {IncidentOpened.TYPE}")
    change = msgspec.structs.replace
    match event:
        case IncidentUpdated():
            return state if event.source is None else change(state, sources=state.sources | {event.source})
        case IncidentStatusChanged():
            return change(state, status=event.status)
        case IncidentResolved():
            return change(state, status="resolved", **set_fields(event))
        case IncidentReopened():
            return change(state, status="investigating")
        case IncidentSeverityChanged():
            return change(state, severity=event.severity)
        case IncidentVisibilityChanged():
            return change(state, visibility=event.visibility)
        case IncidentServicesChanged():
            return change(state, service_ids=event.service_ids)
        case IncidentEdited():
            return change(state, **set_fields(event))
        case IncidentRedacted():
            return change(state, **dict.fromkeys(event.fields, REDACTED))
        case _:
            assert_never(event)


# ---------------------------------------------------------------------------------------------------- commands


class OpenIncident(msgspec.Struct, frozen=True, kw_only=True):
    """Declare an incident."""

    title: str
    description: str | None = None
    severity: str = "degraded"
    visibility: str = "public"
    service_ids: tuple[int, ...] = ()


class ChangeIncident(msgspec.Struct, frozen=True, kw_only=True):
    """Change the given fields. Fields that are `UNSET` keep their values."""

    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    severity: str | UnsetType = UNSET
    visibility: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    service_ids: tuple[int, ...] | UnsetType = UNSET
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class PostUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """Add a message to the timeline, and change the status if one is given."""

    message: str
    status: str | None = None
    is_public: bool = True


class ResolveIncident(msgspec.Struct, frozen=True, kw_only=True):
    """Resolve an open incident."""

    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class RedactIncident(Redact, frozen=True, kw_only=True):
    """Erase text of the incident, for a reason."""


IncidentCommand: TypeAlias = OpenIncident | ChangeIncident | PostUpdate | ResolveIncident | RedactIncident


def decide(state: Incident | None, command: IncidentCommand) -> Sequence[IncidentEvent]:
    """Return the events that `command` causes; raise `InvalidField` or `IllegalTransition` if it is refused."""
    if isinstance(command, OpenIncident):
        if state is not None:
            raise IllegalTransition("the incident exists already")
        return _open(command)
    if state is None:
        raise IllegalTransition("the incident does not exist")
    match command:
        case ChangeIncident():
            return _change(state, command)
        case PostUpdate():
            return _post_update(state, command)
        case ResolveIncident():
            if "resolved" not in TRANSITIONS[state.status]:
                raise IllegalTransition("the incident is resolved already")
            return [
                IncidentResolved(
                    root_cause=_optional_text("root_cause", command.root_cause),
                    postmortem=_optional_text("postmortem", command.postmortem),
                )
            ]
        case RedactIncident():
            return decide_redaction(command, IncidentRedacted, IncidentEdited)
        case _:
            assert_never(command)


def _open(command: OpenIncident) -> list[IncidentEvent]:
    opened = IncidentOpened(
        title=check_title("title", command.title),
        description=check_text("description", command.description),
        severity=check_choice("severity", command.severity, SEVERITIES),
        visibility=check_choice("visibility", command.visibility, VISIBILITIES),
        service_ids=normal_ids(command.service_ids),
    )
    if opened.description is None or not opened.description.strip():
        return [opened]
    return [opened, IncidentUpdated(message=opened.description, status="investigating")]


def _change(state: Incident, command: ChangeIncident) -> list[IncidentEvent]:
    events: list[IncidentEvent] = []
    texts: dict[str, str | None] = {}
    if command.title is not UNSET and check_title("title", command.title) != state.title:
        texts["title"] = command.title
    for name in ("description", "root_cause", "postmortem"):
        value = _optional_text(name, getattr(command, name))
        if value is not UNSET and value != getattr(state, name):
            texts[name] = value
    if texts:
        events.append(msgspec.convert(texts, IncidentEdited))
    if command.visibility is not UNSET:
        check_choice("visibility", command.visibility, VISIBILITIES)
        if command.visibility != state.visibility:
            events.append(IncidentVisibilityChanged(visibility=command.visibility))
    if command.service_ids is not UNSET:
        service_ids = normal_ids(command.service_ids)
        if service_ids != state.service_ids:
            events.append(IncidentServicesChanged(service_ids=service_ids))
    if command.severity is not UNSET:
        check_choice("severity", command.severity, SEVERITIES)
        if command.severity != state.severity:
            events.append(IncidentSeverityChanged(severity=command.severity, previous=state.severity))
    if command.status is not UNSET:
        events.extend(_move(state.status, command.status))
    return events


def _post_update(state: Incident, command: PostUpdate) -> list[IncidentEvent]:
    message = check_text("message", command.message) or ""
    if not message.strip():
        raise InvalidField("message", "must not be blank")
    status = state.status if command.status is None else command.status
    return [
        *_move(state.status, status),
        IncidentUpdated(message=message, status=status, is_public=command.is_public),
    ]


def _move(current: str, wanted: str) -> list[IncidentEvent]:
    check_choice("status", wanted, STATUSES)
    if wanted == current:
        return []
    if wanted not in TRANSITIONS[current]:
        raise IllegalTransition(f"a resolved incident can only be reopened as investigating, not moved to {wanted}")
    if wanted == "resolved":
        return [IncidentResolved()]
    return [IncidentReopened() if current == "resolved" else IncidentStatusChanged(status=wanted)]


def _optional_text(field: str, value: str | None | UnsetType) -> str | None | UnsetType:
    return UNSET if value is UNSET else check_text(field, value)


DECIDER: Decider[Incident, IncidentCommand, IncidentEvent] = Decider(kind=KIND, evolve=evolve, decide=decide)

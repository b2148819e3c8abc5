"""Incidents: `investigating`, `identified` and `monitoring` move freely among each other and to `resolved`.

From `resolved` the only way out is `investigating`, a re-open.
"""

from collections.abc import Mapping, Sequence
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
)
from opsentry.domain.redaction import RedactionPlan, check_reason

KIND = "incident"
# Open states lead to each other and to `resolved`. A resolved incident can only be reopened.
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "investigating": frozenset({"identified", "monitoring", "resolved"}),
    "identified": frozenset({"investigating", "monitoring", "resolved"}),
    "monitoring": frozenset({"investigating", "identified", "resolved"}),
    "resolved": frozenset({"investigating"}),
}
STATUSES = tuple(TRANSITIONS)
SEVERITIES = ("informational", "degraded", "partial_outage", "major_outage", "critical")
VISIBILITIES = ("public", "internal")
REDACTABLE_FIELDS = ("title", "description", "root_cause", "postmortem")


# ---------------------------------------------------------------------------------------------------- events


class IncidentOpened(Event, frozen=True, kw_only=True):
    """An incident was declared; it begins as `investigating`. `source` names the record it was imported from."""

    TYPE: ClassVar[str] = "incident.opened"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"title", "description"})
    title: str
    description: str | None = None
    severity: str
    visibility: str
    service_ids: tuple[int, ...] = ()
    source: str | None = None


class IncidentUpdated(Event, frozen=True, kw_only=True):
    """A message was added to the timeline, while the incident had `status`."""

    TYPE: ClassVar[str] = "incident.updated"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"message"})
    message: str
    status: str
    is_public: bool = True
    source: str | None = None


class IncidentStatusChanged(Event, frozen=True, kw_only=True):
    """The incident moved among the open states."""

    TYPE: ClassVar[str] = "incident.status_changed"
    status: str


class IncidentResolved(Event, frozen=True, kw_only=True):
    """The incident is over. Words that are `UNSET` stay as they were."""

    TYPE: ClassVar[str] = "incident.resolved"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"root_cause", "postmortem"})
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class IncidentReopened(Event, frozen=True, kw_only=True):
    """The incident was not over after all; it is `investigating` again."""

    TYPE: ClassVar[str] = "incident.reopened"


class IncidentSeverityChanged(Event, frozen=True, kw_only=True):
    """How bad it is changed."""

    TYPE: ClassVar[str] = "incident.severity_changed"
    severity: str
    previous: str


class IncidentVisibilityChanged(Event, frozen=True, kw_only=True):
    """Who may see it changed, for all of its history."""

    TYPE: ClassVar[str] = "incident.visibility_changed"
    visibility: str


class IncidentServicesChanged(Event, frozen=True, kw_only=True):
    """The affected services are now exactly these."""

    TYPE: ClassVar[str] = "incident.services_changed"
    service_ids: tuple[int, ...]


class IncidentEdited(Event, frozen=True, kw_only=True):
    """Words about it changed. Those that are `UNSET` stay as they were."""

    TYPE: ClassVar[str] = "incident.edited"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"title", "description", "root_cause", "postmortem"})
    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class IncidentRedacted(Event, frozen=True, kw_only=True):
    """The words of the events with these versions were erased; of the incident itself, `fields` now read `[redacted]`.

    `reason` is what people wrote too, and can be erased like everything else.
    """

    TYPE: ClassVar[str] = "incident.redacted"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"reason"})
    versions: tuple[int, ...]
    fields: tuple[str, ...] = ()
    reason: str


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
    """An incident as its events leave it."""

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
    """Fold one event into the state."""
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
            return change(state, status="resolved", **_set_erasable(event))
        case IncidentReopened():
            return change(state, status="investigating")
        case IncidentSeverityChanged():
            return change(state, severity=event.severity)
        case IncidentVisibilityChanged():
            return change(state, visibility=event.visibility)
        case IncidentServicesChanged():
            return change(state, service_ids=event.service_ids)
        case IncidentEdited():
            return change(state, **_set_erasable(event))
        case IncidentRedacted():
            return change(state, **dict.fromkeys(event.fields, REDACTED))
        case _:
            assert_never(event)


def _set_erasable(event: IncidentResolved | IncidentEdited) -> dict[str, str | None]:
    values = {name: getattr(event, name) for name in event.ERASABLE}
    return {name: value for name, value in values.items() if value is not UNSET}


# ---------------------------------------------------------------------------------------------------- commands


class OpenIncident(msgspec.Struct, frozen=True, kw_only=True):
    """Declare an incident."""

    title: str
    description: str | None = None
    severity: str = "degraded"
    visibility: str = "public"
    service_ids: tuple[int, ...] = ()


class ChangeIncident(msgspec.Struct, frozen=True, kw_only=True):
    """Change what is set, leave what is `UNSET`."""

    title: str | UnsetType = UNSET
    description: str | None | UnsetType = UNSET
    severity: str | UnsetType = UNSET
    visibility: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    service_ids: tuple[int, ...] | UnsetType = UNSET
    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class PostUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """Add a message to the timeline, and move to `status` if one is given."""

    message: str
    status: str | None = None
    is_public: bool = True


class ResolveIncident(msgspec.Struct, frozen=True, kw_only=True):
    """Declare it over."""

    root_cause: str | None | UnsetType = UNSET
    postmortem: str | None | UnsetType = UNSET


class RedactIncident(msgspec.Struct, frozen=True, kw_only=True):
    """Erase words, for the reason given."""

    erasure: RedactionPlan
    reason: str


IncidentCommand: TypeAlias = OpenIncident | ChangeIncident | PostUpdate | ResolveIncident | RedactIncident


def decide(state: Incident | None, command: IncidentCommand) -> Sequence[IncidentEvent]:
    """Answer `command` with events, or raise `InvalidField` or `IllegalTransition`."""
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
            return _redact(command)
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
    words: dict[str, str | None] = {}
    if command.title is not UNSET and check_title("title", command.title) != state.title:
        words["title"] = command.title
    for name in ("description", "root_cause", "postmortem"):
        value = _optional_text(name, getattr(command, name))
        if value is not UNSET and value != getattr(state, name):
            words[name] = value
    if words:
        events.append(msgspec.convert(words, IncidentEdited))
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


def _redact(command: RedactIncident) -> list[IncidentEvent]:
    erasure, reason = command.erasure, check_reason(command.reason)
    if not erasure.versions:
        return []
    redacted = IncidentRedacted(versions=erasure.versions, fields=erasure.fields, reason=reason)
    return [redacted, *([msgspec.convert(erasure.restated, IncidentEdited)] if erasure.restated else [])]


def _move(current: str, wanted: str) -> list[IncidentEvent]:
    check_choice("status", wanted, STATUSES)
    if wanted == current:
        return []
    if wanted not in TRANSITIONS[current]:
        raise IllegalTransition(f"a resolved incident can only be re-opened as investigating, not moved to {wanted}")
    if wanted == "resolved":
        return [IncidentResolved()]
    return [IncidentReopened() if current == "resolved" else IncidentStatusChanged(status=wanted)]


def _optional_text(field: str, value: str | None | UnsetType) -> str | None | UnsetType:
    return UNSET if value is UNSET else check_text(field, value)


DECIDER: Decider[Incident, IncidentCommand, IncidentEvent] = Decider(kind=KIND, evolve=evolve, decide=decide)

"""The shapes of Statuspage's v2 JSON (`incidents`, `scheduled_maintenances`, `components`), read and checked whole."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from opsentry.domain.decider import InvalidField, check_text, check_title

Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class Malformed(Exception):
    """The file cannot be read; the message names the place. Nothing was written."""


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

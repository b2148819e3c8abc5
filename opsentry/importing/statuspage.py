"""Read an export in the JSON of Statuspage's API (v2), and check it before anything is imported.

Source of the format: https://developer.statuspage.io and the public endpoints `/api/v2/*.json` of each page.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from opsentry.domain.decider import InvalidField, check_text, check_title

Timestamp = Annotated[datetime, msgspec.Meta(tz=True)]


class MalformedExport(Exception):
    """The file is no valid export. The message names the first wrong place. Nothing was imported."""


class StatuspagePage(msgspec.Struct):
    """The page of the export. Its id keeps the records of several pages apart."""

    id: str
    name: str = ""


class Component(msgspec.Struct):
    """A component, imported as a service; a group is skipped."""

    id: str
    name: str
    description: str | None = None
    group: bool = False
    created_at: Timestamp | None = None


class ComponentLink(msgspec.Struct):
    """A component that an incident or a window affects."""

    id: str
    name: str


class IncidentUpdate(msgspec.Struct):
    """An update of an incident. `display_at`, if set, is the time that readers saw."""

    id: str
    status: Literal["investigating", "identified", "monitoring", "resolved", "postmortem"]
    created_at: Timestamp
    body: str | None = None
    display_at: Timestamp | None = None


class IncidentRecord(msgspec.Struct):
    """An incident. Its `incident_updates` are newest first."""

    id: str
    name: str
    status: Literal["investigating", "identified", "monitoring", "resolved", "postmortem"]
    impact: Literal["none", "minor", "major", "critical", "maintenance"]
    created_at: Timestamp
    incident_updates: list[IncidentUpdate]
    components: list[ComponentLink] = []
    started_at: Timestamp | None = None
    resolved_at: Timestamp | None = None


class MaintenanceUpdate(msgspec.Struct):
    """An update of a maintenance window. `display_at`, if set, is the time that readers saw."""

    id: str
    status: Literal["scheduled", "in_progress", "verifying", "completed"]
    created_at: Timestamp
    body: str | None = None
    display_at: Timestamp | None = None


class MaintenanceRecord(msgspec.Struct):
    """A maintenance window. Its `incident_updates` are newest first."""

    id: str
    name: str
    status: Literal["scheduled", "in_progress", "verifying", "completed"]
    created_at: Timestamp
    scheduled_for: Timestamp
    scheduled_until: Timestamp
    incident_updates: list[MaintenanceUpdate]
    components: list[ComponentLink] = []


class StatuspageExport(msgspec.Struct):
    """The content of a file."""

    page: StatuspagePage
    components: list[Component]
    incidents: list[IncidentRecord]
    scheduled_maintenances: list[MaintenanceRecord] = []


def read_export(path: Path) -> StatuspageExport:
    """Return the checked content of a file.

    Raises:
        MalformedExport: The file is invalid.
    """
    try:
        export = msgspec.json.decode(path.read_bytes(), type=StatuspageExport)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        raise MalformedExport(f"{place.rstrip('`').lstrip('.') or 'the file'}: {problem}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedExport(f"not well-formed JSON: {error}") from None
    _check(export)
    return export


def _check(export: StatuspageExport) -> None:
    """Refuse duplicate ids, impossible times and unusable texts, which types do not exclude."""
    try:
        check_title("page.id", export.page.id)
    except InvalidField as error:
        raise MalformedExport(str(error)) from None
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
                raise MalformedExport(f"{place}.id: {record.id} is a duplicate")
            seen.add(record.id)
            _check_texts(place, record)
            _check_updates(place, record)
            if isinstance(record, MaintenanceRecord) and record.scheduled_until <= record.scheduled_for:
                raise MalformedExport(f"{place}.scheduled_until: must be after scheduled_for")


def _check_updates(place: str, record: Component | IncidentRecord | MaintenanceRecord) -> None:
    _check_times(place, record)
    if isinstance(record, Component):
        return
    updates: Sequence[IncidentUpdate | MaintenanceUpdate] = record.incident_updates
    seen: set[str] = set()
    for index, update in enumerate(updates):
        if update.id in seen:
            raise MalformedExport(f"{place}.incident_updates[{index}].id: {update.id} is a duplicate")
        seen.add(update.id)
        _check_times(f"{place}.incident_updates[{index}]", update)


def _check_times(place: str, record: msgspec.Struct) -> None:
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, datetime):
            try:
                value.astimezone(UTC)
            except OverflowError:
                raise MalformedExport(f"{place}.{name}: is out of range") from None


def _check_texts(place: str, record: Component | IncidentRecord | MaintenanceRecord) -> None:
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
        raise MalformedExport(f"{place}.{error}") from None

"""Make small pages to import, and read the imported events."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from opsentry.application.caller import Caller
from opsentry.application.imports import ImportResult, import_statuspage
from opsentry.bootstrap import Core
from opsentry.domain.decider import Event
from opsentry.events.codec import Actor, ActorKind, Meta, RecordedEvent
from opsentry.importing.statuspage import read_export
from opsentry.importing.translation import DatedEvent

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
_ids = count(1)


def at(minutes: float) -> str:
    return (NOON + timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z")


def update(id_: str, status: str, minutes: float, body: str | None = "words") -> dict[str, Any]:
    return {"id": id_, "status": status, "created_at": at(minutes), "body": body}


def incident(id_: str, *updates: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return an incident with `updates` given oldest first; a file has them newest first."""
    status = updates[-1]["status"] if updates else "investigating"
    return {
        "id": id_,
        "name": f"Incident {id_}",
        "status": status,
        "impact": "minor",
        "created_at": at(0),
        "components": [],
        "incident_updates": list(reversed(updates)),
    } | fields


def window(id_: str, *updates: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a window from minute 60 to 120 with `updates` given oldest first."""
    status = updates[-1]["status"] if updates else "scheduled"
    return {
        "id": id_,
        "name": f"Window {id_}",
        "status": status,
        "created_at": at(0),
        "scheduled_for": at(60),
        "scheduled_until": at(120),
        "components": [],
        "incident_updates": list(reversed(updates)),
    } | fields


def component(id_: str, name: str, **fields: Any) -> dict[str, Any]:
    return {"id": id_, "name": name} | fields


def link(id_: str) -> dict[str, Any]:
    return {"id": id_, "name": id_}


def page(**sections: Any) -> dict[str, Any]:
    return {"page": {"id": "p1"}, "components": [], "incidents": [], "scheduled_maintenances": []} | sections


def small_page() -> dict[str, Any]:
    """Return three components, two incidents and one window: 3 + 6 + 6 + 6 events, 3 + 3 + 3 updates."""
    return page(
        components=[component("c1", "Main API"), component("c2", "Web"), component("c3", "Jobs", description="Batch")],
        incidents=[
            incident(
                "i1",
                update("u1", "investigating", 1, "We are looking."),
                update("u2", "monitoring", 5, "A fix is out."),
                update("u3", "resolved", 9, "It is over."),
                impact="major",
                components=[link("c1"), link("c2")],
                resolved_at=at(9),
            ),
            incident(
                "i2",
                update("v1", "identified", 20, "A disk is full."),
                update("v2", "identified", 21, "It is being emptied."),
                update("v3", "resolved", 30, "It is empty."),
                impact="critical",
                created_at=at(20),
                components=[link("c3")],
            ),
        ],
        scheduled_maintenances=[
            window(
                "m1",
                update("w1", "scheduled", 2, "Tonight."),
                update("w2", "in_progress", 61, "Begun."),
                update("w3", "completed", 115, "Done."),
                components=[link("c1")],
            )
        ],
    )


def write(folder: Path, content: Any) -> Path:
    path = folder / f"page{next(_ids)}.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content))
    return path


async def load(parts: Core, tenant_id: int, path: Path) -> ImportResult:
    caller = Caller(tenant_id=tenant_id, actor=Actor("importer"))
    return await import_statuspage(parts.application, caller, read_export(path), lambda: None)


async def ledger(connection: Any, tenant_id: int, kind: str | None = None) -> list[Any]:
    """Return the rows of a tenant's ledger, of one kind of stream if given."""
    rows = await connection.fetch("SELECT * FROM events WHERE tenant_id = $1 ORDER BY position", tenant_id)
    return [row for row in rows if kind is None or row["stream_kind"] == kind]


def recorded(events: Sequence[DatedEvent], kind: str, by: ActorKind = "importer") -> list[RecordedEvent]:
    """Return the events as if read from the ledger."""
    return [
        RecordedEvent(1, number, kind, 1, number, event, moment, NOON, Meta(Actor(by), silent=True))
        for number, (event, moment) in enumerate(events, 1)
    ]


def timeline(events: Sequence[DatedEvent]) -> list[tuple[str, float]]:
    """Return each event as (type and text, minutes after noon)."""
    return [(_name(event), (moment - NOON) / timedelta(minutes=1)) for event, moment in events]


def _name(event: Event) -> str:
    detail = getattr(event, "message", None) or getattr(event, "status", None)
    return event.TYPE if detail is None else f"{event.TYPE} {detail}"

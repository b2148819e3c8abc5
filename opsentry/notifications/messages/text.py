"""How messages are put into words for people, whichever way they go."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from opsentry.notifications.channel import Message

CONFIRM = "subscription.confirm"
HEADINGS = {
    "incident.opened": "New incident",
    "incident.updated": "Update",
    "incident.severity_changed": "Severity changed",
    "incident.resolved": "Resolved",
    "incident.reopened": "Reopened",
    "incident.still_open": "Still open",
    "maintenance.scheduled": "Maintenance scheduled",
    "maintenance.rescheduled": "Maintenance moved to another time",
    "maintenance.reminder": "Maintenance begins soon",
    "maintenance.updated": "Maintenance update",
    "maintenance.started": "Maintenance has begun",
    "maintenance.completed": "Maintenance is over",
    "maintenance.cancelled": "Maintenance cancelled",
    "subscription.test": "This is a test: messages reach you",
    CONFIRM: "Do you want to be told?",
}
_FACTS = (
    ("status", "Status"),
    ("severity", "Severity"),
    ("scheduled_start", "Begins"),
    ("scheduled_end", "Ends"),
    ("resolved_at", "Resolved"),
)
_MAX_UPDATES = 10
_MAX_SERVICES = 50

# What turns the direction of all that follows, in a line that is not only the appender's.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Paragraph(NamedTuple):
    """What people wrote; `label` says what or when it was, `by` who wrote it."""

    text: str
    label: str | None = None
    by: str | None = None


def tenant_name(message: Message) -> str:
    """Return what the tenant is called, in one line."""
    return line(message.tenant["name"]) or message.tenant["slug"]


def facts(subject: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Return (name, value) of what is to be known of an incident or a window at a glance."""
    for field, name in _FACTS:
        value = subject.get(field)
        if value is not None:
            yield name, _moment(value) if field.endswith(("_at", "_start", "_end")) else plain(value)
    if services := [line(service["name"]) for service in subject["services"][:_MAX_SERVICES]]:
        yield "Affects", ", ".join(services)


def paragraphs(message: Message) -> Sequence[Paragraph]:
    """Return the timeline's entries that the message tells, oldest first, and what describes the thing itself."""
    subject = message.subject
    told = {change.position for change in message.changes}
    news = [update for update in subject["updates"] if update["id"] in told][-_MAX_UPDATES:]
    found = [Paragraph(update["message"], _moment(update["created_at"]), update.get("author")) for update in news]
    said = {update["message"] for update in news}  # an incident's description is its first entry too
    for field, label in (("description", None), ("root_cause", "Root cause"), ("postmortem", "Postmortem")):
        if subject.get(field) and subject[field] not in said:
            found.append(Paragraph(subject[field], label))
    return [paragraph for paragraph in found if paragraph.text.strip()]


def plain(value: str) -> str:
    """Return a status or severity as words."""
    return value.replace("_", " ")


def line(text: str) -> str:
    """Return text as one line, without what could begin another one, be invisible, or turn its direction."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if unicodedata.category(c) != "Cc" and c not in _TURNING)


def shorter(text: str, most: int) -> str:
    """Return text of at most `most` characters, which ends with … where something is missing."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _moment(value: str) -> str:
    return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M} UTC"

"""Turn messages into the words that people read, in every channel.

The tables of labels are the only place where a status or a severity gets a name for people.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from opsentry.domain import incident
from opsentry.notifications.channel import Message

CONFIRM = "subscription.confirm"
TEST = "subscription.test"

STATUS_LABELS: Mapping[str, str] = {
    "investigating": "Investigating",
    "identified": "Identified",
    "monitoring": "Monitoring",
    "resolved": "Resolved",
    "scheduled": "Scheduled",
    "active": "In progress",
    "completed": "Completed",
    "cancelled": "Cancelled",
}
SEVERITY_LABELS: Mapping[str, str] = {
    "informational": "Informational",
    "degraded": "Degraded performance",
    "partial_outage": "Partial outage",
    "major_outage": "Major outage",
    "critical": "Critical",
}
# `incident.opened` is missing on purpose: its label is the incident's status, as on Statuspage.
_LABELS: Mapping[str, str] = {
    "incident.updated": "Update",
    "incident.severity_changed": "Severity changed",
    "incident.resolved": "Resolved",
    "incident.reopened": "Reopened",
    "incident.still_open": "Still open",
    "maintenance.scheduled": "Maintenance scheduled",
    "maintenance.rescheduled": "Maintenance rescheduled",
    "maintenance.reminder": "Maintenance starts soon",
    "maintenance.updated": "Maintenance update",
    "maintenance.started": "Maintenance started",
    "maintenance.completed": "Maintenance completed",
    "maintenance.cancelled": "Maintenance cancelled",
    TEST: "Test message",
    CONFIRM: "Confirm your subscription to status updates",
}
MESSAGE_TYPES = frozenset({"incident.opened", *_LABELS})
# The labels of all other types already imply the status, which must not be repeated below them.
_TYPES_WITH_STATUS = frozenset(
    {"incident.updated", "incident.severity_changed", "incident.reopened", "incident.still_open", "maintenance.updated"}
)
_STATUS_CHANGED = "incident.status_changed"

_FACTS = (
    ("severity", "Severity"),
    ("occurred_at", "Started"),
    ("resolved_at", "Resolved"),
    ("scheduled_start", "Scheduled start"),
    ("scheduled_end", "Scheduled end"),
)
_DESCRIPTION_LABELS = {"incident": "About this incident", "maintenance": "About this maintenance"}
_MAX_UPDATES = 10
_MAX_SERVICES = 50

# These characters change the direction of all text that follows them, even outside the line.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Tone: TypeAlias = Literal["bad", "warning", "good", "neutral"]


class Paragraph(NamedTuple):
    """A text that people wrote, with an optional label above it."""

    text: str
    label: str | None = None


def tenant_name(message: Message) -> str:
    """Return the tenant's name as one line, or its slug if the name is blank."""
    return line(message.tenant["name"]) or message.tenant["slug"]


def status_updates(tenant: str) -> str:
    """Return the name of a tenant's updates: `Acme status updates`, and no second "status" after `Acme Status`."""
    return f"{tenant} updates" if tenant.casefold().endswith("status") else f"{tenant} status updates"


def label(message: Message) -> str:
    """Return the message's news in a few words: the new status of an incident, or the kind of change."""
    types = {change.type for change in message.changes}
    shows_status = message.type == "incident.opened" or (
        message.type == "incident.updated" and _STATUS_CHANGED in types
    )
    return STATUS_LABELS[message.subject["status"]] if shows_status else _LABELS[message.type]


def title(message: Message) -> str:
    """Return the title of the incident or maintenance window as one line, which may be empty."""
    return line(message.subject.get("title", ""))


def headline(message: Message) -> str:
    """Return label and title in one line, such as `Investigating: API requests fail`."""
    return ": ".join(filter(None, (label(message), title(message))))


def tone(message: Message) -> Tone:
    """Return the mood of the news, which decides its colour."""
    if message.subject_kind != incident.KIND:
        return "neutral"
    if message.subject["status"] == "resolved":
        return "good"
    return "bad" if message.subject["severity"] in {"major_outage", "critical"} else "warning"


def facts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield the names and values that summarise an incident or a maintenance window."""
    subject = message.subject
    if message.type in _TYPES_WITH_STATUS and label(message) != STATUS_LABELS[subject["status"]]:
        yield "Status", STATUS_LABELS[subject["status"]]
    for field, name in _FACTS:
        value = subject.get(field)
        if value is not None:
            yield name, SEVERITY_LABELS[value] if field == "severity" else utc(value)
    if services := [line(service["name"]) for service in subject["services"][:_MAX_SERVICES]]:
        yield "Affected services", ", ".join(services)


def paragraphs(message: Message) -> Sequence[Paragraph]:
    """Return the timeline entries that the message reports, oldest first, then the description and the analysis."""
    subject = message.subject
    if message.type == TEST:
        updates = status_updates(tenant_name(message))
        return [Paragraph(f"This is a test message. Your subscription to {updates} works. No service is affected.")]
    positions = {change.position for change in message.changes}
    entries = [update for update in subject["updates"] if update["id"] in positions][-_MAX_UPDATES:]
    found = [Paragraph(entry["message"], _entry_label(entry)) for entry in entries]
    # The description of a new incident is its first timeline entry too: show it once.
    shown = {entry["message"] for entry in entries}
    for field, name in (
        ("description", _DESCRIPTION_LABELS[message.subject_kind]),
        ("root_cause", "Root cause"),
        ("postmortem", "Postmortem"),
    ):
        if subject.get(field) and subject[field] not in shown:
            found.append(Paragraph(subject[field], name))
    return [paragraph for paragraph in found if paragraph.text.strip()]


def severity_choices() -> Sequence[tuple[str, str]]:
    """Return each minimum severity with the incidents that it selects, the widest choice first."""
    lowest, *between, highest = incident.SEVERITIES
    return [
        (lowest, "All incidents"),
        *((severity, f"{SEVERITY_LABELS[severity]} or worse") for severity in between),
        (highest, f"{SEVERITY_LABELS[highest]} only"),
    ]


def line(text: str) -> str:
    """Return text as one line, without control characters and without changes of direction."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if unicodedata.category(c) != "Cc" and c not in _BIDI_CONTROLS)


def shorten(text: str, max_characters: int) -> str:
    """Return text of at most `max_characters`; a cut text ends with `…`."""
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


def utc(timestamp: str) -> str:
    """Return an ISO 8601 timestamp of the API to the minute, such as `2026-03-01 12:30 UTC`."""
    return f"{datetime.fromisoformat(timestamp).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _entry_label(entry: Mapping[str, Any]) -> str:
    author = line(entry.get("author") or "")
    return f"{utc(entry['created_at'])} by {author}" if author else utc(entry["created_at"])

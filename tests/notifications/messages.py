"""Build messages for the tests of the channels."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from opsentry.notifications.channel import Change, Endpoint, Message

AT = datetime(2026, 3, 1, 12, 30, 5, 123456, tzinfo=UTC)
TENANT = {"slug": "acme", "name": "Acme"}


def incident(**fields: Any) -> dict[str, Any]:
    """Return the public part of an incident, in the shape of the API."""
    whole = {
        "id": 17,
        "title": "Checkout is slow",
        "description": "Payments take long.",
        "status": "investigating",
        "severity": "major_outage",
        "services": [{"id": 3, "slug": "checkout", "name": "Checkout"}],
        "service_ids": [3],
        "occurred_at": AT,
        "created_at": AT,
        "updated_at": AT,
        "resolved_at": None,
        "updates": [update(42)],
        **fields,
    }
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(whole))
    return decoded


def window(**fields: Any) -> dict[str, Any]:
    """Return the public part of a maintenance window, in the shape of the API."""
    whole = {
        "id": 18,
        "title": "Database upgrade",
        "description": None,
        "status": "scheduled",
        "services": [{"id": 3, "slug": "checkout", "name": "Checkout"}],
        "service_ids": [3],
        "scheduled_start": AT,
        "scheduled_end": AT + timedelta(hours=2),
        "started_at": None,
        "completed_at": None,
        "cancelled_at": None,
        "exclude_from_sla": True,
        "suppress_alerts": True,
        "auto_start": True,
        "auto_complete": True,
        "created_at": AT,
        "updated_at": AT,
        "updates": [],
        **fields,
    }
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(whole))
    return decoded


def update(position: int, message: str = "We are looking into it.", **fields: Any) -> dict[str, Any]:
    """Return a timeline entry."""
    return {
        "id": position,
        "status": "investigating",
        "message": message,
        "created_at": "2026-03-01T12:30:05Z",
        **fields,
    }


def message(subject: dict[str, Any] | None = None, kind: str = "incident", **fields: Any) -> Message:
    """Return a message about an incident, or about the given subject."""
    whole: dict[str, Any] = {
        "id": "msg_" + "0123456789abcdef" * 2,
        "type": "incident.opened",
        "position": 42,
        "changes": [Change(41, "incident.opened", AT), Change(42, "incident.updated", AT)],
        "tenant": TENANT,
        "subject_kind": kind,
        "subject": incident() if subject is None else subject,
        **fields,
    }
    return Message(**whole)


def endpoint(target: str, *secrets: str, audience: str = "public") -> Endpoint:
    """Return an endpoint of tenant 7, subscription 8."""
    return Endpoint(7, 8, audience, target, secrets)

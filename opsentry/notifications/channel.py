"""What a channel is: the one thing to write for a new way of telling people. Each is one file in `channels`."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import msgspec


class Change(msgspec.Struct, frozen=True):
    """One event that a message tells: its position in the tenant's ledger, its type, and when it was recorded."""

    position: int
    type: str
    at: datetime


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message to one subscription; the same, id included, however often it has to be sent.

    Attributes:
        id: `msg_` and 32 hex digits.
        type: `incident.opened`, `.updated`, `.severity_changed`, `.resolved`, `.reopened` or `.still_open`;
            `maintenance.scheduled`, `.rescheduled`, `.reminder`, `.updated`, `.started`, `.completed` or `.cancelled`;
            `subscription.test`, or `subscription.confirm` to whoever has to agree first.
        position: The last event's position in the tenant's ledger.
        changes: The events that it tells, oldest first.
        tenant: `{"slug", "name"}`.
        kind: `incident`, `maintenance` or `subscription`: what `subject` is.
        subject: The thing itself, as it was at `position`, with what the subscription's audience may see; as decoded
            JSON, in the shapes of the API.
    """

    id: str
    type: str
    position: int
    changes: Sequence[Change]
    tenant: Mapping[str, str]
    kind: str
    subject: Mapping[str, Any]

    @property
    def at(self) -> datetime:
        """When the last of what it tells was recorded."""
        return self.changes[-1].at


class Endpoint(NamedTuple):
    """Where a message goes, its secrets open: never logged.

    Attributes:
        tenant_id: The tenant.
        subscription_id: The subscription.
        audience: `public` or `internal`.
        target: The whole target, also where answers show only a part of it.
        secrets: What its messages are signed with, the newest first; two while one replaces the other.
    """

    tenant_id: int
    subscription_id: int
    audience: str
    target: str
    secrets: Sequence[str] = ()


class Outcome(NamedTuple):
    """What came of one attempt.

    Attributes:
        error: What went wrong, in words for the tenant; `None` where the message was taken.
        answer: The status that came back, if any did.
        gone: The endpoint says that it is no more: it is sent nothing else.
        retry_after: For so many seconds it wants to be left alone, if it says so.
        ours: What failed is ours, such as the mail relay: it says nothing of the endpoint.
    """

    error: str | None = None
    answer: int | None = None
    gone: bool = False
    retry_after: float | None = None
    ours: bool = False


class BadTarget(Exception):
    """A target that the channel cannot send to; the message says why, as the rest of `target: …`."""


class Channel(Protocol):
    """A way of telling people. Its module has a function `make(parts)` that returns one; see `channels`."""

    name: str
    """What subscriptions call it."""
    signs_messages: bool
    """Whether messages are signed, so that a subscription needs a secret of its own."""
    has_secret_target: bool
    """Whether the target is a secret itself: encrypted_secret, and shown only in part."""

    max_concurrency: int | None
    """Where all its messages go through one thing of ours, so many at once do; `None`: each target has its own."""

    def validate_target(self, target: str) -> str:
        """Return the target as it is to be kept; raises `BadTarget`. Nothing is resolved or dialled."""

    def display_target(self, target: str) -> str:
        """Return what may be shown of a target."""

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Send once, within a bounded time. Whatever goes wrong is an outcome; nothing is raised."""

    async def close(self) -> None:
        """Close what it keeps open."""

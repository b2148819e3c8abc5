"""Define the contract of a channel, such as webhook or email. Each module in `channels` implements one."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import msgspec


class Change(msgspec.Struct, frozen=True):
    """One event that a message reports.

    Attributes:
        position: The event's position in the tenant's ledger.
        type: The event's type, such as `incident.opened`.
        recorded_at: The database's time of the append.
    """

    position: int
    type: str
    recorded_at: datetime


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message to one subscription. Every attempt sends the same message with the same id.

    Attributes:
        id: `msg_` and 32 hex digits.
        type: `incident.opened`, `.updated`, `.severity_changed`, `.resolved`, `.reopened` or `.still_open`;
            `maintenance.scheduled`, `.rescheduled`, `.reminder`, `.updated`, `.started`, `.completed` or `.cancelled`;
            `subscription.test`, or `subscription.confirm` while the subscription awaits confirmation.
        position: The position of the last reported event in the tenant's ledger.
        changes: The reported events, oldest first; at least one.
        tenant: `{"slug", "name"}`.
        subject_kind: `incident`, `maintenance` or `subscription`.
        subject: The subject as of `position`, limited to the fields that the subscription's audience may see, as
            decoded JSON in the shape of the API.
    """

    id: str
    type: str
    position: int
    changes: Sequence[Change]
    tenant: Mapping[str, str]
    subject_kind: str
    subject: Mapping[str, Any]

    @property
    def recorded_at(self) -> datetime:
        """Return the time at which the last reported event was recorded."""
        return self.changes[-1].recorded_at


class Endpoint(NamedTuple):
    """The destination of a message, with its secrets decrypted. Never log it.

    Attributes:
        tenant_id: The tenant.
        subscription_id: The subscription, unique within the tenant.
        audience: `public` or `internal`.
        target: The complete target, even if API responses show only a part of it.
        secrets: The signing secrets, newest first; two while one replaces the other.
    """

    tenant_id: int
    subscription_id: int
    audience: str
    target: str
    secrets: Sequence[str] = ()


class Outcome(NamedTuple):
    """The outcome of one attempt.

    Attributes:
        error: The reason of a failure, in words for the tenant; `None` if the endpoint accepted the message.
        response_status: The HTTP or SMTP status of the response; `None` if there was no response.
        endpoint_gone: True if the endpoint said that it no longer exists. Its subscription is then disabled.
        retry_after: The pause that the endpoint asked for, in seconds.
        internal_failure: True if our own side failed, for example the mail relay. It does not count against the
            endpoint.
    """

    error: str | None = None
    response_status: int | None = None
    endpoint_gone: bool = False
    retry_after: float | None = None
    internal_failure: bool = False


class BadTarget(Exception):
    """The channel cannot send to this target. The message is the rest of the sentence `target: …`."""


class Channel(Protocol):
    """Send messages by one medium. Its module in `channels` has a function `make` that returns the channel."""

    name: str
    """The `channel` of a subscription."""

    signs_messages: bool
    """True if messages are signed, so that each subscription needs a signing secret."""

    has_secret_target: bool
    """True if the target itself is a secret: it is stored encrypted, and responses show only a part of it."""

    max_concurrency: int | None
    """The limit of messages in flight if all share one resource, such as a mail relay; `None` if they do not."""

    def validate_target(self, target: str) -> str:
        """Return the target in the form to store, without resolving or connecting to anything.

        Raises:
            BadTarget: The channel cannot send there.
        """

    def display_target(self, target: str) -> str:
        """Return the part of a target that responses may show."""

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Make one attempt within a bounded time. Every failure is an outcome; nothing is raised."""

    async def close(self) -> None:
        """Close the channel's connections."""

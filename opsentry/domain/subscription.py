"""Subscriptions: create, confirm, change, disable and remove a recipient of messages over a channel.

The channel, not this module, knows the form of its targets. `encrypted_secret` holds a signing secret, or a target that
is a secret itself, in encrypted form.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Literal, TypeAlias, assert_never, get_args

import msgspec
from msgspec import UNSET, UnsetType

from opsentry.domain.decider import (
    Decider,
    Event,
    IllegalTransition,
    InvalidField,
    check_choice,
    check_text,
    normal_ids,
    set_fields,
)
from opsentry.domain.incident import SEVERITIES

KIND = "subscription"

ListedStatus: TypeAlias = Literal["pending", "active", "disabled"]
SubscriptionStatus: TypeAlias = Literal[ListedStatus, "removed"]
Audience: TypeAlias = Literal["public", "internal"]
# Its owner disabled it, its endpoint returned 410, or its endpoint failed for days.
DisabledReason: TypeAlias = Literal["disabled_by_owner", "endpoint_gone", "endpoint_failing"]

STATUSES: tuple[SubscriptionStatus, ...] = get_args(SubscriptionStatus)
AUDIENCES: tuple[Audience, ...] = get_args(Audience)
REASONS: tuple[DisabledReason, ...] = get_args(DisabledReason)
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "pending": frozenset({"active", "removed"}),
    "active": frozenset({"disabled", "removed"}),
    "disabled": frozenset({"active", "removed"}),
    "removed": frozenset(),
}
MAX_TARGET_CHARACTERS = 2_000
# An unconfirmed subscription is removed after this time, and its target redacted.
CONFIRMATION_DAYS = 7


# ---------------------------------------------------------------------------------------------------- events


class SubscriptionCreated(Event, frozen=True, kw_only=True):
    """A subscription was created. Empty `service_ids` stand for all services; a `pending` one awaits confirmation."""

    TYPE: ClassVar[str] = "subscription.created"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"target", "encrypted_secret"})
    channel: str
    target: str
    audience: str
    notify_incidents: bool = True
    notify_maintenance: bool = True
    service_ids: tuple[int, ...] = ()
    min_severity: str = "informational"
    encrypted_secret: str | None = None
    pending: bool = False


class SubscriptionConfirmed(Event, frozen=True, kw_only=True):
    """The target's owner confirmed the subscription."""

    TYPE: ClassVar[str] = "subscription.confirmed"


class SubscriptionChanged(Event, frozen=True, kw_only=True):
    """The target or the filter changed. Fields that are `UNSET` keep their values."""

    TYPE: ClassVar[str] = "subscription.changed"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"target", "encrypted_secret"})
    target: str | UnsetType = UNSET
    encrypted_secret: str | UnsetType = UNSET
    audience: str | UnsetType = UNSET
    notify_incidents: bool | UnsetType = UNSET
    notify_maintenance: bool | UnsetType = UNSET
    service_ids: tuple[int, ...] | UnsetType = UNSET
    min_severity: str | UnsetType = UNSET


class SubscriptionSecretRotated(Event, frozen=True, kw_only=True):
    """A new secret signs messages. The previous one, if any, signs them too until `previous_until`."""

    TYPE: ClassVar[str] = "subscription.secret_rotated"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"encrypted_secret"})
    encrypted_secret: str
    previous_until: datetime


class SubscriptionTestRequested(Event, frozen=True, kw_only=True):
    """A test message was requested."""

    TYPE: ClassVar[str] = "subscription.test_requested"


class SubscriptionDisabled(Event, frozen=True, kw_only=True):
    """Sending stopped, for one of `REASONS`."""

    TYPE: ClassVar[str] = "subscription.disabled"
    reason: str


class SubscriptionEnabled(Event, frozen=True, kw_only=True):
    """Sending resumed, for events from now on."""

    TYPE: ClassVar[str] = "subscription.enabled"


class SubscriptionRemoved(Event, frozen=True, kw_only=True):
    """The subscription ended. `unsubscribed` says that the recipient ended it, not the tenant."""

    TYPE: ClassVar[str] = "subscription.removed"
    unsubscribed: bool = False


class SubscriptionRedacted(Event, frozen=True, kw_only=True):
    """The erasable text of these versions was erased, because a removed subscription keeps no personal data."""

    TYPE: ClassVar[str] = "subscription.redacted"
    versions: tuple[int, ...]


SubscriptionEvent: TypeAlias = (
    SubscriptionCreated
    | SubscriptionConfirmed
    | SubscriptionChanged
    | SubscriptionSecretRotated
    | SubscriptionTestRequested
    | SubscriptionDisabled
    | SubscriptionEnabled
    | SubscriptionRemoved
    | SubscriptionRedacted
)


# ---------------------------------------------------------------------------------------------------- state


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """Hold a subscription's present state. A removed one has neither target nor secrets."""

    channel: str
    target: str
    audience: str
    notify_incidents: bool
    notify_maintenance: bool
    service_ids: tuple[int, ...]
    min_severity: str
    status: str = "active"
    disabled_reason: str | None = None
    encrypted_secret: str | None = None
    previous_encrypted_secret: str | None = None
    previous_until: datetime | None = None


def evolve(state: Subscription | None, event: SubscriptionEvent) -> Subscription:
    """Apply one event to the state."""
    if isinstance(event, SubscriptionCreated):
        fields = msgspec.structs.asdict(event)
        status = "pending" if fields.pop("pending") else "active"
        return Subscription(**fields, status=status)
    if state is None:
        raise ValueError(f"{event.TYPE} before {SubscriptionCreated.TYPE}")
    change = msgspec.structs.replace
    match event:
        case SubscriptionConfirmed() | SubscriptionEnabled():
            return change(state, status="active", disabled_reason=None)
        case SubscriptionChanged():
            return change(state, **set_fields(event))
        case SubscriptionSecretRotated():
            until = None if state.encrypted_secret is None else event.previous_until
            return change(
                state,
                encrypted_secret=event.encrypted_secret,
                previous_encrypted_secret=state.encrypted_secret,
                previous_until=until,
            )
        case SubscriptionTestRequested() | SubscriptionRedacted():
            return state
        case SubscriptionDisabled():
            return change(state, status="disabled", disabled_reason=event.reason)
        case SubscriptionRemoved():
            secrets = dict.fromkeys(("encrypted_secret", "previous_encrypted_secret", "previous_until"))
            return change(state, status="removed", target="", **secrets)
        case _:
            assert_never(event)


# ---------------------------------------------------------------------------------------------------- commands


class CreateSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Subscribe a target."""

    channel: str
    target: str
    audience: str = "public"
    notify_incidents: bool = True
    notify_maintenance: bool = True
    service_ids: tuple[int, ...] = ()
    min_severity: str = "informational"
    encrypted_secret: str | None = None
    pending: bool = False


class ConfirmSubscription(msgspec.Struct, frozen=True):
    """Confirm a pending subscription. Confirming it again changes nothing."""


class ChangeSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Change the given fields. Fields that are `UNSET` keep their values; `enabled` switches sending on or off."""

    target: str | UnsetType = UNSET
    encrypted_secret: str | UnsetType = UNSET
    audience: str | UnsetType = UNSET
    notify_incidents: bool | UnsetType = UNSET
    notify_maintenance: bool | UnsetType = UNSET
    service_ids: tuple[int, ...] | UnsetType = UNSET
    min_severity: str | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class RotateSecret(msgspec.Struct, frozen=True, kw_only=True):
    """Sign with a new secret. The previous one stays valid until `previous_until`.

    The channel decides whether messages are signed at all.
    """

    encrypted_secret: str
    previous_until: datetime


class RequestTest(msgspec.Struct, frozen=True):
    """Request a test message."""


class DisableSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Stop sending, for one of `REASONS`. A subscription that is not active stays unchanged."""

    reason: str


class RemoveSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """End the subscription and erase the text of `versions`, the stream's events with erasable text."""

    unsubscribed: bool = False
    versions: tuple[int, ...] = ()


class ExpireSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """End an unconfirmed subscription, as a removal does. One that is not pending stays unchanged."""

    versions: tuple[int, ...] = ()


SubscriptionCommand: TypeAlias = (
    CreateSubscription
    | ConfirmSubscription
    | ChangeSubscription
    | RotateSecret
    | RequestTest
    | DisableSubscription
    | RemoveSubscription
    | ExpireSubscription
)


def decide(state: Subscription | None, command: SubscriptionCommand) -> Sequence[SubscriptionEvent]:
    """Return the events that `command` causes; raise `InvalidField` or `IllegalTransition` if it is refused."""
    if isinstance(command, CreateSubscription):
        if state is not None:
            raise IllegalTransition("the subscription exists already")
        return [SubscriptionCreated(**_check_fields(command))]
    if state is None or not TRANSITIONS[state.status]:
        raise IllegalTransition("the subscription does not exist")
    match command:
        case ConfirmSubscription():
            return [SubscriptionConfirmed()] if state.status == "pending" else []
        case ChangeSubscription():
            return _change(state, command)
        case RotateSecret():
            return [SubscriptionSecretRotated(**msgspec.structs.asdict(command))]
        case RequestTest():
            if state.status != "active":
                raise IllegalTransition(f"only an active subscription receives messages; this one is {state.status}")
            return [SubscriptionTestRequested()]
        case DisableSubscription():
            check_choice("reason", command.reason, REASONS)
            return [SubscriptionDisabled(reason=command.reason)] if "disabled" in TRANSITIONS[state.status] else []
        case RemoveSubscription():
            return _remove(command.versions, unsubscribed=command.unsubscribed)
        case ExpireSubscription():
            return _remove(command.versions) if state.status == "pending" else []
        case _:
            assert_never(command)


def _change(state: Subscription, command: ChangeSubscription) -> list[SubscriptionEvent]:
    fields = _check_fields(command)
    is_enabled = state.status == "active"
    enable = fields.pop("enabled", is_enabled)
    changes = {name: value for name, value in fields.items() if value != getattr(state, name)}
    events: list[SubscriptionEvent] = [SubscriptionChanged(**changes)] if changes else []
    if enable != is_enabled:
        if state.status == "pending":
            raise IllegalTransition("only the owner of its target can enable a pending subscription, by confirming it")
        events.append(SubscriptionEnabled() if enable else SubscriptionDisabled(reason="disabled_by_owner"))
    return events


def _remove(versions: tuple[int, ...], *, unsubscribed: bool = False) -> list[SubscriptionEvent]:
    erased = [SubscriptionRedacted(versions=versions)] if versions else []
    return [SubscriptionRemoved(unsubscribed=unsubscribed), *erased]


def _check_fields(command: CreateSubscription | ChangeSubscription) -> dict[str, Any]:
    """Return the given fields by name, valid and normalised."""
    fields = set_fields(command)
    if "target" in fields:
        _check_target(fields["target"])
    if "audience" in fields:
        check_choice("audience", fields["audience"], AUDIENCES)
    if "min_severity" in fields:
        check_choice("min_severity", fields["min_severity"], SEVERITIES)
    if "service_ids" in fields:
        fields["service_ids"] = normal_ids(fields["service_ids"])
    return fields


def _check_target(target: str) -> None:
    check_text("target", target)
    if not target.strip():
        raise InvalidField("target", "must not be blank")
    if len(target) > MAX_TARGET_CHARACTERS:
        raise InvalidField("target", f"must have at most {MAX_TARGET_CHARACTERS} characters")


DECIDER: Decider[Subscription, SubscriptionCommand, SubscriptionEvent] = Decider(
    kind=KIND, evolve=evolve, decide=decide
)

"""Subscriptions: who wants to be told of what, over which channel. `pending → active ⇄ disabled`, each `→ removed`.

What a target must look like its channel says; here it is what people wrote, and `encrypted_secret` is what must not lie
anywhere in clear, encrypted: a signing secret, or a target that is a secret itself.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, TypeAlias, assert_never

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
)
from opsentry.domain.incident import SEVERITIES

KIND = "subscription"
AUDIENCES = ("public", "internal")
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "pending": frozenset({"active", "removed"}),
    "active": frozenset({"disabled", "removed"}),
    "disabled": frozenset({"active", "removed"}),
    "removed": frozenset(),
}
STATUSES = tuple(TRANSITIONS)
# Why one is disabled: its owner asked for it, its endpoint answered 410, its endpoint failed for days.
REASONS = ("disabled_by_owner", "endpoint_gone", "endpoint_failing")
MAX_TARGET = 2_000
# So long a pending one waits for whoever owns its target; then it is removed, and the target forgotten.
CONFIRMATION_DAYS = 7


# ---------------------------------------------------------------------------------------------------- events


class SubscriptionCreated(Event, frozen=True, kw_only=True):
    """Someone wants to be told. No `service_ids` means all services; `pending` waits for whoever owns the target."""

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
    """Whoever owns the target has agreed."""

    TYPE: ClassVar[str] = "subscription.confirmed"


class SubscriptionChanged(Event, frozen=True, kw_only=True):
    """They want to be told of something else, or elsewhere. What is `UNSET` stays as it was."""

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
    """Messages are signed with a new secret, and with the one before, if there was one, until `previous_until`."""

    TYPE: ClassVar[str] = "subscription.secret_rotated"
    ERASABLE: ClassVar[frozenset[str]] = frozenset({"encrypted_secret"})
    encrypted_secret: str
    previous_until: datetime


class SubscriptionTestRequested(Event, frozen=True, kw_only=True):
    """Someone wants to see a message arrive."""

    TYPE: ClassVar[str] = "subscription.test_requested"


class SubscriptionDisabled(Event, frozen=True, kw_only=True):
    """Nothing is sent any more: `asked`, `gone` (the endpoint answered 410) or `failing` (for days)."""

    TYPE: ClassVar[str] = "subscription.disabled"
    reason: str


class SubscriptionEnabled(Event, frozen=True, kw_only=True):
    """What happens from here on is sent again."""

    TYPE: ClassVar[str] = "subscription.enabled"


class SubscriptionRemoved(Event, frozen=True, kw_only=True):
    """They want it no longer. `unsubscribed`: said the one who was told, not the tenant."""

    TYPE: ClassVar[str] = "subscription.removed"
    unsubscribed: bool = False


class SubscriptionRedacted(Event, frozen=True, kw_only=True):
    """The words of the events with these versions were erased: who no longer wants to be told is forgotten."""

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
    """A subscription as its events leave it. Of a removed one neither target nor secrets are left."""

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


_CHANGEABLE = tuple(SubscriptionChanged.__struct_fields__)


def evolve(state: Subscription | None, event: SubscriptionEvent) -> Subscription:
    """Fold one event into the state."""
    if isinstance(event, SubscriptionCreated):
        return Subscription(
            channel=event.channel,
            target=event.target,
            audience=event.audience,
            notify_incidents=event.notify_incidents,
            notify_maintenance=event.notify_maintenance,
            service_ids=event.service_ids,
            min_severity=event.min_severity,
            status="pending" if event.pending else "active",
            encrypted_secret=event.encrypted_secret,
        )
    if state is None:
        raise ValueError(f"{event.TYPE} before {SubscriptionCreated.TYPE}")
    change = msgspec.structs.replace
    match event:
        case SubscriptionConfirmed() | SubscriptionEnabled():
            return change(state, status="active", disabled_reason=None)
        case SubscriptionChanged():
            return change(state, **_set(event))
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
            return change(
                state,
                status="removed",
                target="",
                encrypted_secret=None,
                previous_encrypted_secret=None,
                previous_until=None,
            )
        case _:
            assert_never(event)


def _set(change: "SubscriptionChanged | ChangeSubscription") -> dict[str, Any]:
    values = {name: getattr(change, name) for name in _CHANGEABLE}
    return {name: value for name, value in values.items() if value is not UNSET}


# ---------------------------------------------------------------------------------------------------- commands


class CreateSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Ask to be told."""

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
    """Agree to be told. Saying so again changes nothing."""


class ChangeSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Change what is set, leave what is `UNSET`. `enabled` turns sending off and on."""

    target: str | UnsetType = UNSET
    encrypted_secret: str | UnsetType = UNSET
    audience: str | UnsetType = UNSET
    notify_incidents: bool | UnsetType = UNSET
    notify_maintenance: bool | UnsetType = UNSET
    service_ids: tuple[int, ...] | UnsetType = UNSET
    min_severity: str | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class RotateSecret(msgspec.Struct, frozen=True, kw_only=True):
    """Sign with a new secret; the one before is good until `previous_until`. Whether it is signed says the channel.

    Subscriptions of long ago have no secret: they get their first one.
    """

    encrypted_secret: str
    previous_until: datetime


class RequestTest(msgspec.Struct, frozen=True):
    """Ask for a message to see whether it arrives."""


class DisableSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Send nothing any more, for one of `REASONS`. What is not active stays as it is."""

    reason: str


class RemoveSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Ask to be told no longer. `versions` are those of the stream's events that have words, to be erased."""

    unsubscribed: bool = False
    versions: tuple[int, ...] = ()


class ExpireSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Wait no longer for whoever owns the target. What is not pending stays as it is; `versions` as for a removal."""

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
    """Answer `command` with events, or raise `InvalidField` or `IllegalTransition`."""
    if isinstance(command, CreateSubscription):
        if state is not None:
            raise IllegalTransition("the subscription exists already")
        return [_create(command)]
    if state is None or not TRANSITIONS[state.status]:
        raise IllegalTransition("the subscription does not exist")
    match command:
        case ConfirmSubscription():
            return [SubscriptionConfirmed()] if state.status == "pending" else []
        case ChangeSubscription():
            return _change(state, command)
        case RotateSecret():
            return [
                SubscriptionSecretRotated(
                    encrypted_secret=command.encrypted_secret, previous_until=command.previous_until
                )
            ]
        case RequestTest():
            if state.status != "active":
                raise IllegalTransition(f"only to an active subscription is anything sent; this one is {state.status}")
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


def _create(command: CreateSubscription) -> SubscriptionCreated:
    return SubscriptionCreated(
        channel=command.channel,
        target=_validate_target(command.target),
        audience=check_choice("audience", command.audience, AUDIENCES),
        notify_incidents=command.notify_incidents,
        notify_maintenance=command.notify_maintenance,
        service_ids=normal_ids(command.service_ids),
        min_severity=check_choice("min_severity", command.min_severity, SEVERITIES),
        encrypted_secret=command.encrypted_secret,
        pending=command.pending,
    )


def _change(state: Subscription, command: ChangeSubscription) -> list[SubscriptionEvent]:
    wanted = _set(command)
    if "target" in wanted:
        _validate_target(wanted["target"])
    if "audience" in wanted:
        check_choice("audience", wanted["audience"], AUDIENCES)
    if "min_severity" in wanted:
        check_choice("min_severity", wanted["min_severity"], SEVERITIES)
    if "service_ids" in wanted:
        wanted["service_ids"] = normal_ids(wanted["service_ids"])
    changes = {name: value for name, value in wanted.items() if value != getattr(state, name)}
    events: list[SubscriptionEvent] = [SubscriptionChanged(**changes)] if changes else []
    if command.enabled is not UNSET and command.enabled != (state.status == "active"):
        if state.status == "pending":
            raise IllegalTransition("a pending subscription is enabled by whoever owns its target")
        events.append(SubscriptionEnabled() if command.enabled else SubscriptionDisabled(reason="disabled_by_owner"))
    return events


def _remove(versions: tuple[int, ...], *, unsubscribed: bool = False) -> list[SubscriptionEvent]:
    erased = [SubscriptionRedacted(versions=versions)] if versions else []
    return [SubscriptionRemoved(unsubscribed=unsubscribed), *erased]


def _validate_target(target: str) -> str:
    check_text("target", target)
    if not target.strip():
        raise InvalidField("target", "must not be blank")
    if len(target) > MAX_TARGET:
        raise InvalidField("target", f"must have at most {MAX_TARGET} characters")
    return target


DECIDER: Decider[Subscription, SubscriptionCommand, SubscriptionEvent] = Decider(
    kind=KIND, evolve=evolve, decide=decide
)

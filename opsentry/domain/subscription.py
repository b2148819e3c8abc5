"""Subscriptions: who wants to be told of what, over which channel."""

from collections.abc import Sequence
from typing import ClassVar, TypeAlias, assert_never

import msgspec

from opsentry.domain.decider import Decider, Event, InvalidField, TransitionRefused, check_choice, normal_ids
from opsentry.domain.incident import SEVERITIES

KIND = "subscription"
CHANNELS = ("webhook", "email", "slack")
AUDIENCES = ("public", "internal")


# ---------------------------------------------------------------------------------------------------- events


class SubscriptionCreated(Event, frozen=True, kw_only=True):
    """Someone wants to be told. No `service_ids` means all services."""

    TYPE: ClassVar[str] = "subscription.created"
    WORDS: ClassVar[frozenset[str]] = frozenset({"target"})
    channel: str
    target: str
    audience: str
    incidents: bool = True
    maintenance: bool = True
    service_ids: tuple[int, ...] = ()
    lowest_severity: str = "informational"


class SubscriptionRemoved(Event, frozen=True, kw_only=True):
    """They want it no longer."""

    TYPE: ClassVar[str] = "subscription.removed"


SubscriptionEvent: TypeAlias = SubscriptionCreated | SubscriptionRemoved


# ---------------------------------------------------------------------------------------------------- state


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """A subscription as its events leave it."""

    channel: str
    audience: str
    incidents: bool
    maintenance: bool
    service_ids: tuple[int, ...]
    lowest_severity: str
    removed: bool = False


def evolve(state: Subscription | None, event: SubscriptionEvent) -> Subscription:
    """Fold one event into the state."""
    match event:
        case SubscriptionCreated():
            return Subscription(
                channel=event.channel,
                audience=event.audience,
                incidents=event.incidents,
                maintenance=event.maintenance,
                service_ids=event.service_ids,
                lowest_severity=event.lowest_severity,
            )
        case SubscriptionRemoved():
            if state is None:
                raise ValueError(f"{event.TYPE} before {SubscriptionCreated.TYPE}")
            return msgspec.structs.replace(state, removed=True)
        case _:
            assert_never(event)


# ---------------------------------------------------------------------------------------------------- commands


class CreateSubscription(msgspec.Struct, frozen=True, kw_only=True):
    """Ask to be told."""

    channel: str
    target: str
    audience: str = "public"
    incidents: bool = True
    maintenance: bool = True
    service_ids: tuple[int, ...] = ()
    lowest_severity: str = "informational"


class RemoveSubscription(msgspec.Struct, frozen=True):
    """Ask to be told no longer."""


SubscriptionCommand: TypeAlias = CreateSubscription | RemoveSubscription


def decide(state: Subscription | None, command: SubscriptionCommand) -> Sequence[SubscriptionEvent]:
    """Answer `command` with events, or raise `InvalidField` or `TransitionRefused`."""
    match command:
        case CreateSubscription():
            if state is not None:
                raise TransitionRefused("the subscription exists already")
            if not command.target.strip():
                raise InvalidField("target", "must not be blank")
            return [
                SubscriptionCreated(
                    channel=check_choice("channel", command.channel, CHANNELS),
                    target=command.target,
                    audience=check_choice("audience", command.audience, AUDIENCES),
                    incidents=command.incidents,
                    maintenance=command.maintenance,
                    service_ids=normal_ids(command.service_ids),
                    lowest_severity=check_choice("lowest_severity", command.lowest_severity, SEVERITIES),
                )
            ]
        case RemoveSubscription():
            if state is None or state.removed:
                raise TransitionRefused("the subscription does not exist")
            return [SubscriptionRemoved()]
        case _:
            assert_never(command)


DECIDER: Decider[Subscription, SubscriptionCommand, SubscriptionEvent] = Decider(
    kind=KIND, evolve=evolve, decide=decide
)

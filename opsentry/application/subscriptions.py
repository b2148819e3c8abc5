"""Use cases of subscriptions: create, change, confirm, test, rotate the secret, remove, read.

A secret appears in clear once: in the result of the command that made it. It is stored encrypted.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, cast

import msgspec
import structlog
from msgspec import UNSET

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.errors import NotFound
from opsentry.application.pipeline import Outcome, run
from opsentry.application.queries import listing_of_row, read_row, resource_of_row
from opsentry.application.rendering import render_plain
from opsentry.application.results import Listing, Resource
from opsentry.domain import subscription
from opsentry.domain.decider import REDACTED, IllegalTransition, InvalidField, StreamRemoved
from opsentry.domain.redaction import erasable_versions
from opsentry.domain.subscription import (
    ChangeSubscription,
    CreateSubscription,
    DisableSubscription,
    ExpireSubscription,
    RemoveSubscription,
    RequestTest,
    RotateSecret,
    Subscription,
    SubscriptionCommand,
    SubscriptionCreated,
    SubscriptionSecretRotated,
)
from opsentry.events.codec import RecordedEvent, history_entries
from opsentry.infrastructure.encryption import DecryptionFailed
from opsentry.infrastructure.postgres import DatabaseUnavailable
from opsentry.notifications.channel import BadTarget, Channel
from opsentry.notifications.delivery import history as deliveries
from opsentry.notifications.messages.signing import new_secret
from opsentry.projections import subscriptions
from opsentry.projections.page_request import PageRequest
from opsentry.projections.subscriptions import SubscriptionPageFilter

_log = structlog.get_logger()

MAX_OVERLAP_HOURS = 168


class IssuedSecret(NamedTuple):
    """A subscription, with the secret that was made for it (`None`: its channel signs nothing).

    `previous_valid_until` is when the secret before stops working; `None` if there was none.
    """

    resource: Resource
    secret: str | None
    previous_valid_until: datetime | None = None


async def create_subscription(app: Application, caller: Caller, command: CreateSubscription) -> IssuedSecret:
    """Create a subscription.

    Raises:
        InvalidField: The channel does not exist, or cannot send to the target.
        EncryptionKeyMissing: No key is configured to keep the secret with.
    Further, raises as `pipeline.run`.
    """
    channel = _channel(app, command.channel)
    subscription.decide(None, command)  # a wrong field is reported before the target is examined
    target = _validated(channel, command.target)
    secret = target if channel.has_secret_target else new_secret() if channel.signs_messages else None
    command = msgspec.structs.replace(
        command,
        target=_display(channel, target),
        encrypted_secret=None if secret is None else app.secret_box.encrypt(secret),
    )
    outcome = await run(app, caller, subscription.DECIDER, command)
    created = cast("SubscriptionCreated", outcome.result.history[0].event)
    is_signed = created.encrypted_secret is not None and channel.signs_messages
    return IssuedSecret(_render(outcome), _decrypted(app, created.encrypted_secret) if is_signed else None)


async def change_subscription(
    app: Application, caller: Caller, subscription_id: int, command: ChangeSubscription
) -> Resource:
    """Change a subscription.

    Raises:
        NotFound: The tenant has none with this id, or it was removed.
        InvalidField: The channel cannot send to the new target.
    Further, raises as `create_subscription`.
    """

    def build(state: Subscription, _: Sequence[RecordedEvent]) -> SubscriptionCommand:
        _require_present(state)
        return _with_target(app, state, command)

    outcome = await run(app, caller, subscription.DECIDER, build, stream_id=subscription_id)
    if outcome.result.appended and (command.target is not UNSET or command.enabled is True):
        # The change stands without this: it only makes the next attempt come sooner.
        with suppress(DatabaseUnavailable):
            async with app.database.transaction() as connection:
                await deliveries.reset_endpoint(connection, caller.tenant_id, subscription_id)
    return _render(outcome)


async def rotate_secret(app: Application, caller: Caller, subscription_id: int, overlap_hours: int) -> IssuedSecret:
    """Sign with a new secret; the one before is valid for `overlap_hours` more.

    Raises:
        InvalidField: `overlap_hours` is out of range.
        IllegalTransition: The channel signs nothing.
    Further, raises as `change_subscription`.
    """
    if not 0 <= overlap_hours <= MAX_OVERLAP_HOURS:
        raise InvalidField("overlap_hours", f"must be from 0 to {MAX_OVERLAP_HOURS}")

    def build(state: Subscription, _: Sequence[RecordedEvent]) -> SubscriptionCommand:
        _require_present(state)
        channel = app.channels.get(state.channel)
        if channel is None or not channel.signs_messages:
            raise IllegalTransition(f"messages to {state.channel} are not signed")
        return RotateSecret(
            encrypted_secret=app.secret_box.encrypt(new_secret()),
            previous_until=datetime.now(UTC) + timedelta(hours=overlap_hours),
        )

    outcome = await run(app, caller, subscription.DECIDER, build, stream_id=subscription_id)
    rotated = cast("SubscriptionSecretRotated", outcome.result.history[-1].event)
    secret = _decrypted(app, rotated.encrypted_secret)
    return IssuedSecret(_render(outcome), secret, outcome.result.state.previous_until)


async def request_test(app: Application, caller: Caller, subscription_id: int) -> Resource:
    """Ask for a test message; raises as `change_subscription`."""

    def build(state: Subscription, _: Sequence[RecordedEvent]) -> SubscriptionCommand:
        _require_present(state)
        return RequestTest()

    return _render(await run(app, caller, subscription.DECIDER, build, stream_id=subscription_id))


async def remove_subscription(
    app: Application, caller: Caller, subscription_id: int, *, is_unsubscribe: bool = False
) -> Resource:
    """Remove a subscription and erase its target; raises as `change_subscription`."""

    def build(state: Subscription, history: Sequence[RecordedEvent]) -> SubscriptionCommand:
        _require_present(state)
        return RemoveSubscription(unsubscribed=is_unsubscribe, versions=erasable_versions(history_entries(history)))

    outcome = await run(app, caller, subscription.DECIDER, build, stream_id=subscription_id)
    return render_plain(outcome, b"")


async def expire_subscription(app: Application, caller: Caller, subscription_id: int) -> Outcome:
    """Remove a subscription that nobody confirmed in time; raises as `change_subscription`."""

    def build(_: Subscription, history: Sequence[RecordedEvent]) -> SubscriptionCommand:
        return ExpireSubscription(versions=erasable_versions(history_entries(history)))

    return await run(app, caller, subscription.DECIDER, build, stream_id=subscription_id)


class EndpointChanged(Exception):
    """The subscription names another endpoint than the one that a message was sent to."""


async def disable_subscription(
    app: Application, caller: Caller, subscription_id: int, *, reason: str, target: str, encrypted_secret: str | None
) -> bool:
    """Disable a subscription whose endpoint is gone or failing, unless it has another endpoint by now.

    Returns:
        True if nothing may be sent there any more.
    """

    def build(state: Subscription, _: Sequence[RecordedEvent]) -> SubscriptionCommand:
        if (state.target, state.encrypted_secret) != (target, encrypted_secret):
            raise EndpointChanged
        return DisableSubscription(reason=reason)

    try:
        outcome = await run(app, caller, subscription.DECIDER, build, stream_id=subscription_id)
    except (IllegalTransition, StreamRemoved, NotFound):  # it was removed meanwhile
        return True
    except EndpointChanged:
        return False
    if outcome.result.appended:
        _log.info("endpoint_disabled", tenant_id=caller.tenant_id, subscription_id=subscription_id, reason=reason)
    return outcome.result.state.status not in {"active", "pending"}


async def list_subscriptions(
    app: Application, caller: Caller, page_filter: SubscriptionPageFilter, page: PageRequest
) -> Listing:
    """Return a page of subscriptions, the newest first.

    Raises:
        MissingPermission: The caller may not manage subscriptions.
        PositionNotReached, DatabaseUnavailable: The read model cannot be read.
    """
    caller.require("write:subscriptions")
    if page_filter.channel is not None:
        _channel(app, page_filter.channel)
    row = await read_row(
        app,
        caller,
        lambda connection: subscriptions.select_subscriptions(connection, caller.tenant_id, page_filter, page),
    )
    return listing_of_row(row)


async def get_subscription(app: Application, caller: Caller, subscription_id: int) -> Resource:
    """Return a subscription; raises `NotFound`, and as `list_subscriptions`."""
    caller.require("write:subscriptions")
    row = await read_row(
        app,
        caller,
        lambda connection: subscriptions.select_subscription(connection, caller.tenant_id, subscription_id),
    )
    return resource_of_row(subscription_id, row)


def _render(outcome: Outcome) -> Resource:
    return render_plain(outcome, subscriptions.render(outcome.result.history))


def _require_present(state: Subscription) -> None:
    if state.status == "removed":
        raise StreamRemoved("the subscription does not exist")


def _with_target(app: Application, state: Subscription, command: ChangeSubscription) -> ChangeSubscription:
    """Return `command` with its target as it is stored. The displayed form of a target stands for the target itself."""
    if command.target is UNSET or command.target == state.target:
        return msgspec.structs.replace(command, target=UNSET)
    subscription.decide(state, ChangeSubscription(target=command.target))
    channel = _channel(app, state.channel)
    target = _validated(channel, command.target)
    if not channel.has_secret_target:
        return msgspec.structs.replace(command, target=target)
    if target == _secret_target(app, state):
        return msgspec.structs.replace(command, target=UNSET)
    return msgspec.structs.replace(
        command, target=_display(channel, target), encrypted_secret=app.secret_box.encrypt(target)
    )


def _secret_target(app: Application, state: Subscription) -> str | None:
    """Return the whole secret target; `None` where no key decrypts it, so that any target replaces it."""
    try:
        return None if state.encrypted_secret is None else app.secret_box.decrypt(state.encrypted_secret)
    except DecryptionFailed:
        return None


def _channel(app: Application, name: str) -> Channel:
    channel = app.channels.get(name)
    if channel is None:
        raise InvalidField("channel", f"must be one of {', '.join(sorted(app.channels))}")
    return channel


def _validated(channel: Channel, target: str) -> str:
    try:
        return channel.validate_target(target)
    except BadTarget as error:
        raise InvalidField("target", str(error)) from None


def _display(channel: Channel, target: str) -> str:
    return channel.display_target(target) if channel.has_secret_target else target


def _decrypted(app: Application, encrypted_secret: str | None) -> str | None:
    """Return the secret of an event; the same however often its command is repeated. Raises `DecryptionFailed`."""
    if encrypted_secret is None or encrypted_secret == REDACTED:
        return encrypted_secret
    return app.secret_box.decrypt(encrypted_secret)

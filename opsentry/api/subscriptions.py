"""`/subscriptions…`: who is told of what, over which channel.

A secret leaves the house once, in the answer to the command that made it; kept it is encrypted_secret alone.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import cast

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from opsentry.api import commands
from opsentry.api.context import Id, RequestContext, name_choices
from opsentry.api.errors import BadRequest, NotFound
from opsentry.api.responses import list_response, one_response
from opsentry.domain import subscription
from opsentry.domain.decider import REDACTED, IllegalTransition, InvalidField
from opsentry.domain.incident import SEVERITIES
from opsentry.domain.redaction import erasable_versions
from opsentry.domain.subscription import (
    AUDIENCES,
    STATUSES,
    ChangeSubscription,
    CreateSubscription,
    RemoveSubscription,
    RequestTest,
    RotateSecret,
    Subscription,
    SubscriptionCommand,
    SubscriptionCreated,
    SubscriptionEvent,
    SubscriptionSecretRotated,
)
from opsentry.events.codec import RecordedEvent, written
from opsentry.events.command_handler import CommandResult
from opsentry.infrastructure.encryption import DecryptionFailed
from opsentry.infrastructure.postgres import DatabaseUnavailable
from opsentry.notifications.channel import BadTarget, Channel
from opsentry.notifications.delivery import history
from opsentry.notifications.messages.signing import new_secret
from opsentry.projections import subscriptions
from opsentry.projections.page_request import PageRequest
from opsentry.projections.subscriptions import SubscriptionPageFilter

MAX_OVERLAP_HOURS = 168

name_choices({"audience": AUDIENCES, "min_severity": SEVERITIES})


class CreateBody(msgspec.Struct):
    """Body of `POST /subscriptions`."""

    channel: str
    target: str
    audience: str = "public"
    notify_incidents: bool = True
    notify_maintenance: bool = True
    service_ids: tuple[Id, ...] = ()
    min_severity: str = "informational"


class ChangeBody(msgspec.Struct):
    """Body of `PATCH /subscriptions/:id`."""

    target: str | UnsetType = UNSET
    audience: str | UnsetType = UNSET
    notify_incidents: bool | UnsetType = UNSET
    notify_maintenance: bool | UnsetType = UNSET
    service_ids: tuple[Id, ...] | UnsetType = UNSET
    min_severity: str | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class RotateBody(msgspec.Struct):
    """Body of `POST /subscriptions/:id/rotate-secret`: for how long the secret before is good."""

    overlap_hours: int = 24


async def listing(call: RequestContext) -> web.Response:
    """`GET /subscriptions`."""
    call.refuse("as_of")
    filter_ = SubscriptionPageFilter(
        call.choice("channel", sorted(call.parts.channels)),
        call.choice("status", [status for status in STATUSES if status != "removed"]),
    )
    limit, offset = call.page(default=50)
    row = await call.read(
        lambda connection: subscriptions.select_subscriptions(
            connection, call.tenant_id, filter_, PageRequest(limit, offset)
        )
    )
    return list_response(call, "subscriptions", row, (limit, offset))


async def one(call: RequestContext) -> web.Response:
    """`GET /subscriptions/:id`."""
    number = call.id()
    call.refuse("as_of")
    return one_response(
        await call.read(lambda connection: subscriptions.select_subscription(connection, call.tenant_id, number))
    )


async def create(call: RequestContext) -> web.Response:
    """`POST /subscriptions`."""
    body = await call.body(CreateBody)
    executed = await commands.find_replay(call, subscription.DECIDER)
    if executed is None:
        command = CreateSubscription(**msgspec.structs.asdict(body))
        channel = _channel(call, command.channel)
        subscription.decide(None, command)  # what is wrong with the words is said before anything is looked up
        whole = _checked(channel, command.target)
        await call.refs(command.service_ids)
        encrypted_secret = _sealed(call, channel, whole)
        if encrypted_secret is None and channel.signs_messages:
            encrypted_secret = call.parts.secret_box.encrypt(new_secret())
        command = msgspec.structs.replace(command, target=_shown(channel, whole), encrypted_secret=encrypted_secret)
        executed = await commands.create(call, subscription.DECIDER, command)
    answer = subscriptions.render(executed.history)
    made = cast("SubscriptionCreated", executed.history[0].event)
    if made.encrypted_secret is not None and _signs(call, made.channel):
        answer = _with(answer, secret=_opened(call, made.encrypted_secret))
    return await commands.answer_alone(call, executed, answer, status=201, location="subscriptions")


async def change(call: RequestContext) -> web.Response:
    """`PATCH /subscriptions/:id`."""
    call.id()
    body = await call.body(ChangeBody)
    executed = await commands.find_replay(call, subscription.DECIDER)
    if executed is None:
        if body.service_ids is not UNSET:
            await call.refs(body.service_ids)
        executed = await _execute(call, lambda state, _: _change(call, state, body))
        if executed.appended and (body.target is not UNSET or body.enabled is True):
            # Only how soon it is tried hangs on this, so the change stands without it.
            with suppress(DatabaseUnavailable):
                async with call.parts.database.transaction() as connection:
                    await history.reset_endpoint(connection, call.tenant_id, executed.stream_id)
    return await commands.answer_alone(call, executed, subscriptions.render(executed.history))


async def remove(call: RequestContext) -> web.Response:
    """`DELETE /subscriptions/:id`: whom it was for is forgotten."""
    executed = await _execute(call, lambda _, history: removal(history))
    return await commands.answer_alone(call, executed, b"", status=204)


def removal(history: Sequence[RecordedEvent], *, unsubscribed: bool = False) -> RemoveSubscription:
    """Return the command that removes the subscription with these events, and with it their words."""
    return RemoveSubscription(unsubscribed=unsubscribed, versions=erasable_versions(written(history)))


async def test(call: RequestContext) -> web.Response:
    """`POST /subscriptions/:id/test`."""
    executed = await _execute(call, lambda _state, _history: RequestTest())
    return await commands.answer_alone(call, executed, subscriptions.render(executed.history), status=202)


async def rotate_secret(call: RequestContext) -> web.Response:
    """`POST /subscriptions/:id/rotate-secret`."""
    call.id()
    body = await call.body(RotateBody, optional=True)
    if not 0 <= body.overlap_hours <= MAX_OVERLAP_HOURS:
        raise BadRequest(f"overlap_hours: must be from 0 to {MAX_OVERLAP_HOURS}")

    def command(state: Subscription, _: Sequence[RecordedEvent]) -> SubscriptionCommand:
        if not _signs(call, state.channel):
            raise IllegalTransition(f"messages to {state.channel} are not signed")
        encrypted_secret = call.parts.secret_box.encrypt(new_secret())
        return RotateSecret(
            encrypted_secret=encrypted_secret, previous_until=datetime.now(UTC) + timedelta(hours=body.overlap_hours)
        )

    executed = await _execute(call, command)
    rotated = cast("SubscriptionSecretRotated", executed.history[-1].event)
    answer = _with(
        subscriptions.render(executed.history),
        secret=_opened(call, rotated.encrypted_secret),
        previous_valid_until=executed.state.previous_until,
    )
    return await commands.answer_alone(call, executed, answer)


async def _execute(
    call: RequestContext, command: Callable[[Subscription, Sequence[RecordedEvent]], SubscriptionCommand]
) -> CommandResult[Subscription]:
    """Change a subscription as `command` says of its state and its events.

    Raises as `commands.execute`, and:
        NotFound: It was removed.
    """

    def build(history: Sequence[RecordedEvent]) -> SubscriptionCommand:
        state = subscription.DECIDER.fold(cast("SubscriptionEvent", recorded.event) for recorded in history)
        if state is None or state.status == "removed":
            raise NotFound
        return command(state, history)

    return await commands.execute(call, subscription.DECIDER, build)


def _change(call: RequestContext, state: Subscription, body: ChangeBody) -> ChangeSubscription:
    command = ChangeSubscription(**msgspec.structs.asdict(body))
    # What is shown of a target stands for the target itself: so an answer may be sent back as it came.
    if command.target is UNSET or command.target == state.target:
        return msgspec.structs.replace(command, target=UNSET)
    subscription.decide(state, ChangeSubscription(target=command.target))
    channel = _channel(call, state.channel)
    whole = _checked(channel, command.target)
    if not channel.has_secret_target:
        return msgspec.structs.replace(command, target=whole)
    if whole == _hidden(call, state):
        return msgspec.structs.replace(command, target=UNSET)
    encrypted_secret = _sealed(call, channel, whole)
    return msgspec.structs.replace(
        command, target=_shown(channel, whole), encrypted_secret=UNSET if encrypted_secret is None else encrypted_secret
    )


# ---------------------------------------------------------------------------------------------------- targets, secrets


def _channel(call: RequestContext, name: str) -> Channel:
    channel = call.parts.channels.get(name)
    if channel is None:
        raise BadRequest(f"channel: must be one of {', '.join(sorted(call.parts.channels))}")
    return channel


def _signs(call: RequestContext, name: str) -> bool:
    channel = call.parts.channels.get(name)
    return channel is not None and channel.signs_messages


def _checked(channel: Channel, target: str) -> str:
    try:
        return channel.validate_target(target)
    except BadTarget as error:
        raise InvalidField("target", str(error)) from None


def _shown(channel: Channel, whole: str) -> str:
    return channel.display_target(whole) if channel.has_secret_target else whole


def _sealed(call: RequestContext, channel: Channel, whole: str) -> str | None:
    """Return the target encrypted_secret, where it is a secret."""
    return call.parts.secret_box.encrypt(whole) if channel.has_secret_target else None


def _hidden(call: RequestContext, state: Subscription) -> str | None:
    """Return the whole target of a channel that hides it; `None` where it can be read no more: then it is replaced."""
    try:
        return None if state.encrypted_secret is None else call.parts.secret_box.decrypt(state.encrypted_secret)
    except DecryptionFailed:
        return None


def _opened(call: RequestContext, encrypted_secret: str) -> str:
    """Return the secret of an event, which is the same however often its command is sent; raises `DecryptionFailed`."""
    return encrypted_secret if encrypted_secret == REDACTED else call.parts.secret_box.decrypt(encrypted_secret)


def _with(answer: bytes, **more: object) -> bytes:
    return answer[:-1] + b"," + msgspec.json.encode(more)[1:]

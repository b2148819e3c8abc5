"""Seed subscriptions of the demo: a webhook, Slack and an e-mail address, which all lead to the sink."""

from datetime import UTC, datetime

from opsentry.application import pipeline
from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.demo.seed import Seeder
from opsentry.demo.sink import Sink
from opsentry.domain import subscription
from opsentry.domain.decider import IllegalTransition
from opsentry.domain.subscription import (
    ChangeSubscription,
    CreateSubscription,
    RotateSecret,
    Subscription,
    SubscriptionCommand,
)
from opsentry.infrastructure.encryption import DecryptionFailed
from opsentry.notifications.messages.signing import new_secret

MAILBOX = "ops@acme.example"


async def seed(app: Application, caller: Caller, sink: Sink) -> None:
    """Create the missing subscriptions, and point them to the sink of this run.

    A removed subscription stays removed.
    """
    box, seeder = app.secret_box, Seeder(app, caller)

    async def create(channel: str, target: str, audience: str, encrypted_secret: str | None) -> int:
        command = CreateSubscription(
            channel=channel, target=target, audience=audience, encrypted_secret=encrypted_secret
        )
        reservation = f"demo:subscription:{channel}"
        return await seeder.create(subscription.DECIDER, reservation, [(command, datetime.now(UTC))])

    async def change(subscription_id: int, command: SubscriptionCommand) -> Subscription | None:
        try:
            outcome = await pipeline.run(app, caller, subscription.DECIDER, command, stream_id=subscription_id)
        except IllegalTransition:
            return None
        state: Subscription = outcome.result.state
        return state

    hook = f"{sink.url}/hook"
    subscription_id = await create("webhook", hook, "internal", box.encrypt(new_secret()))
    webhook = await change(subscription_id, ChangeSubscription(target=hook))
    if webhook is not None and webhook.encrypted_secret is not None:
        try:
            secret = box.decrypt(webhook.encrypted_secret)
        except DecryptionFailed:  # OPSENTRY_ENCRYPTION_KEYS changed
            secret = new_secret()
            await change(
                subscription_id, RotateSecret(encrypted_secret=box.encrypt(secret), previous_until=datetime.now(UTC))
            )
        sink.secrets.append(secret)

    slack, shown = f"{sink.url}/slack", f"{sink.url}/…"
    subscription_id = await create("slack", shown, "internal", box.encrypt(slack))
    await change(subscription_id, ChangeSubscription(target=shown, encrypted_secret=box.encrypt(slack)))
    # With a real mail relay the demo must not send to a made-up address.
    if sink.smtp_url:
        await create("email", MAILBOX, "public", None)

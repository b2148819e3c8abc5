"""Seed subscriptions of the demo: a webhook, Slack and an e-mail address, which all lead to the sink."""

from datetime import UTC, datetime

from opsentry.bootstrap import Core
from opsentry.demo.seed import META, Seeder
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
from opsentry.infrastructure.encryption import DecryptionFailed, SecretBox
from opsentry.notifications.messages.signing import new_secret

MAILBOX = "ops@acme.example"


async def seed(parts: Core, tenant_id: int, sink: Sink) -> None:
    """Create the missing subscriptions, and point them to the sink of this run.

    A removed subscription stays removed.
    """
    box, seeder = SecretBox(parts.settings.encryption_keys), Seeder(parts, tenant_id)

    async def create(channel: str, target: str, audience: str, encrypted_secret: str | None) -> int:
        command = CreateSubscription(
            channel=channel, target=target, audience=audience, encrypted_secret=encrypted_secret
        )
        reservation = f"demo:subscription:{channel}"
        return await seeder.create(subscription.DECIDER, reservation, [(command, datetime.now(UTC))])

    async def change(number: int, command: SubscriptionCommand) -> Subscription | None:
        try:
            executed = await parts.commands.execute(subscription.DECIDER, tenant_id, number, command, META)
        except IllegalTransition:
            return None
        return executed.state

    hook = f"{sink.url}/hook"
    number = await create("webhook", hook, "internal", box.encrypt(new_secret()))
    webhook = await change(number, ChangeSubscription(target=hook))
    if webhook is not None and webhook.encrypted_secret is not None:
        try:
            secret = box.decrypt(webhook.encrypted_secret)
        except DecryptionFailed:  # OPSENTRY_ENCRYPTION_KEYS changed
            secret = new_secret()
            await change(number, RotateSecret(encrypted_secret=box.encrypt(secret), previous_until=datetime.now(UTC)))
        sink.secrets.append(secret)

    slack, shown = f"{sink.url}/slack", f"{sink.url}/…"
    number = await create("slack", shown, "internal", box.encrypt(slack))
    await change(number, ChangeSubscription(target=shown, encrypted_secret=box.encrypt(slack)))
    # With a real mail relay the demo must not send to a made-up address.
    if sink.smtp_url:
        await create("email", MAILBOX, "public", None)

"""Who is told in the demo: a webhook, Slack and an e-mail address, all of them at the sink."""

from datetime import UTC, datetime

from opsentry.bootstrap import Core
from opsentry.demo.seed import META, Story
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
    """Give the tenant its subscriptions, once, and see that they lead to the sink of this run.

    One that was removed stays so.
    """
    box, story = SecretBox(parts.settings.encryption_keys), Story(parts, tenant_id)

    async def told(channel: str, target: str, audience: str, encrypted_secret: str | None) -> int:
        wanted = CreateSubscription(
            channel=channel, target=target, audience=audience, encrypted_secret=encrypted_secret
        )
        claim = f"demo:subscription:{channel}"
        return await story.tell(subscription.DECIDER, claim, [(wanted, datetime.now(UTC))])

    async def change(number: int, command: SubscriptionCommand) -> Subscription | None:
        try:
            executed = await parts.commands.execute(subscription.DECIDER, tenant_id, number, command, META)
        except IllegalTransition:
            return None
        return executed.state

    hook = f"{sink.url}/hook"
    number = await told("webhook", hook, "internal", box.encrypt(new_secret()))
    webhook = await change(number, ChangeSubscription(target=hook))
    if webhook is not None and webhook.encrypted_secret is not None:
        try:
            secret = box.decrypt(webhook.encrypted_secret)
        except DecryptionFailed:  # the key was another one
            secret = new_secret()
            await change(number, RotateSecret(encrypted_secret=box.encrypt(secret), previous_until=datetime.now(UTC)))
        sink.secrets.append(secret)

    slack, shown = f"{sink.url}/slack", f"{sink.url}/…"
    number = await told("slack", shown, "internal", box.encrypt(slack))
    await change(number, ChangeSubscription(target=shown, encrypted_secret=box.encrypt(slack)))
    # Where the operator's own relay is used, nobody else is sent anything.
    if sink.smtp_url:
        await told("email", MAILBOX, "public", None)

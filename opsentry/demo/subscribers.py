"""Who is told in the demo: a webhook, Slack and an e-mail address, all of them at the sink."""

from datetime import UTC, datetime

from opsentry.demo.seed import META, Story
from opsentry.demo.sink import Sink
from opsentry.domain import subscription
from opsentry.domain.decider import TransitionRefused
from opsentry.domain.subscription import (
    ChangeSubscription,
    CreateSubscription,
    RotateSecret,
    Subscription,
    SubscriptionCommand,
)
from opsentry.notifications.sealing import CannotOpen, Sealing
from opsentry.notifications.signing import new_secret
from opsentry.wiring import Core

MAILBOX = "ops@acme.example"


async def seed(parts: Core, tenant_id: int, sink: Sink) -> None:
    """Give the tenant its subscriptions, once, and see that they lead to the sink of this run.

    One that was removed stays so.
    """
    sealing, story = Sealing(parts.settings.secret_keys), Story(parts, tenant_id)

    async def told(channel: str, target: str, audience: str, sealed: str | None) -> int:
        wanted = CreateSubscription(channel=channel, target=target, audience=audience, sealed=sealed)
        claim = f"demo:subscription:{channel}"
        return await story.tell(subscription.DECIDER, claim, [(wanted, datetime.now(UTC))])

    async def change(number: int, command: SubscriptionCommand) -> Subscription | None:
        try:
            executed = await parts.commands.execute(subscription.DECIDER, tenant_id, number, command, META)
        except TransitionRefused:
            return None
        return executed.state

    hook = f"{sink.url}/hook"
    number = await told("webhook", hook, "internal", sealing.seal(new_secret()))
    webhook = await change(number, ChangeSubscription(target=hook))
    if webhook is not None and webhook.sealed is not None:
        try:
            secret = sealing.open(webhook.sealed)
        except CannotOpen:  # the key was another one
            secret = new_secret()
            await change(number, RotateSecret(sealed=sealing.seal(secret), previous_until=datetime.now(UTC)))
        sink.secrets.append(secret)

    slack, shown = f"{sink.url}/slack", f"{sink.url}/…"
    number = await told("slack", shown, "internal", sealing.seal(slack))
    await change(number, ChangeSubscription(target=shown, sealed=sealing.seal(slack)))
    # Where the operator's own relay is used, nobody else is sent anything.
    if sink.smtp_url:
        await told("email", MAILBOX, "public", None)

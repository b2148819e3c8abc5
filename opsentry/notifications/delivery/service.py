"""The sender: takes what is due, sends it with no transaction open, and records what came of it.

Any number of senders share the work. One takes an *endpoint* for as long as a lease lasts, sends what is due there, and
gives it back. What is recorded late, by a sender that stood still while another took over, is refused. A sender that
dies leaves its leases to run out, and what was under way is sent again with the same ids.

Each channel has a dispatcher and sockets of its own: a mail relay that hangs holds up no webhook.
"""

import asyncio
from collections.abc import Mapping

from opsentry.events.command_handler import CommandHandler
from opsentry.infrastructure.encryption import SecretBox
from opsentry.infrastructure.periodic import log_failure, run_forever
from opsentry.infrastructure.postgres import Database
from opsentry.notifications.channel import Channel
from opsentry.notifications.delivery import enqueue
from opsentry.notifications.delivery.dispatcher import POLL_SECONDS, TIMEOUT, Dispatcher
from opsentry.notifications.delivery.endpoint_worker import EndpointWorker
from opsentry.notifications.messages.builder import MessageBuilder

LEASE_SECONDS = 60.0
# The intents of so many tenants are taken over at once.
_TENANTS = 10


class DeliveryService:
    """Sends what is due, until stopped.

    Args:
        database: Where intents and deliveries are.
        commands: Records that a subscription is disabled.
        composer: Says what things looked like.
        channels: By name.
        sealing: Opens targets and secrets.
        sockets: So many messages are under way at once on each channel.
        burst: Changes of one thing within so many seconds become one message.
        lease: For so many seconds an endpoint is taken.
    """

    def __init__(
        self,
        database: Database,
        commands: CommandHandler,
        composer: MessageBuilder,
        channels: Mapping[str, Channel],
        sealing: SecretBox,
        *,
        sockets: int = 256,
        burst: float = 2.0,
        lease: float = LEASE_SECONDS,
    ) -> None:
        self._database = database
        self._burst = burst
        self._dispatchers = []
        for channel in channels.values():
            at_once = min(sockets, channel.max_concurrency or sockets)
            # While what came of some is recorded, as many others are sent.
            courier = EndpointWorker(channel, composer, sealing, 2 * at_once)
            self._dispatchers.append(
                Dispatcher(database, commands, channel, courier, sockets=at_once, burst=burst, lease=lease)
            )
        self._taking_over: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send, on the running loop."""
        self._taking_over = asyncio.create_task(run_forever(self._take_over_all, pause_seconds=POLL_SECONDS))
        for dispatcher in self._dispatchers:
            dispatcher.start()

    async def stop(self) -> None:
        """Take nothing more, let what is under way end, record it, and give back what is leased; bounded in time."""
        if self._taking_over is not None:
            self._taking_over.cancel()
            stopping = (dispatcher.stop() for dispatcher in self._dispatchers)
            await asyncio.gather(self._taking_over, *stopping, return_exceptions=True)

    async def _take_over_all(self) -> None:
        after = lanes = 0
        at_once = _TENANTS
        while True:
            async with self._database.connection(TIMEOUT) as connection:
                found = await enqueue.tenants_with_backlog(connection, after, at_once)
            if found:
                try:
                    async with self._database.transaction(TIMEOUT) as connection:
                        lanes += await enqueue.enqueue_intents(connection, found, self._burst)
                except Exception as error:  # noqa: BLE001 - each alone then, and past the one where it fails
                    log_failure("enqueue", error, tenant_ids=found)
                    if len(found) == 1:
                        after = found[-1]
                    at_once = 1
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                at_once = min(_TENANTS, 2 * at_once)
                for dispatcher in self._dispatchers:
                    dispatcher.look()
                after = found[-1]
                continue
            # All were gone through. What is left, if nothing new came of it, others are at.
            if not lanes:
                await asyncio.sleep(POLL_SECONDS)
            after = lanes = 0

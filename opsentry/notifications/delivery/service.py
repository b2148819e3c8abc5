"""The delivery service: enqueue intents, and send due deliveries without holding a transaction open.

Any number of processes share the work. A process leases an *endpoint*, attempts its due deliveries, records the
results and releases it. A process that paused beyond its lease cannot record any more. If a process dies, its leases
expire, and another process repeats the attempts with the same message ids.

Each channel has its own dispatcher and its own concurrency, so a hanging mail relay delays no webhook.
"""

import asyncio
from collections.abc import Mapping

from opsentry.infrastructure.encryption import SecretBox
from opsentry.infrastructure.periodic import log_failure, run_forever
from opsentry.infrastructure.postgres import Database
from opsentry.notifications.channel import Channel
from opsentry.notifications.delivery import enqueue
from opsentry.notifications.delivery.disabling import SubscriptionDisabler
from opsentry.notifications.delivery.dispatcher import POLL_SECONDS, Dispatcher
from opsentry.notifications.delivery.endpoint_worker import EndpointWorker
from opsentry.notifications.delivery.ordering import TRANSACTION_TIMEOUT_SECONDS
from opsentry.notifications.messages.builder import MessageBuilder

LEASE_SECONDS = 60.0
# The limit of tenants whose intents are enqueued in one transaction.
_TENANT_BATCH = 10


class DeliveryService:
    """Enqueue intents and send due deliveries until stopped.

    Args:
        database: The database with intents and deliveries.
        subscriptions: Disables subscriptions whose endpoint is gone or fails for days.
        message_builder: Builds the messages.
        channels: The channels by name.
        secret_box: Decrypts targets and signing secrets.
        max_concurrent_deliveries: The limit of messages in flight on each channel.
        coalesce_seconds: Changes of a stream within this time share one message.
        lease_seconds: The duration of a lease of an endpoint.
    """

    def __init__(
        self,
        database: Database,
        subscriptions: SubscriptionDisabler,
        message_builder: MessageBuilder,
        channels: Mapping[str, Channel],
        secret_box: SecretBox,
        *,
        max_concurrent_deliveries: int = 256,
        coalesce_seconds: float = 2.0,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._database = database
        self._coalesce_seconds = coalesce_seconds
        self._dispatchers = []
        for channel in channels.values():
            max_concurrency = min(max_concurrent_deliveries, channel.max_concurrency or max_concurrent_deliveries)
            # Twice as many, so that others are sent while results are being recorded.
            worker = EndpointWorker(channel, message_builder, secret_box, 2 * max_concurrency)
            self._dispatchers.append(
                Dispatcher(
                    database,
                    subscriptions,
                    channel,
                    worker,
                    max_concurrent_deliveries=max_concurrency,
                    coalesce_seconds=coalesce_seconds,
                    lease_seconds=lease_seconds,
                )
            )
        self._enqueuing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start enqueuing and sending, on the running event loop."""
        self._enqueuing = asyncio.create_task(run_forever(self._enqueue_repeatedly, pause_seconds=POLL_SECONDS))
        for dispatcher in self._dispatchers:
            dispatcher.start()

    async def stop(self) -> None:
        """Lease nothing more, let attempts end, record their results and release the endpoints, in bounded time."""
        if self._enqueuing is not None:
            self._enqueuing.cancel()
            stopping = (dispatcher.stop() for dispatcher in self._dispatchers)
            await asyncio.gather(self._enqueuing, *stopping, return_exceptions=True)

    async def _enqueue_repeatedly(self) -> None:
        """Go through the tenants with an outbox backlog in order of their ids, again and again."""
        last_tenant_id = enqueued = 0
        batch = _TENANT_BATCH
        while True:
            async with self._database.connection(TRANSACTION_TIMEOUT_SECONDS) as connection:
                tenant_ids = await enqueue.tenants_with_backlog(connection, last_tenant_id, batch)
            if not tenant_ids:
                # Without any progress in a whole round, other senders hold the rest.
                if not enqueued:
                    await asyncio.sleep(POLL_SECONDS)
                last_tenant_id = enqueued = 0
                continue
            try:
                async with self._database.transaction(TRANSACTION_TIMEOUT_SECONDS) as connection:
                    enqueued += await enqueue.enqueue_intents(connection, tenant_ids, self._coalesce_seconds)
            except Exception as error:  # noqa: BLE001 - one tenant that fails must not block the others
                log_failure("enqueue_intents", error, tenant_ids=tenant_ids)
                # Each by itself then, and past the one that fails.
                if len(tenant_ids) == 1:
                    last_tenant_id = tenant_ids[-1]
                batch = 1
                await asyncio.sleep(POLL_SECONDS)
                continue
            batch = min(_TENANT_BATCH, 2 * batch)
            last_tenant_id = tenant_ids[-1]
            for dispatcher in self._dispatchers:
                dispatcher.wake()

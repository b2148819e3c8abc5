"""The dispatcher of one channel: lease available endpoints, and have an endpoint worker serve each.

Slow endpoints delay nobody. An endpoint starts with one message in flight; its concurrency doubles while it answers
well. Endpoints that have not proved themselves share at most half of the dispatcher's concurrency. While other tenants
have deliveries, no tenant takes more than its share.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from uuid import uuid4

import structlog

from opsentry.infrastructure.periodic import run_forever
from opsentry.infrastructure.postgres import Database
from opsentry.notifications.channel import Channel
from opsentry.notifications.delivery import leases
from opsentry.notifications.delivery.disabling import EndpointDisabler, SubscriptionDisabler
from opsentry.notifications.delivery.endpoint_worker import EndpointWorker
from opsentry.notifications.delivery.leases import DueDelivery, LeasedEndpoint
from opsentry.notifications.delivery.ordering import TRANSACTION_TIMEOUT_SECONDS
from opsentry.notifications.delivery.recorder import ResultRecorder
from opsentry.notifications.delivery.results import DeliveryResult
from opsentry.notifications.delivery.retry_policy import UNAVAILABLE_RETRY_SECONDS

_log = structlog.get_logger()

POLL_SECONDS = 0.5
# Attempts start only within this part of the lease. Each takes 30 s at most, so it ends before the lease does.
_START_WITHIN_LEASE = 0.4
# The limit of endpoints per lease transaction: the next ones are leased while these are served.
_LEASE_BATCH = 16
# The deliveries taken for an endpoint are this multiple of its concurrency.
_ROUNDS_PER_TURN = 16
# The grace periods of `stop`: for messages in flight, then for recording their results.
_STOP_SECONDS = 6.0
_RECORD_SECONDS = 2.0
# A query that skips many endpoints may be slow. If it exceeds this time and finds nothing, it is repeated only after
# the given multiple of its duration.
_SLOW_QUERY_SECONDS = 0.05
_SLOW_QUERY_PAUSE_FACTOR = 3


class Dispatcher:
    """Send due deliveries of one channel until stopped.

    Args:
        database: The database with the deliveries.
        subscriptions: Disables subscriptions whose endpoint is gone or fails for days.
        channel: The channel.
        worker: Serves the channel's endpoints.
        max_concurrent_deliveries: The limit of messages in flight.
        coalesce_seconds: Changes of a stream within this time share one message.
        lease_seconds: The duration of a lease.
    """

    def __init__(
        self,
        database: Database,
        subscriptions: SubscriptionDisabler,
        channel: Channel,
        worker: EndpointWorker,
        *,
        max_concurrent_deliveries: int,
        coalesce_seconds: float,
        lease_seconds: float,
    ) -> None:
        self._database = database
        self._channel = channel
        self._worker = worker
        self._max_concurrent_deliveries = max_concurrent_deliveries
        self._coalesce_seconds = coalesce_seconds
        self._lease_seconds = lease_seconds
        self._disabler = EndpointDisabler(database, subscriptions)
        self._recorder = ResultRecorder(database, coalesce_seconds, self._on_recorded, self._disabler.start_disabling)
        self._woken = asyncio.Event()
        # Each endpoint that is being served, with its messages in flight.
        self._serving: dict[asyncio.Task[None], tuple[LeasedEndpoint, int]] = {}
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start sending, on the running event loop."""
        self._loops = [
            asyncio.create_task(run_forever(loop, pause_seconds=POLL_SECONDS))
            for loop in (self._lease_repeatedly, self._recorder.run)
        ]

    def wake(self) -> None:
        """Look for due deliveries now instead of at the next poll."""
        self._woken.set()

    async def stop(self) -> None:
        """Lease nothing more, let attempts end, record their results and release the endpoints, in bounded time."""
        if not self._loops:
            return
        leasing, recording = self._loops
        self._worker.stop()
        leasing.cancel()
        try:
            # Anything slower is cancelled. Its lease expires by itself.
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await asyncio.gather(leasing, *self._serving, *self._disabler.tasks, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(_RECORD_SECONDS):
                    await self._recorder.wait_until_empty()
        finally:
            disabling = list(self._disabler.tasks)
            for task in (recording, *disabling):
                task.cancel()
            await asyncio.gather(recording, *self._serving, *disabling, return_exceptions=True)
            self._loops = []

    async def _lease_repeatedly(self) -> None:
        while True:
            self._woken.clear()
            started = time.monotonic()
            leased, has_skipped = await self._lease()
            if not leased:
                if has_skipped and (seconds := time.monotonic() - started) > _SLOW_QUERY_SECONDS:
                    await asyncio.sleep(min(POLL_SECONDS, _SLOW_QUERY_PAUSE_FACTOR * seconds))
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._woken.wait()

    async def _lease(self) -> tuple[int, bool]:
        """Lease endpoints and start serving them; return their number, and whether others were skipped for fairness."""
        in_flight, unproven = self._count_in_flight()
        free, half = self._max_concurrent_deliveries - in_flight.total(), self._max_concurrent_deliveries // 2
        per_endpoint = self._worker.max_concurrency
        if free < per_endpoint or self._recorder.is_full:
            return 0, False
        # If all messages share one resource of ours, a slow response says nothing about its endpoint.
        distrusts_unproven = self._channel.max_concurrency is None
        proven_only = distrusts_unproven and unproven.total() >= half
        # One share is always left for a further tenant.
        shares = len(in_flight) + 1
        skipped_tenants = [
            tenant_id
            for tenant_id, count in in_flight.items()
            if count >= max(per_endpoint, self._max_concurrent_deliveries // shares)
        ]
        proven_only_tenants = [
            tenant_id for tenant_id, count in unproven.items() if distrusts_unproven and count >= max(1, half // shares)
        ]
        async with self._database.transaction(TRANSACTION_TIMEOUT_SECONDS) as connection:
            started = time.monotonic()
            leased = await leases.lease_endpoints(
                connection,
                uuid4(),
                self._channel.name,
                lease_seconds=self._lease_seconds,
                limit=min(_LEASE_BATCH, free // per_endpoint),
                skipped_tenants=skipped_tenants,
                proven_only=proven_only,
                proven_only_tenants=proven_only_tenants,
            )
            due = await leases.take_deliveries(
                connection, [(endpoint, _turn_limit(endpoint)) for endpoint in leased], self._coalesce_seconds
            )
        by_endpoint: dict[tuple[int, int], list[DueDelivery]] = {}
        for delivery in due:
            by_endpoint.setdefault((delivery.tenant_id, delivery.subscription_id), []).append(delivery)
        start_until = started + self._lease_seconds * _START_WITHIN_LEASE
        for endpoint in leased:
            deliveries = by_endpoint.get((endpoint.tenant_id, endpoint.subscription_id), [])
            task = asyncio.create_task(self._serve(endpoint, deliveries, start_until))
            self._serving[task] = endpoint, min(endpoint.health.concurrency, per_endpoint, len(deliveries))
            task.add_done_callback(self._on_served)
        return len(leased), bool(skipped_tenants or proven_only_tenants or proven_only)

    def _count_in_flight(self) -> tuple[Counter[int], Counter[int]]:
        """Return two counts for each tenant: messages in flight, and endpoints being served that are unproven."""
        in_flight: Counter[int] = Counter()
        unproven: Counter[int] = Counter()
        for endpoint, count in self._serving.values():
            in_flight[endpoint.tenant_id] += count
            unproven[endpoint.tenant_id] += endpoint.health.concurrency == 1
        return in_flight, unproven

    async def _serve(self, endpoint: LeasedEndpoint, due: Sequence[DueDelivery], start_until: float) -> None:
        """Serve an endpoint and release it. If it says that it is gone, disable its subscription first."""
        gone: list[DeliveryResult] = []

        def on_result(result: DeliveryResult) -> None:
            if result.state == "disabled":
                gone.append(result)
            else:
                self._recorder.add(endpoint, [result])

        release = await self._worker.serve(endpoint, due, start_until, on_result)
        if gone and not await self._disabler.disable_gone(endpoint):
            # The subscription has another endpoint by now, or could not be disabled yet.
            gone = [result._replace(state="pending", delay=UNAVAILABLE_RETRY_SECONDS) for result in gone]
            health = release.health._replace(backoff_seconds=UNAVAILABLE_RETRY_SECONDS)
            release = release._replace(health=health, is_disabled=False)
        self._recorder.add(endpoint, gone, release)

    def _on_served(self, task: "asyncio.Task[None]") -> None:
        endpoint, _ = self._serving.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect. The lease expires, and another sender tries again, perhaps with newer code.
            _log.error(
                "endpoint_worker_failed",
                tenant_id=endpoint.tenant_id,
                subscription_id=endpoint.subscription_id,
                exc_info=error,
            )
        self.wake()

    def _on_recorded(self, count: int) -> None:
        self._worker.release_slots(count)
        self.wake()


def _turn_limit(endpoint: LeasedEndpoint) -> int:
    """Return the limit of deliveries in one turn: a single one for a probed endpoint."""
    return 1 if endpoint.health.is_probed else endpoint.health.concurrency * _ROUNDS_PER_TURN

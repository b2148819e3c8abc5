"""Record results in batches while the next messages are being sent."""

import asyncio
from collections.abc import Callable, Sequence
from uuid import UUID

import structlog

from opsentry.infrastructure.postgres import Database, is_transient
from opsentry.notifications.delivery import results
from opsentry.notifications.delivery.leases import LeasedEndpoint
from opsentry.notifications.delivery.ordering import TRANSACTION_TIMEOUT_SECONDS
from opsentry.notifications.delivery.results import DeliveryResult, EndpointResults, Release

_log = structlog.get_logger()

# The limit of entries in one transaction, and of those that wait for one before nothing more is leased.
MAX_BATCH = 500
# Results are collected for this time, so that more of them share a transaction.
_COLLECT_SECONDS = 0.01
# The pause of an endpoint with a result that could not be recorded. The message is then sent again.
_UNRECORDED_BACKOFF_SECONDS = 60.0


class ResultRecorder:
    """Record results of leased endpoints, and release the endpoints.

    Args:
        database: The database with the deliveries.
        coalesce_seconds: See `ordering.schedule_oldest`.
        on_recorded: Called with the number of results that were recorded or given up.
        on_failing: Called with each released endpoint that is to be disabled.
    """

    def __init__(
        self,
        database: Database,
        coalesce_seconds: float,
        on_recorded: Callable[[int], None],
        on_failing: Callable[[LeasedEndpoint], None],
    ) -> None:
        self._database = database
        self._coalesce_seconds = coalesce_seconds
        self._on_recorded = on_recorded
        self._on_failing = on_failing
        self._entries: list[EndpointResults] = []
        # Leased endpoints with a result that could not be recorded.
        self._unrecorded: set[tuple[int, int, UUID]] = set()
        self._has_entries = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def is_full(self) -> bool:
        """Return whether so much waits to be recorded that nothing more should be leased."""
        return len(self._entries) >= MAX_BATCH

    def add(
        self, endpoint: LeasedEndpoint, delivery_results: Sequence[DeliveryResult], release: Release | None = None
    ) -> None:
        """Queue results to be recorded, and the endpoint to be released with them."""
        self._entries.append(EndpointResults(endpoint, delivery_results, release))
        self._is_empty.clear()
        self._has_entries.set()

    async def wait_until_empty(self) -> None:
        """Wait until everything is recorded."""
        await self._is_empty.wait()

    async def run(self) -> None:
        """Record queued results until cancelled."""
        while True:
            if not self._entries:
                self._has_entries.clear()
                await self._has_entries.wait()
            await asyncio.sleep(_COLLECT_SECONDS)
            batch = self._entries[:MAX_BATCH]
            try:
                await self._record(batch)
            except Exception as error:
                if is_transient(error):
                    raise
                # One entry that cannot be recorded must not block the others.
                _log.exception("batch_recording_failed", entries=len(batch))
                await self._record_separately(batch)

    async def _record_separately(self, batch: Sequence[EndpointResults]) -> None:
        for entry in batch:
            try:
                await self._record([entry])
            except Exception as error:
                if is_transient(error):
                    raise
                endpoint = entry.endpoint
                self._unrecorded.add(_lease_key(endpoint))
                _log.exception(
                    "delivery_recording_failed",
                    tenant_id=endpoint.tenant_id,
                    subscription_id=endpoint.subscription_id,
                )
                self._remove([entry])

    async def _record(self, batch: Sequence[EndpointResults]) -> None:
        async with self._database.transaction(TRANSACTION_TIMEOUT_SECONDS) as connection:
            failing = await results.record_results(
                connection, [self._with_backoff(entry) for entry in batch], self._coalesce_seconds
            )
        self._remove(batch)
        for endpoint in failing:
            self._on_failing(endpoint)

    def _with_backoff(self, entry: EndpointResults) -> EndpointResults:
        """Return the entry, with a backoff if a result of the endpoint could not be recorded."""
        if entry.release is None or _lease_key(entry.endpoint) not in self._unrecorded:
            return entry
        health = entry.release.health._replace(backoff_seconds=_UNRECORDED_BACKOFF_SECONDS)
        return entry._replace(release=entry.release._replace(health=health))

    def _remove(self, batch: Sequence[EndpointResults]) -> None:
        """Remove entries, which are the oldest."""
        del self._entries[: len(batch)]
        self._unrecorded -= {_lease_key(entry.endpoint) for entry in batch if entry.release is not None}
        if not self._entries:
            self._is_empty.set()
        self._on_recorded(sum(len(entry.results) for entry in batch))


def _lease_key(endpoint: LeasedEndpoint) -> tuple[int, int, UUID]:
    return endpoint.tenant_id, endpoint.subscription_id, endpoint.lease

"""Catch up projections that commands left behind."""

import asyncio
import random
from contextlib import suppress

import structlog

from opsentry.application.application import Application
from opsentry.infrastructure.periodic import log_failure

# A projection may lag by a second. Two polls a second find it in time without a hint from the command.
POLL_INTERVAL_SECONDS = 0.5
# While one tenant waits for the database, others make progress.
CONCURRENT_TENANTS = 4
PAGE_SIZE_TENANTS = 1_000
# After this time the worker looks for idle sessions that block the pass with their locks.
EVICTION_AFTER_SECONDS = 5.0

_log = structlog.get_logger()


class CatchUp:
    """Catch up the projections of all tenants that lag, because a command's process died or ran out of time."""

    def __init__(self, app: Application) -> None:
        self._projector = app.projector

    async def catch_up(self) -> None:
        """Go through the lagging tenants once, in random order."""
        after = 0
        while lagging := await self._projector.lagging_tenants(PAGE_SIZE_TENANTS, after):
            after = lagging[-1]
            is_last_page = len(lagging) < PAGE_SIZE_TENANTS
            # Workers that visit tenants in different orders seldom derive the same rows.
            random.shuffle(lagging)
            await asyncio.gather(*(self._catch_up_queue(lagging) for _ in range(CONCURRENT_TENANTS)))
            if is_last_page:
                return

    async def _catch_up_queue(self, queue: list[int]) -> None:
        while queue:
            tenant_id = queue.pop()
            try:
                await self._catch_up_tenant(tenant_id)
            except Exception as error:  # noqa: BLE001 - a failure of one tenant must not stop the others
                log_failure("catch_up", error, tenant_id=tenant_id)

    async def _catch_up_tenant(self, tenant_id: int) -> None:
        running_seconds = self._projector.running_seconds(tenant_id)
        if running_seconds is None:
            # A longer pass continues in the background while this task serves other tenants.
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_INTERVAL_SECONDS):
                    await self._projector.catch_up(tenant_id, 0)
        elif running_seconds > EVICTION_AFTER_SECONDS:
            for pid in await self._projector.terminate_stalled_sessions():
                _log.warning("idle_session_evicted", pid=pid)

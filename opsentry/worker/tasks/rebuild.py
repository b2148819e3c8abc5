"""Rebuild projections whose version was raised, or that an operator wants rebuilt, without haste."""

import asyncio
import random
import time

import structlog

from opsentry.application.application import Application
from opsentry.infrastructure.periodic import log_failure
from opsentry.projections.engine import management
from opsentry.projections.engine.rebuild import Rebuilder

POLL_INTERVAL_SECONDS = 1.0
BATCH_SIZE_TENANTS = 20
CHUNK_SIZE_EVENTS = 200
REGISTRATION_TIMEOUT_SECONDS = 60.0
# Older code that still runs may add rows to a rebuilt tenant. A second rebuild waits until those rows are this old.
SETTLE_SECONDS = 300.0
# Rest per second of work: commands and reads come first.
REST_RATIO = 3.0
MAX_REST_SECONDS = 2.0

_log = structlog.get_logger()


class Rebuild:
    """Rebuild tenants one by one in the background. `opsentry projections rebuild` does the same at full speed."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._projections = app.projector.projections
        self._rebuilder = Rebuilder(app.database, app.projector.projections)
        self._is_registered = False

    async def rebuild(self) -> None:
        """Rebuild a batch of tenants in random order."""
        if not self._is_registered:
            await self._register()
            self._is_registered = True
        throttle = _Throttle()
        tenant_ids = list(await self._rebuilder.pending_tenants(BATCH_SIZE_TENANTS, SETTLE_SECONDS))
        random.shuffle(tenant_ids)
        for tenant_id in tenant_ids:
            try:
                await self._rebuild_tenant(tenant_id, throttle)
            except Exception as error:  # noqa: BLE001 - a failure of one tenant must not stop the others
                log_failure("rebuild", error, tenant_id=tenant_id)

    async def _register(self) -> None:
        """Register the versions of this code, and retry halted projections, which new code may be able to apply."""
        async with self._app.database.connection(REGISTRATION_TIMEOUT_SECONDS) as connection:
            to_rebuild = await management.register(connection, self._projections)
            await management.retry_halted(connection, [projection.name for projection in self._projections])
            await management.enqueue_lagging_tenants(connection)
        if to_rebuild:
            _log.info("rebuild_started", projections=to_rebuild)

    async def _rebuild_tenant(self, tenant_id: int, throttle: "_Throttle") -> None:
        rebuilt = await self._rebuilder.rebuild(tenant_id, between_chunks=throttle, chunk_events=CHUNK_SIZE_EVENTS)
        if rebuilt:
            _log.info("rebuild_finished", tenant_id=tenant_id, projections=rebuilt)
        await throttle()


class _Throttle:
    """Sleep in proportion to the time worked since the last sleep."""

    def __init__(self) -> None:
        self._woke_at = time.monotonic()

    async def __call__(self) -> None:
        await asyncio.sleep(min(MAX_REST_SECONDS, REST_RATIO * (time.monotonic() - self._woke_at)))
        self._woke_at = time.monotonic()

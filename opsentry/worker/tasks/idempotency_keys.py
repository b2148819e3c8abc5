"""Delete idempotency keys after their time to live."""

from opsentry.application.application import Application
from opsentry.application.retention import delete_expired_idempotency_keys

POLL_INTERVAL_SECONDS = 60.0
BATCH_SIZE_KEYS = 5_000
SECONDS_PER_HOUR = 3600


class IdempotencyKeys:
    """Delete the expired keys of all tenants."""

    def __init__(self, app: Application, ttl_hours: int) -> None:
        self._app = app
        self._ttl_seconds = SECONDS_PER_HOUR * ttl_hours

    async def delete_expired_keys(self) -> None:
        """Delete expired keys in batches, each in a transaction of its own."""
        deleted = BATCH_SIZE_KEYS
        while deleted == BATCH_SIZE_KEYS:
            deleted = await delete_expired_idempotency_keys(self._app, self._ttl_seconds, BATCH_SIZE_KEYS)

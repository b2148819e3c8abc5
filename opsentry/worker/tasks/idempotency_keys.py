"""Delete idempotency keys after their time to live."""

from opsentry.events.store import prune_idempotency_keys
from opsentry.infrastructure.postgres import Database

POLL_INTERVAL_SECONDS = 60.0
BATCH_SIZE_KEYS = 5_000
BATCH_TIMEOUT_SECONDS = 60.0
SECONDS_PER_HOUR = 3600


class IdempotencyKeys:
    """Delete the expired keys of all tenants."""

    def __init__(self, database: Database, ttl_hours: int) -> None:
        self._database = database
        self._ttl_seconds = SECONDS_PER_HOUR * ttl_hours

    async def delete_expired_keys(self) -> None:
        """Delete expired keys in batches, each in a transaction of its own."""
        deleted = BATCH_SIZE_KEYS
        while deleted == BATCH_SIZE_KEYS:
            async with self._database.connection(BATCH_TIMEOUT_SECONDS) as connection:
                deleted = await prune_idempotency_keys(connection, self._ttl_seconds, BATCH_SIZE_KEYS)

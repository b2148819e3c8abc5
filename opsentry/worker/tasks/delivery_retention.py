"""Delete final deliveries after their retention time."""

from opsentry.infrastructure.postgres import Database
from opsentry.notifications.delivery.enqueue import prune_deliveries

POLL_INTERVAL_SECONDS = 60.0
BATCH_SIZE_DELIVERIES = 5_000
BATCH_TIMEOUT_SECONDS = 60.0


class DeliveryRetention:
    """Delete the old final deliveries of all tenants, with their attempts."""

    def __init__(self, database: Database, retention_days: int) -> None:
        self._database = database
        self._retention_days = retention_days

    async def delete_old_deliveries(self) -> None:
        """Delete old deliveries in batches, each in a transaction of its own."""
        deleted = BATCH_SIZE_DELIVERIES
        while deleted == BATCH_SIZE_DELIVERIES:
            async with self._database.transaction(BATCH_TIMEOUT_SECONDS) as connection:
                deleted = await prune_deliveries(connection, self._retention_days, BATCH_SIZE_DELIVERIES)

"""Delete final deliveries after their retention time."""

from opsentry.application.application import Application
from opsentry.application.retention import delete_old_deliveries

POLL_INTERVAL_SECONDS = 60.0
BATCH_SIZE_DELIVERIES = 5_000


class DeliveryRetention:
    """Delete the old final deliveries of all tenants, with their attempts."""

    def __init__(self, app: Application, retention_days: int) -> None:
        self._app = app
        self._retention_days = retention_days

    async def delete_old_deliveries(self) -> None:
        """Delete old deliveries in batches, each in a transaction of its own."""
        deleted = BATCH_SIZE_DELIVERIES
        while deleted == BATCH_SIZE_DELIVERIES:
            deleted = await delete_old_deliveries(self._app, self._retention_days, BATCH_SIZE_DELIVERIES)

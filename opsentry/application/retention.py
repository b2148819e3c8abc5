"""Delete rows of all tenants after their retention time. Ledgers are never deleted."""

from opsentry.application.application import Application
from opsentry.events.store import prune_idempotency_keys
from opsentry.notifications.delivery.enqueue import prune_deliveries

DELETION_TIMEOUT_SECONDS = 60.0


async def delete_expired_idempotency_keys(app: Application, ttl_seconds: int, limit: int) -> int:
    """Delete at most `limit` idempotency keys that are older than `ttl_seconds`; return their number.

    Raises:
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection(DELETION_TIMEOUT_SECONDS) as connection:
        return await prune_idempotency_keys(connection, ttl_seconds, limit)


async def delete_old_deliveries(app: Application, retention_days: float, limit: int) -> int:
    """Delete at most `limit` deliveries that became final more than `retention_days` ago; return their number.

    Raises:
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.transaction(DELETION_TIMEOUT_SECONDS) as connection:
        return await prune_deliveries(connection, retention_days, limit)

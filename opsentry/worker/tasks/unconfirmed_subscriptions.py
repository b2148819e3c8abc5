"""Remove subscriptions that nobody confirmed in time, and erase their addresses."""

from collections.abc import Sequence

from opsentry.application.application import Application
from opsentry.domain import subscription
from opsentry.domain.redaction import erasable_versions
from opsentry.domain.subscription import CONFIRMATION_DAYS, ExpireSubscription, Subscription
from opsentry.events.codec import RecordedEvent, history_entries
from opsentry.projections.subscriptions import FIRST_UNCONFIRMED, select_unconfirmed
from opsentry.worker.scheduler import Scheduler

POLL_INTERVAL_SECONDS = 60.0
BATCH_SIZE_SUBSCRIPTIONS = 200
SECONDS_PER_DAY = 86_400.0


class UnconfirmedSubscriptions:
    """Remove the unconfirmed subscriptions of all tenants after `CONFIRMATION_DAYS`."""

    def __init__(self, app: Application, scheduler: Scheduler) -> None:
        self._app = app
        self._scheduler = scheduler

    async def remove_unconfirmed(self) -> None:
        """Remove unconfirmed subscriptions, oldest first."""
        after = FIRST_UNCONFIRMED
        while True:
            async with self._app.database.connection() as connection:
                rows = await select_unconfirmed(
                    connection, SECONDS_PER_DAY * CONFIRMATION_DAYS, BATCH_SIZE_SUBSCRIPTIONS, after
                )
            for row in rows:
                await self._scheduler.run(
                    "remove_unconfirmed", subscription.DECIDER, row.tenant_id, row.subscription_id, _expire
                )
            if len(rows) < BATCH_SIZE_SUBSCRIPTIONS:
                return
            after = rows[-1]  # the next batch begins after rows that could not be removed


def _expire(_: Subscription, history: Sequence[RecordedEvent]) -> ExpireSubscription:
    return ExpireSubscription(versions=erasable_versions(history_entries(history)))

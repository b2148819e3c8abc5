"""Remind subscribers of maintenance windows before their start."""

from opsentry.application.application import Application
from opsentry.domain import maintenance
from opsentry.domain.maintenance import RemindMaintenance
from opsentry.projections.maintenance import select_windows_to_remind
from opsentry.worker.scheduler import Scheduler

POLL_INTERVAL_SECONDS = 5.0
BATCH_SIZE_WINDOWS = 200
SECONDS_PER_MINUTE = 60.0


class MaintenanceReminders:
    """Append a reminder to each window that starts soon.

    Args:
        app: The application.
        scheduler: Runs the commands.
        lead_minutes: Minutes between a reminder and the start of its window; 0: no reminders.
    """

    def __init__(self, app: Application, scheduler: Scheduler, lead_minutes: int) -> None:
        self._app = app
        self._scheduler = scheduler
        self._lead_seconds = SECONDS_PER_MINUTE * lead_minutes

    async def send_reminders(self) -> None:
        """Remind of a batch of windows, in the order of their start."""
        if not self._lead_seconds:
            return
        async with self._app.database.connection() as connection:
            rows = await select_windows_to_remind(connection, self._lead_seconds, BATCH_SIZE_WINDOWS)
        for row in rows:
            await self._scheduler.run(
                "send_reminders", maintenance.DECIDER, row["tenant_id"], row["maintenance_id"], RemindMaintenance()
            )

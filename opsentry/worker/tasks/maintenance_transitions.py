"""Start and complete maintenance windows on time."""

from collections.abc import Callable, Mapping

from opsentry.application.application import Application
from opsentry.domain import maintenance
from opsentry.domain.maintenance import CompleteMaintenance, MaintenanceCommand, StartMaintenance
from opsentry.projections.maintenance import select_due_windows
from opsentry.worker.scheduler import Scheduler

POLL_INTERVAL_SECONDS = 0.5
# A window that is due within this time gets a wake-up of its own, at its exact time.
HORIZON_SECONDS = 2.0
BATCH_SIZE_WINDOWS = 200

_COMMAND_BY_STATUS: Mapping[str, MaintenanceCommand] = {
    "scheduled": StartMaintenance(),
    "active": CompleteMaintenance(),
}


class MaintenanceTransitions:
    """Start and complete the due windows of all tenants.

    Args:
        app: The application.
        scheduler: Runs the commands.
        wake_up: Called with seconds and a key, to run this task again after that time. A second call with the same key
            replaces the first.
    """

    def __init__(self, app: Application, scheduler: Scheduler, wake_up: Callable[[float, str], None]) -> None:
        self._app = app
        self._scheduler = scheduler
        self._wake_up = wake_up

    async def move_due_windows(self) -> None:
        """Move a batch of due windows, and ask for a wake-up at the time of each upcoming one."""
        async with self._app.database.connection() as connection:
            rows = await select_due_windows(connection, HORIZON_SECONDS, BATCH_SIZE_WINDOWS)
        for row in rows:
            if row["seconds"] > 0:
                self._wake_up(row["seconds"], row["transition_due_at"].isoformat())
                continue
            await self._scheduler.run(
                "move_due_windows",
                maintenance.DECIDER,
                row["tenant_id"],
                row["maintenance_id"],
                _COMMAND_BY_STATUS[row["status"]],
            )
        if len(rows) == BATCH_SIZE_WINDOWS and rows[-1]["seconds"] <= 0:
            self._wake_up(0, "next batch")

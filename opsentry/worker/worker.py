"""Run the periodic tasks of a worker. The database says what is due; APScheduler only keeps time."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from apscheduler.executors.asyncio import AsyncIOExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from opsentry.application.application import Application
from opsentry.infrastructure.periodic import run_logged
from opsentry.worker.scheduler import Scheduler
from opsentry.worker.tasks import (
    catch_up,
    delivery_retention,
    idempotency_keys,
    maintenance_reminders,
    maintenance_transitions,
    rebuild,
    unconfirmed_subscriptions,
)

# A wake-up that comes early by the database's clock asks for another one while it still runs.
_MAX_OVERLAPPING_WAKE_UPS = 10


class PeriodicTask(NamedTuple):
    """A task and the seconds between its runs."""

    run: Callable[[], Awaitable[None]]
    interval_seconds: float


class Worker:
    """Run all periodic tasks until stopped.

    Several workers may run without a leader. The lock of a checkpoint applies each event once. Of several commands
    for one version of a stream, one succeeds.

    Args:
        app: The application.
        idempotency_key_ttl_hours: Hours for which an idempotency key is kept.
        delivery_retention_days: Days for which final deliveries are kept.
        maintenance_reminder_minutes: Minutes between a reminder and the start of its window; 0: no reminders.
        heartbeat: File to touch after each round that reached the database.
    """

    def __init__(
        self,
        app: Application,
        *,
        idempotency_key_ttl_hours: int = 48,
        delivery_retention_days: int = 90,
        maintenance_reminder_minutes: int = 0,
        heartbeat: Path | None = None,
    ) -> None:
        self._heartbeat = heartbeat
        # A late run finds everything that is due by then, so a missed one needs no repetition.
        self._jobs = AsyncIOScheduler(
            executors={"default": AsyncIOExecutor()},
            job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1},
            timezone=UTC,
        )
        scheduler = Scheduler(app)
        self._transitions = maintenance_transitions.MaintenanceTransitions(app, scheduler, self._wake_up)
        projections = catch_up.CatchUp(app)
        rebuilds = rebuild.Rebuild(app)
        reminders = maintenance_reminders.MaintenanceReminders(app, scheduler, maintenance_reminder_minutes)
        keys = idempotency_keys.IdempotencyKeys(app, idempotency_key_ttl_hours)
        deliveries = delivery_retention.DeliveryRetention(app, delivery_retention_days)
        unconfirmed = unconfirmed_subscriptions.UnconfirmedSubscriptions(app, scheduler)
        self._tasks = (
            PeriodicTask(projections.catch_up, catch_up.POLL_INTERVAL_SECONDS),
            PeriodicTask(self.move_due_windows, maintenance_transitions.POLL_INTERVAL_SECONDS),
            PeriodicTask(reminders.send_reminders, maintenance_reminders.POLL_INTERVAL_SECONDS),
            PeriodicTask(rebuilds.rebuild, rebuild.POLL_INTERVAL_SECONDS),
            PeriodicTask(keys.delete_expired_keys, idempotency_keys.POLL_INTERVAL_SECONDS),
            PeriodicTask(deliveries.delete_old_deliveries, delivery_retention.POLL_INTERVAL_SECONDS),
            PeriodicTask(unconfirmed.remove_unconfirmed, unconfirmed_subscriptions.POLL_INTERVAL_SECONDS),
        )

    def start(self) -> None:
        """Start all tasks on the running event loop."""
        now = datetime.now(UTC)
        for task in self._tasks:
            self._jobs.add_job(
                _run_job,
                "interval",
                args=[task.run],
                id=getattr(task.run, "__name__", None),
                seconds=task.interval_seconds,
                next_run_time=now,
            )
        self._jobs.start()

    def stop(self) -> None:
        """Stop all tasks. Interrupted work stays due, for this worker's next start or for another worker."""
        self._jobs.shutdown(wait=False)

    async def move_due_windows(self) -> None:
        """Run the transitions of maintenance windows, then touch the heartbeat."""
        await self._transitions.move_due_windows()
        if self._heartbeat is not None:
            self._heartbeat.touch()

    def _wake_up(self, seconds: float, key: str) -> None:
        self._jobs.add_job(
            _run_job,
            "date",
            args=[self.move_due_windows],
            id=f"move_due_windows {key}",
            run_date=datetime.now(UTC) + timedelta(seconds=seconds),
            replace_existing=True,
            max_instances=_MAX_OVERLAPPING_WAKE_UPS,
        )


async def _run_job(task: Callable[[], Awaitable[None]]) -> None:
    try:
        await run_logged(task)
    except asyncio.CancelledError:
        return  # `stop` cancels running jobs; APScheduler would log that as their failure

"""The worker's loops. APScheduler only wakes them up: what has to be done stands in due rows."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import structlog
from apscheduler.executors.asyncio import AsyncIOExecutor
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from opsentry.domain import maintenance, subscription
from opsentry.domain.decider import Decider, Event, IllegalTransition
from opsentry.domain.maintenance import CompleteMaintenance, MaintenanceCommand, RemindMaintenance, StartMaintenance
from opsentry.domain.redaction import erasable_versions
from opsentry.domain.subscription import CONFIRMATION_DAYS, ExpireSubscription
from opsentry.events import store
from opsentry.events.codec import Actor, Meta, RecordedEvent, written
from opsentry.events.command_handler import CommandHandler, ConcurrencyConflict, StreamNotFound
from opsentry.infrastructure.periodic import run_logged
from opsentry.infrastructure.postgres import Database
from opsentry.notifications.delivery import enqueue
from opsentry.projections import maintenance as windows
from opsentry.projections import subscriptions
from opsentry.projections.engine import management
from opsentry.projections.engine.projector import Projector
from opsentry.projections.engine.rebuild import Rebuilder

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)

_log = structlog.get_logger()

# Whatever is left behind is found within this, with no hint from anybody: half of the second that a lag may last.
POLL_SECONDS = 0.5
REBUILD_SECONDS = 1.0
REMIND_SECONDS = 5.0
PRUNE_SECONDS = 60.0
_PRUNE_BATCH = 5_000
_HORIZON_SECONDS = 2.0
_BATCH = 200
# So many tenants are caught up at once: while one waits for the database, another folds.
_LANES = 4
_BEHIND = 1_000
# A rebuild nobody waits for folds so many events at once, and then rests three times as long as that took.
_CHUNK = 200
_REST = 3.0
_LONGEST_REST = 2.0
# So long rows rest that older code, still running, has added to after they were derived anew.
_SETTLE_SECONDS = 300.0
_REBUILD_BATCH = 20
# After a pass has been held up for so long it is looked at who holds it.
_PATIENCE = 5.0
_META = Meta(Actor("scheduler"))
_MOVES: dict[str, MaintenanceCommand] = {"scheduled": StartMaintenance(), "active": CompleteMaintenance()}


class Worker:
    """Catches projections up and rebuilds them, moves windows on, reminds of them, forgets what is old, until stopped.

    Workers need no leader: a checkpoint's lock makes an event be applied once, and the stream's version makes a
    window be started once, whoever tries.

    Args:
        database: Where the work stands.
        commands: Move windows on.
        projector: Catches projections up.
        keys_kept: Seconds that an idempotency key is kept.
        delivery_retention_days: Days that what came of a message is kept.
        maintenance_reminder_minutes: So long before its start people are reminded of a window; 0: never.
        heartbeat: A file to touch after each round.
    """

    def __init__(
        self,
        database: Database,
        commands: CommandHandler,
        projector: Projector,
        *,
        keys_kept: int = 48 * 3600,
        delivery_retention_days: int = 90,
        maintenance_reminder_minutes: int = 0,
        heartbeat: Path | None = None,
    ) -> None:
        self._keys_kept = keys_kept
        self._deliveries_days = delivery_retention_days
        self._lead = 60.0 * maintenance_reminder_minutes
        self._heartbeat = heartbeat
        self._database = database
        self._commands = commands
        self._projector = projector
        self._rebuilder = Rebuilder(database, projector.projections)
        self._begun = False
        # A wake-up that comes late is as good as one on time: it looks at what is due now.
        self._scheduler = AsyncIOScheduler(
            executors={"default": AsyncIOExecutor()},
            job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1},
            timezone=UTC,
        )

    def start(self) -> None:
        """Begin to work, on the running loop."""
        now = datetime.now(UTC)
        every = {
            self.catch_up: POLL_SECONDS,
            self.move_windows: POLL_SECONDS,
            self.remind_of_windows: REMIND_SECONDS,
            self.rebuild: REBUILD_SECONDS,
            self.prune_keys: PRUNE_SECONDS,
            self.prune_deliveries: PRUNE_SECONDS,
            self.forget_unconfirmed: PRUNE_SECONDS,
        }
        for task, seconds in every.items():
            self._scheduler.add_job(_job, "interval", args=[task], id=task.__name__, seconds=seconds, next_run_time=now)
        self._scheduler.start()

    def stop(self) -> None:
        """Stop waking up; what is under way is given up, and left to whoever looks next."""
        self._scheduler.shutdown(wait=False)

    async def catch_up(self) -> None:
        """Bring up to date what commands left behind: they died, or ran out of time."""
        after = 0
        while found := await self._projector.behind(_BEHIND, after):
            after = found[-1]
            # Workers that come to the same tenants in another order are less in each other's way.
            random.shuffle(found)
            await asyncio.gather(*(self._catch_up_some(found) for _ in range(_LANES)))
            if len(found) < _BEHIND:
                return

    async def _catch_up_some(self, waiting: list[int]) -> None:
        while waiting:
            await run_logged(self._catch_up_one, waiting.pop())

    async def _catch_up_one(self, tenant_id: int) -> None:
        # A pass that takes longer goes on by itself; it must not hold up the other tenants.
        if (held_up := self._projector.under_way(tenant_id)) is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._projector.catch_up(tenant_id, 0)
        elif held_up > _PATIENCE:
            for pid in await self._projector.evict():
                _log.warning("threw out a session that stood still with locks that others wait for", pid=pid)

    async def rebuild(self) -> None:
        """Derive anew what is to be, because a version was raised or somebody asked; at leisure."""
        if not self._begun:
            await self._begin()
            self._begun = True
        rest = _Rest()
        left = list(await self._rebuilder.left(_REBUILD_BATCH, _SETTLE_SECONDS))
        random.shuffle(left)
        for tenant_id in left:
            await run_logged(self._rebuild_one, tenant_id, rest)

    async def _begin(self) -> None:
        """Make known what this code derives, and let what stands still try again: what is new here may help it."""
        async with self._database.connection(PRUNE_SECONDS) as connection:
            to_do = await management.register(connection, self._projector.projections)
            await management.retry_halted(connection, [projection.name for projection in self._projector.projections])
            await management.note_who_lags(connection)
        if to_do:
            _log.info("projections that are new, or of a raised version, are derived anew", projections=to_do)

    async def _rebuild_one(self, tenant_id: int, rest: "_Rest") -> None:
        done = await self._rebuilder.rebuild(tenant_id, breathe=rest, chunk=_CHUNK)
        if done:
            _log.info("read models derived anew", tenant_id=tenant_id, projections=done)
        await rest()

    async def move_windows(self) -> None:
        """Start and complete what is due, and wake up again when the next one is."""
        async with self._database.connection() as connection:
            rows = await windows.select_due_windows(connection, _HORIZON_SECONDS, _BATCH)
        for row in rows:
            if row["seconds"] > 0:
                self._wake_up_in(row["seconds"], row["due_at"])
            else:
                # One by one: a tenant that is busy, or whose window cannot be read, must not hold up the others'.
                await run_logged(self._move_window, row["tenant_id"], row["maintenance_id"], _MOVES[row["status"]])
        if len(rows) == _BATCH and rows[-1]["seconds"] <= 0:
            self._wake_up_in(0, datetime.now(UTC))
        if self._heartbeat is not None:
            self._heartbeat.touch()

    async def remind_of_windows(self) -> None:
        """Remind of windows that begin soon, some at a time, those that begin first before the others."""
        if not self._lead:
            return
        async with self._database.connection() as connection:
            rows = await windows.select_windows_to_remind(connection, self._lead, _BATCH)
        for row in rows:
            await run_logged(self._move_window, row["tenant_id"], row["maintenance_id"], RemindMaintenance())

    async def prune_keys(self) -> None:
        """Forget idempotency keys that were kept long enough, some at a time."""
        pruned = _PRUNE_BATCH
        while pruned == _PRUNE_BATCH:
            async with self._database.connection(PRUNE_SECONDS) as connection:
                pruned = await store.prune_idempotency_keys(connection, self._keys_kept, _PRUNE_BATCH)

    async def prune_deliveries(self) -> None:
        """Forget what came of messages that were settled long enough ago, some at a time."""
        pruned = _PRUNE_BATCH
        while pruned == _PRUNE_BATCH:
            async with self._database.transaction(PRUNE_SECONDS) as connection:
                pruned = await enqueue.prune_deliveries(connection, self._deliveries_days, _PRUNE_BATCH)

    async def forget_unconfirmed(self) -> None:
        """Remove subscriptions whose target's owner has not agreed in all that time: their words are erased."""
        after = subscriptions.FIRST
        while True:
            async with self._database.connection() as connection:
                rows = await subscriptions.select_unconfirmed(connection, CONFIRMATION_DAYS * 86_400.0, _BATCH, after)
            for row in rows:
                await run_logged(self._lapse, row.tenant_id, row.subscription_id)
            if len(rows) < _BATCH:
                return
            after = rows[-1]  # past those that could not be removed just now

    def _wake_up_in(self, seconds: float, due_at: datetime) -> None:
        self._scheduler.add_job(
            _job,
            "date",
            args=[self.move_windows],
            id=f"due {due_at.isoformat()}",
            run_date=datetime.now(UTC) + timedelta(seconds=seconds),
            replace_existing=True,
            # One that was woken a little early, by the database's clock, asks to be woken again while it still runs.
            max_instances=10,
        )

    async def _move_window(self, tenant_id: int, maintenance_id: int, command: MaintenanceCommand) -> None:
        await self._execute(maintenance.DECIDER, tenant_id, maintenance_id, command)

    async def _lapse(self, tenant_id: int, subscription_id: int) -> None:
        def command(history: Sequence[RecordedEvent]) -> ExpireSubscription:
            return ExpireSubscription(versions=erasable_versions(written(history)))

        await self._execute(subscription.DECIDER, tenant_id, subscription_id, command)

    async def _execute(
        self,
        decider: Decider[S, C, E],
        tenant_id: int,
        stream_id: int,
        command: C | Callable[[Sequence[RecordedEvent]], C],
    ) -> None:
        try:
            executed = await self._commands.execute(decider, tenant_id, stream_id, command, _META)
        except (IllegalTransition, ConcurrencyConflict, StreamNotFound):
            # Somebody else was first; the row is old, and the next poll finds it brought up to date.
            await self._projector.catch_up(tenant_id, 0)
            return
        await self._projector.catch_up(tenant_id, executed.position)
        for recorded in executed.history[len(executed.history) - executed.appended :]:
            _log.info(recorded.event.TYPE, tenant_id=tenant_id, **{f"{decider.kind}_id": stream_id})


class _Rest:
    """Sleeps three times as long as was worked since it last slept, so that whoever has to be answered comes first."""

    def __init__(self) -> None:
        self._woke = time.monotonic()

    async def __call__(self) -> None:
        await asyncio.sleep(min(_LONGEST_REST, _REST * (time.monotonic() - self._woke)))
        self._woke = time.monotonic()


async def _job(task: Callable[[], Awaitable[None]]) -> None:
    try:
        await run_logged(task)
    except asyncio.CancelledError:
        return  # the worker stops: APScheduler cancels what runs, and would log that as the job's failure

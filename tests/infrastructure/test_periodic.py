import asyncio

import asyncpg
import pytest
import structlog

from opsentry.events.appender import TenantBusy
from opsentry.events.command_handler import ConcurrencyConflict
from opsentry.infrastructure.periodic import log_failure, run_forever, run_logged
from opsentry.infrastructure.postgres import DatabaseUnavailable
from tests.waiting import GENEROUS_SECONDS


@pytest.fixture
def log():
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DatabaseUnavailable("database: TimeoutError"), "database: TimeoutError"),
        (TenantBusy("the tenant is busy"), "the tenant is busy"),
        (ConcurrencyConflict("incident 1 was changed"), "incident 1 was changed"),
        (asyncpg.DeadlockDetectedError("deadlock detected"), "deadlock detected"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_a_transient_failure_is_a_deferred_task(log, error, text):
    log_failure("enqueue", error, tenant_ids=[1, 2])
    assert log == [
        {"event": "task_deferred", "log_level": "warning", "task": "enqueue", "error": text, "tenant_ids": [1, 2]}
    ]


def test_a_defect_is_a_failed_task_with_its_traceback(log):
    error = ZeroDivisionError()
    log_failure("enqueue", error)
    assert log == [{"event": "task_failed", "log_level": "error", "task": "enqueue", "exc_info": error}]


async def test_a_task_runs_once_with_its_arguments(log):
    ran = []

    async def _catch_up(*arguments):
        ran.append(arguments)
        if len(ran) == 2:
            raise TenantBusy("the tenant is busy")

    assert await run_logged(_catch_up, 1, "a")
    assert not await run_logged(_catch_up)
    assert ran == [(1, "a"), ()]
    assert [entry["task"] for entry in log] == ["catch_up"]


async def test_a_task_that_fails_or_ends_is_started_again_until_cancelled(log):
    outcomes = [TenantBusy("busy"), ZeroDivisionError(), None]
    waits, done = asyncio.Event(), []

    async def loop():
        if outcomes:
            done.append(outcome := outcomes.pop(0))
            if outcome is not None:
                raise outcome
            return
        waits.set()
        await asyncio.Event().wait()

    running = asyncio.create_task(run_forever(loop, pause_seconds=0))
    async with asyncio.timeout(GENEROUS_SECONDS):
        await waits.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(done) == 3
    assert [entry["event"] for entry in log] == ["task_deferred", "task_failed"]

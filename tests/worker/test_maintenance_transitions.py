from contextlib import AsyncExitStack

import pytest

from opsentry.bootstrap import core, working
from opsentry.domain import maintenance
from opsentry.domain.maintenance import CancelMaintenance, StartMaintenance
from opsentry.worker.worker import Worker
from tests import commands
from tests.conftest import META, make_tenant
from tests.system.processes import environment, running
from tests.waiting import stretched
from tests.worker.windows import DONE, completed, lateness, schedule, story, types

WINDOWS = 10


async def moved_once_and_on_time(owner):
    await completed(owner, WINDOWS)
    assert await types(owner) == dict.fromkeys(DONE, WINDOWS)
    late = await lateness(owner)
    assert len(late) == 2 * WINDOWS
    assert min(late) >= 0
    assert max(late) < stretched(1)
    actors = await owner.fetch("SELECT DISTINCT meta::json -> 'actor' ->> 'kind' FROM events WHERE version > 1")
    assert [actor for (actor,) in actors] == ["scheduler"]


async def test_several_workers_move_each_window_once_and_on_time(settings, parts, acme, globex, owner):
    async with AsyncExitStack() as stack:
        cores = [await stack.enter_async_context(core(settings)) for _ in range(4)]
        for one in cores:
            await stack.enter_async_context(working(one))
        for number in range(WINDOWS):
            await schedule(parts, (acme, globex)[number % 2].id, 1 + number / 50, 0.5)
        await moved_once_and_on_time(owner)
        # Another round finds nothing to do.
        for one in cores:
            await Worker(one.application).move_due_windows()
        assert await types(owner) == dict.fromkeys(DONE, WINDOWS)


async def test_several_worker_processes_move_each_window_once_and_on_time(settings, parts, acme, owner):
    async with AsyncExitStack() as stack:
        processes = [await stack.enter_async_context(running(environment(settings), "worker")) for _ in range(3)]
        for process in processes:
            await process.line("working")
        for number in range(WINDOWS):
            await schedule(parts, acme.id, 1 + number / 50, 0.5)
        await moved_once_and_on_time(owner)
        for process in processes:
            process.process.terminate()
            assert await process.ended() == 0
            assert process.said == "working\n"


async def test_a_window_missed_while_no_worker_ran_is_moved_late(parts, acme, owner, api):
    missed = await schedule(parts, acme.id, -7200, 3600)
    async with working(parts):
        await completed(owner, 1)
    assert await story(owner, missed) == DONE
    assert all(late > 3600 for late in await lateness(owner))
    # The worker stopped right after its last command, so the read may have to catch up.
    ended = await owner.fetchval("SELECT position FROM ledger_heads WHERE tenant_id = $1", acme.id)
    _, shown, _ = await api.get(f"/maintenance/{missed}", headers={"Opsentry-Min-Position": str(ended)})
    assert shown["status"] == "completed"
    assert shown["scheduled_end"] < shown["started_at"] < shown["completed_at"]


async def test_windows_without_automatic_moves_wait_for_people(parts, acme, owner):
    by_hand = await schedule(parts, acme.id, -100, 10, auto_start=False)
    open_end = await schedule(parts, acme.id, -100, 10, auto_complete=False)
    both = await schedule(parts, acme.id, -100, 10, auto_start=False, auto_complete=False)
    later = await schedule(parts, acme.id, 3600)
    await schedule(parts, acme.id, -50, 10)
    async with working(parts):
        await completed(owner, 1)
    assert await story(owner, by_hand) == DONE[:1]
    assert await story(owner, open_end) == DONE[:2]
    assert await story(owner, both) == DONE[:1]
    assert await story(owner, later) == DONE[:1]


async def test_a_window_started_early_by_hand_is_only_completed(parts, acme, owner):
    early = await schedule(parts, acme.id, 0.5, 0.5)
    async with working(parts):
        await commands.change(parts, maintenance.DECIDER, acme.id, early, StartMaintenance(), META)
        await parts.projector.catch_up(acme.id, 0)
        await completed(owner, 1)
    assert await story(owner, early) == DONE
    assert sorted(late > 0 for late in await lateness(owner)) == [False, True]


@pytest.mark.parametrize("caught_up", [True, False])
async def test_a_cancelled_window_is_not_started(parts, acme, owner, caught_up):
    off = await schedule(parts, acme.id, -100, 10)
    await schedule(parts, acme.id, -50, 10)
    await commands.change(parts, maintenance.DECIDER, acme.id, off, CancelMaintenance(), META)
    if caught_up:
        await parts.projector.catch_up(acme.id, 0)
    async with working(parts):
        await completed(owner, 1)
    assert await story(owner, off) == ["maintenance.scheduled", "maintenance.cancelled"]


async def test_a_busy_tenant_does_not_delay_others(parts, acme, globex, owner, app_connection):
    held = await schedule(parts, acme.id, -100, 10)
    free = await schedule(parts, globex.id, -50, 10)
    async with owner.transaction():
        await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", acme.id)
        async with working(parts):
            await completed(app_connection, 1)
            assert await story(app_connection, free, globex.id) == DONE
            assert await story(app_connection, held, acme.id) == DONE[:1]
    async with working(parts):
        await completed(owner, 2)
    assert await story(owner, held, acme.id) == DONE


async def test_more_windows_than_a_batch_are_all_moved(parts, owner):
    tenants = [await make_tenant(parts, f"tenant-{number}") for number in range(5)]
    for number in range(220):
        await schedule(parts, tenants[number % 5].id, -100 + number / 1000, 10)
    async with working(parts):
        await completed(owner, 220)
    assert await types(owner) == dict.fromkeys(DONE, 220)

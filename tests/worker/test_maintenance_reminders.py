"""Subscribers are reminded of a window once before its start, unless it was scheduled too recently."""

import pytest

from opsentry.bootstrap import core, working
from opsentry.domain import maintenance
from opsentry.domain.maintenance import CancelMaintenance, ChangeMaintenance, StartMaintenance
from opsentry.worker.scheduler import Scheduler
from opsentry.worker.tasks.maintenance_reminders import MaintenanceReminders
from tests import commands
from tests.conftest import META
from tests.waiting import until
from tests.worker.windows import schedule, story

SCHEDULED, REMINDED = "maintenance.scheduled", "maintenance.reminded"
MINUTE = 60.0


async def send_reminders(parts, lead_minutes=60):
    app = parts.application
    await MaintenanceReminders(app, Scheduler(app), lead_minutes).send_reminders()


@pytest.fixture
async def announce(parts, acme, app_connection):
    """Schedule a window `ago` minutes in the past that starts `begins_in` minutes from now."""

    async def make(begins_in, ago, tenant_id=acme.id, **fields):
        made = await schedule(parts, tenant_id, begins_in * MINUTE, 3600, **fields)
        await app_connection.execute(
            "UPDATE maintenance SET reminder_pending_since = reminder_pending_since - $2 * interval '1 minute'"
            " WHERE maintenance_id = $1"
            " AND tenant_id = $3",
            made,
            ago,
            tenant_id,
        )
        return made

    return make


async def execute(parts, tenant, number, command):
    done = await commands.change(parts, maintenance.DECIDER, tenant.id, number, command, META)
    await parts.projector.catch_up(tenant.id, done.position)


async def test_each_window_within_the_lead_is_reminded_of_once(parts, announce, owner):
    soon = await announce(50, 20)
    late = await announce(1, 1000)
    later = await announce(70, 1000)
    for _ in range(3):
        await send_reminders(parts)
    assert await story(owner, soon) == [SCHEDULED, REMINDED]
    assert await story(owner, late) == [SCHEDULED, REMINDED]
    assert await story(owner, later) == [SCHEDULED]
    actors = await owner.fetch("SELECT meta FROM events WHERE type = $1", REMINDED)
    assert {row["meta"] for row in actors} == {'{"actor":{"kind":"scheduler"}}'}


async def test_a_recently_scheduled_window_gets_no_reminder(parts, announce, owner):
    recent = await announce(50, 5)
    await send_reminders(parts)
    assert await story(owner, recent) == [SCHEDULED]


async def test_past_started_and_cancelled_windows_get_no_reminder(parts, acme, announce, owner):
    past = await announce(-1, 1000, auto_start=False)
    begun, off = await announce(30, 1000), await announce(30, 1000)
    await execute(parts, acme, begun, StartMaintenance())
    await execute(parts, acme, off, CancelMaintenance())
    await send_reminders(parts)
    assert await story(owner, past) == [SCHEDULED]
    assert await story(owner, begun) == [SCHEDULED, "maintenance.started"]
    assert await story(owner, off) == [SCHEDULED, "maintenance.cancelled"]


async def test_a_lead_of_zero_sends_no_reminder(parts, announce, owner):
    soon = await announce(1, 1000)
    await send_reminders(parts, 0)
    assert await story(owner, soon) == [SCHEDULED]


async def test_a_rescheduled_window_gets_another_reminder(parts, acme, announce, app_connection, owner):
    soon = await announce(50, 1000)
    await send_reminders(parts)
    start = await app_connection.fetchval("SELECT scheduled_start - interval '10 minutes' FROM maintenance")
    await execute(parts, acme, soon, ChangeMaintenance(scheduled_start=start))
    await send_reminders(parts)  # the new start is too recent
    told = [SCHEDULED, REMINDED, "maintenance.rescheduled"]
    assert await story(owner, soon) == told
    await app_connection.execute(
        "UPDATE maintenance SET reminder_pending_since = reminder_pending_since - interval '1 day'"
    )
    await send_reminders(parts)
    assert await story(owner, soon) == [*told, REMINDED]


async def test_other_changes_send_no_second_reminder(parts, acme, announce, owner):
    soon = await announce(50, 1000)
    await send_reminders(parts)
    await execute(parts, acme, soon, ChangeMaintenance(title="T", suppress_alerts=True))
    await send_reminders(parts)
    assert await story(owner, soon) == [SCHEDULED, REMINDED, "maintenance.edited", "maintenance.changed"]


async def test_a_stale_row_sends_no_reminder(parts, acme, announce, owner):
    begun = await announce(30, 1000)
    await commands.change(parts, maintenance.DECIDER, acme.id, begun, StartMaintenance(), META)
    await send_reminders(parts)
    assert await story(owner, begun) == [SCHEDULED, "maintenance.started"]
    assert await owner.fetchval("SELECT reminder_pending_since FROM maintenance") is None


async def test_a_busy_tenant_does_not_delay_others(parts, acme, globex, announce, owner, app_connection):
    held, free = await announce(30, 1000), await announce(40, 1000, globex.id)
    async with owner.transaction():
        await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", acme.id)
        await send_reminders(parts)
        assert await story(app_connection, free, globex.id) == [SCHEDULED, REMINDED]
    assert await story(app_connection, held, acme.id) == [SCHEDULED]
    await send_reminders(parts)
    assert await story(owner, held, acme.id) == [SCHEDULED, REMINDED]


async def test_a_halted_projection_gets_no_reminder(parts, acme, announce, owner):
    soon = await announce(30, 1000)
    await owner.execute("UPDATE checkpoints SET halted_at = 9 WHERE projection = 'maintenance'")
    await send_reminders(parts)
    assert await story(owner, soon) == [SCHEDULED]


async def test_several_workers_remind_once(settings, parts, announce, owner):
    numbers = [await announce(30, 1000) for _ in range(5)]
    async with core(settings) as other, working(parts), working(other):
        await until(lambda: owner.fetchval("SELECT count(*) >= 5 FROM events WHERE type = $1", REMINDED))
    for number in numbers:
        assert await story(owner, number) == [SCHEDULED, REMINDED]

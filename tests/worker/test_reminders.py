"""People are reminded of a window once, before it begins, if they have known of its hour for long enough."""

import pytest

from opsentry.bootstrap import core, working
from opsentry.domain import maintenance
from opsentry.domain.maintenance import CancelMaintenance, ChangeMaintenance, StartMaintenance
from opsentry.worker.worker import Worker
from tests.conftest import META
from tests.waiting import until
from tests.worker.windows import schedule, story

SCHEDULED, REMINDED = "maintenance.scheduled", "maintenance.reminded"
MINUTE = 60.0


def worker(parts, maintenance_reminder_minutes=60):
    return Worker(
        parts.database, parts.commands, parts.projector, maintenance_reminder_minutes=maintenance_reminder_minutes
    )


@pytest.fixture
async def announce(parts, acme, app_connection):
    """Announce a window that begins in so many minutes, and was announced so many minutes ago."""

    async def make(begins_in, ago, tenant_id=acme.id, **fields):
        made = await schedule(parts, tenant_id, begins_in * MINUTE, 3600, **fields)
        await app_connection.execute(
            "UPDATE maintenance SET remind_since = remind_since - $2 * interval '1 minute' WHERE maintenance_id = $1"
            " AND tenant_id = $3",
            made,
            ago,
            tenant_id,
        )
        return made

    return make


async def execute(parts, tenant, number, command):
    done = await parts.commands.execute(maintenance.DECIDER, tenant.id, number, command, META)
    await parts.projector.catch_up(tenant.id, done.position)


async def test_people_are_reminded_once_within_the_lead(parts, announce, owner):
    soon = await announce(50, 20)
    late = await announce(1, 1000)
    later = await announce(70, 1000)
    for _ in range(3):
        await worker(parts).remind_of_windows()
    assert await story(owner, soon) == [SCHEDULED, REMINDED]
    assert await story(owner, late) == [SCHEDULED, REMINDED]
    assert await story(owner, later) == [SCHEDULED]
    actors = await owner.fetch("SELECT meta FROM events WHERE type = $1", REMINDED)
    assert {row["meta"] for row in actors} == {'{"actor":{"kind":"scheduler"}}'}


async def test_nobody_is_reminded_of_what_they_have_just_heard(parts, announce, owner):
    told_late = await announce(50, 5)
    await worker(parts).remind_of_windows()
    assert await story(owner, told_late) == [SCHEDULED]


async def test_nobody_is_reminded_of_what_has_begun_or_should_have(parts, acme, announce, owner):
    past = await announce(-1, 1000, auto_start=False)
    begun, off = await announce(30, 1000), await announce(30, 1000)
    await execute(parts, acme, begun, StartMaintenance())
    await execute(parts, acme, off, CancelMaintenance())
    await worker(parts).remind_of_windows()
    assert await story(owner, past) == [SCHEDULED]
    assert await story(owner, begun) == [SCHEDULED, "maintenance.started"]
    assert await story(owner, off) == [SCHEDULED, "maintenance.cancelled"]


async def test_no_lead_is_no_reminder(parts, announce, owner):
    soon = await announce(1, 1000)
    await worker(parts, 0).remind_of_windows()
    assert await story(owner, soon) == [SCHEDULED]


async def test_a_new_hour_is_reminded_of_anew(parts, acme, announce, app_connection, owner):
    soon = await announce(50, 1000)
    await worker(parts).remind_of_windows()
    start = await app_connection.fetchval("SELECT scheduled_start - interval '10 minutes' FROM maintenance")
    await execute(parts, acme, soon, ChangeMaintenance(scheduled_start=start))
    await worker(parts).remind_of_windows()  # they have just heard of it
    told = [SCHEDULED, REMINDED, "maintenance.rescheduled"]
    assert await story(owner, soon) == told
    await app_connection.execute("UPDATE maintenance SET remind_since = remind_since - interval '1 day'")
    await worker(parts).remind_of_windows()
    assert await story(owner, soon) == [*told, REMINDED]


async def test_other_changes_leave_it_at_one_reminder(parts, acme, announce, owner):
    soon = await announce(50, 1000)
    await worker(parts).remind_of_windows()
    await execute(parts, acme, soon, ChangeMaintenance(title="T", suppress_alerts=True))
    await worker(parts).remind_of_windows()
    assert await story(owner, soon) == [SCHEDULED, REMINDED, "maintenance.edited", "maintenance.changed"]


async def test_a_row_that_is_old_reminds_nobody(parts, acme, announce, owner):
    begun = await announce(30, 1000)
    await parts.commands.execute(maintenance.DECIDER, acme.id, begun, StartMaintenance(), META)
    await worker(parts).remind_of_windows()
    assert await story(owner, begun) == [SCHEDULED, "maintenance.started"]
    assert await owner.fetchval("SELECT remind_since FROM maintenance") is None


async def test_a_tenant_that_is_busy_does_not_hold_up_the_others(parts, acme, globex, announce, owner, app_connection):
    held, free = await announce(30, 1000), await announce(40, 1000, globex.id)
    async with owner.transaction():
        await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", acme.id)
        await worker(parts).remind_of_windows()
        assert await story(app_connection, free) == [SCHEDULED, REMINDED]
    assert await story(app_connection, held) == [SCHEDULED]
    await worker(parts).remind_of_windows()
    assert await story(owner, held) == [SCHEDULED, REMINDED]


async def test_a_tenant_whose_windows_are_parked_is_left_alone(parts, acme, announce, owner):
    soon = await announce(30, 1000)
    await owner.execute("UPDATE checkpoints SET halted_at = 9 WHERE projection = 'maintenance'")
    await worker(parts).remind_of_windows()
    assert await story(owner, soon) == [SCHEDULED]


async def test_several_workers_at_their_work_remind_once(settings, parts, announce, owner):
    numbers = [await announce(30, 1000) for _ in range(5)]
    async with core(settings) as other, working(parts), working(other):
        await until(lambda: owner.fetchval("SELECT count(*) >= 5 FROM events WHERE type = $1", REMINDED))
    for number in numbers:
        assert await story(owner, number) == [SCHEDULED, REMINDED]

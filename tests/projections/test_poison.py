import msgspec
import pytest

from opsentry.bootstrap import projections
from opsentry.domain import service
from opsentry.domain.service import RegisterService
from opsentry.projections import incidents, services
from opsentry.projections.engine import applier as applier_module
from opsentry.projections.engine.applier import PoisonEvent
from opsentry.projections.impact import Impact
from tests import commands
from tests.commands import opened
from tests.projections.histories import META
from tests.projections.planting import age, plant

NAMES = {projection.name for projection in projections()}
OF_INCIDENTS = {projection.name for projection in projections() if "incident" in projection.kinds}

POISON = {
    "of a type that nobody knows": {"type": "incident.exploded"},
    "of a version to come": {"schema_version": 99},
    "without its fields": {"data": "{}"},
    "whose data is no JSON": {"data": "{"},
    "whose words are no JSON": {"erasable": "{"},
    "without an actor": {"meta": "{}"},
    "of another kind of stream": {"type": "service.retired", "data": "{}"},
}


async def checkpoints(connection, tenant_id):
    rows = await connection.fetch("SELECT * FROM checkpoints WHERE tenant_id = $1", tenant_id)
    return {row["projection"]: row for row in rows}


async def halted(connection, tenant_id):
    return {name for name, row in (await checkpoints(connection, tenant_id)).items() if row["halted_at"] is not None}


async def registered(parts, tenant, slug):
    return await commands.create(parts, service.DECIDER, tenant.id, RegisterService(slug=slug, name=slug), META)


@pytest.mark.parametrize("columns", POISON.values(), ids=POISON)
async def test_a_poison_event_halts_only_the_projections_that_read_it(
    parts, acme, globex, owner, app_connection, columns
):
    before = await opened(parts, acme)
    web = await registered(parts, acme, "web")
    position = await plant(owner, acme.id, before.stream_id, 2, **columns)
    after = await registered(parts, acme, "db")
    other = await opened(parts, globex)
    for tenant, last in ((acme, after.position), (globex, other.position)):
        await parts.projector.catch_up(tenant.id, last)
    found = await checkpoints(app_connection, acme.id)
    stopped = await halted(app_connection, acme.id)
    assert stopped
    assert stopped <= OF_INCIDENTS
    assert "incidents" in stopped
    for name, row in found.items():
        if name in stopped:
            assert (row["position"], row["halted_at"]) == (position - 1, position)
            assert row["halt_error"]
        else:
            assert (row["position"], row["halted_at"], row["halt_error"]) == (after.position, None, None)
    assert {name: row["position"] for name, row in (await checkpoints(app_connection, globex.id)).items()} == (
        dict.fromkeys(NAMES, other.position)
    )
    assert await halted(app_connection, globex.id) == set()
    shown = await app_connection.fetch("SELECT service_id FROM services ORDER BY 1")
    assert [row["service_id"] for row in shown] == sorted([web.stream_id, after.stream_id])


async def test_reads_of_a_halted_projection_show_the_events_before_the_halt(parts, acme, owner):
    first = await opened(parts, acme, "Before")
    await plant(owner, acme.id, first.stream_id, 2, type="incident.exploded")
    await opened(parts, acme, "After")
    await age(owner, acme.id)
    for _ in range(2):
        row = await parts.projector.read(
            acme.id, lambda connection: incidents.select_active_incidents(connection, acme.id)
        )
        assert [item["title"] for item in msgspec.json.decode(b"[" + row["items"] + b"]")] == ["Before"]
        assert row["trusted_position"] == row["head_position"]


async def test_a_halted_projection_is_not_retried_by_itself(parts, acme, owner, monkeypatch):
    first = await opened(parts, acme)
    await plant(owner, acme.id, first.stream_id, 2, type="incident.exploded")
    await parts.projector.catch_up(acme.id, 0)
    assert await parts.projector.lagging_tenants() == []
    parkings: list[object] = []
    monkeypatch.setattr(parts.projector._applier, "_halt", parkings.append)
    made = await registered(parts, acme, "web")
    await parts.projector.catch_up(acme.id, made.position)
    assert parkings == []
    row = await parts.projector.read(
        acme.id, lambda connection: services.select_service(connection, acme.id, made.stream_id)
    )
    assert row["etag"] == "1"


async def test_a_halted_projection_continues_after_a_retry(parts, acme, owner, monkeypatch):
    real = Impact.prepare
    made = await opened(parts, acme)

    async def broken(self, connection, tenant_id, events):
        if any(event.position == made.position for event in events):
            raise ZeroDivisionError("a defect")
        return await real(self, connection, tenant_id, events)

    monkeypatch.setattr(Impact, "prepare", broken)
    last = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, last.position)
    row = (await checkpoints(owner, acme.id))["impact"]
    assert (row["position"], row["halted_at"], row["halt_error"]) == (
        made.position - 1,
        made.position,
        "ZeroDivisionError: a defect",
    )
    assert await halted(owner, acme.id) == {"impact"}
    monkeypatch.undo()
    await owner.execute("UPDATE checkpoints SET halted_at = NULL, halt_error = NULL")
    await parts.projector.catch_up(acme.id, last.position)
    assert {r["position"] for r in (await checkpoints(owner, acme.id)).values()} == {last.position}
    assert await owner.fetchval("SELECT count(*) FROM impact_states") == 2


async def test_the_poison_event_is_found_in_the_middle_of_a_batch(parts, acme, owner, monkeypatch):
    monkeypatch.setattr(applier_module, "BATCH_EVENTS", 20)
    good = [await opened(parts, acme, str(number)) for number in range(8)]
    position = await plant(owner, acme.id, good[-1].stream_id, 2, data="{}")
    for number in range(8):
        last = await opened(parts, acme, str(number))
    await parts.projector.catch_up(acme.id, last.position)
    assert await halted(owner, acme.id) == OF_INCIDENTS
    assert await owner.fetchval("SELECT count(*) FROM incidents") == 8
    assert {row["position"] for row in (await checkpoints(owner, acme.id)).values()} == {
        position - 1,
        last.position,
    }


async def test_an_unknown_kind_of_stream_halts_no_projection(parts, acme, owner, monkeypatch):
    monkeypatch.setattr(applier_module, "BATCH_EVENTS", 4)
    for number in range(6):
        await plant(owner, acme.id, number + 1, 1, kind="weather", type="weather.changed")
        last = await opened(parts, acme, str(number))
    await parts.projector.catch_up(acme.id, last.position)
    assert await halted(owner, acme.id) == set()
    assert {row["position"] for row in (await checkpoints(owner, acme.id)).values()} == {last.position}
    assert await owner.fetchval("SELECT count(*) FROM incidents") == 6


async def test_a_transient_failure_halts_no_projection(parts, acme, owner, monkeypatch):
    real = Impact.prepare
    failures = iter([True, False])

    async def interrupted(self, connection, tenant_id, events):
        if next(failures, False):
            await connection.execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
        return await real(self, connection, tenant_id, events)

    monkeypatch.setattr(Impact, "prepare", interrupted)
    made = await opened(parts, acme)
    with pytest.raises(Exception, match=r"40001|unhandled"):
        await parts.projector.catch_up(acme.id, made.position)
    assert await halted(owner, acme.id) == set()
    await parts.projector.catch_up(acme.id, made.position)
    assert {row["position"] for row in (await checkpoints(owner, acme.id)).values()} == {made.position}


async def test_a_halt_does_not_undo_the_progress_of_another_process(parts, acme, owner):
    made = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, made.position)
    await parts.projector._applier._halt(
        acme.id, PoisonEvent("incidents", made.position, "an older version does not know it")
    )
    assert await halted(owner, acme.id) == set()
    assert (await checkpoints(owner, acme.id))["incidents"]["position"] == made.position

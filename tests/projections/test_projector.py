import asyncio

import msgspec
import pytest

from opsentry.bootstrap import projections
from opsentry.domain import incident, service
from opsentry.domain.incident import PostUpdate, ResolveIncident
from opsentry.domain.service import RegisterService
from opsentry.domain.subscription import DECIDER as SUBSCRIPTIONS
from opsentry.domain.subscription import CreateSubscription
from opsentry.events import store
from opsentry.infrastructure.postgres import Database, DatabaseUnavailable
from opsentry.projections import impact, incident_view, incidents, services
from opsentry.projections.engine import applier as applier_module
from opsentry.projections.engine.applier import Applier
from opsentry.projections.engine.projector import Projector
from tests import commands
from tests.commands import opened
from tests.projections.histories import META, clear, dump
from tests.projections.planting import age
from tests.waiting import GENEROUS_SECONDS

NAMES = {projection.name for projection in projections()}


async def positions(connection, tenant_id):
    rows = await connection.fetch("SELECT projection, position FROM checkpoints WHERE tenant_id = $1", tenant_id)
    return {row["projection"]: row["position"] for row in rows}


async def busy_history(parts, tenant, count=12):
    await commands.create(
        parts, SUBSCRIPTIONS, tenant.id, CreateSubscription(channel="webhook", target="x", audience="internal"), META
    )
    web = await commands.create(parts, service.DECIDER, tenant.id, RegisterService(slug="web", name="Web"), META)
    for number in range(count):
        made = await opened(parts, tenant, str(number), service_ids=(web.stream_id,), description="d")
        if number % 2:
            made = await commands.change(parts, incident.DECIDER, tenant.id, made.stream_id, ResolveIncident(), META)
    return made.position


async def listed(parts, tenant):
    row = await parts.projector.read(
        tenant.id, lambda connection: incidents.select_active_incidents(connection, tenant.id)
    )
    return [item["title"] for item in msgspec.json.decode(b"[" + (row["items"] or b"") + b"]")]


async def test_a_catch_up_brings_each_projection_to_the_event(parts, acme, globex, app_connection):
    position = await busy_history(parts, acme)
    await parts.projector.catch_up(acme.id, position)
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, position)
    assert await positions(app_connection, globex.id) == {}


async def test_batches_of_any_size_give_the_same_rows(parts, acme, app_connection, owner, monkeypatch):
    position = await busy_history(parts, acme)
    dumps = []
    for size in (500, 7, 1):
        monkeypatch.setattr(applier_module, "BATCH_EVENTS", size)
        await owner.execute("DELETE FROM checkpoints")
        for projection in projections():
            await clear(owner, projection, acme.id)
        await parts.projector.catch_up(acme.id, position)
        dumps.append(await dump(app_connection))
    assert dumps[0]["incidents"]
    assert dumps[0]["outbox_intents"]
    assert dumps == [dumps[0]] * 3


async def test_a_new_projection_catches_up_by_itself(parts, acme, app_connection, owner, monkeypatch):
    monkeypatch.setattr(applier_module, "BATCH_EVENTS", 5)
    position = await busy_history(parts, acme)
    await parts.projector.catch_up(acme.id, position)
    before = await dump(app_connection)
    await owner.execute("DELETE FROM checkpoints WHERE projection = 'impact'")
    await owner.execute("UPDATE checkpoints SET position = 9 WHERE projection = 'outbox'")
    await owner.execute("DELETE FROM impact_states")
    await owner.execute("DELETE FROM service_impacts")
    await parts.projector.catch_up(acme.id, position)
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, position)
    assert await dump(app_connection) == before


async def test_concurrent_projectors_apply_each_event_once(parts, settings, acme, app_connection, monkeypatch):
    monkeypatch.setattr(applier_module, "BATCH_EVENTS", 3)
    position = await busy_history(parts, acme, 20)
    applied: list[tuple[str, int]] = []
    real = Applier._apply_batch

    async def noted(self, connection, tenant_id, checkpoints, events):
        await real(self, connection, tenant_id, checkpoints, events)
        applied.extend((projection.name, event.position) for projection in checkpoints.projections for event in events)

    monkeypatch.setattr(Applier, "_apply_batch", noted)
    databases = [Database(settings.database_url, size=2, timeout_seconds=GENEROUS_SECONDS) for _ in range(4)]
    for database in databases:
        await database.open()
    projectors = [Projector(database, projections()) for database in databases]
    await asyncio.gather(*(projector.catch_up(acme.id, position) for projector in projectors for _ in range(3)))
    for database in databases:
        await database.close()
    recorded = await store.read_after(app_connection, acme.id, 0, 1000)
    assert sorted(applied) == sorted(
        (projection.name, event.position) for projection in projections() for event in recorded
    )
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, position)


async def test_a_caller_during_a_catch_up_sees_the_events_of_the_meantime(parts, acme, app_connection, monkeypatch):
    began, gate = asyncio.Event(), asyncio.Event()
    real = Applier._step

    async def held_back(self, connection, tenant_id, until, **options):
        done = await real(self, connection, tenant_id, until, **options)
        began.set()
        await gate.wait()
        return done

    monkeypatch.setattr(Applier, "_step", held_back)
    first = await opened(parts, acme)
    early = asyncio.create_task(parts.projector.catch_up(acme.id, first.position))
    await began.wait()
    second = await opened(parts, acme)
    late = [asyncio.create_task(parts.projector.catch_up(acme.id, second.position)) for _ in range(5)]
    gate.set()
    await asyncio.gather(early, *late)
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, second.position)


async def test_a_caller_whose_time_ends_does_not_stop_the_catch_up(parts, acme, app_connection, monkeypatch):
    gate = asyncio.Event()
    real = Applier._step

    async def held_back(self, connection, tenant_id, until, **options):
        await gate.wait()
        return await real(self, connection, tenant_id, until, **options)

    monkeypatch.setattr(Applier, "_step", held_back)
    made = await opened(parts, acme)
    patient = asyncio.create_task(parts.projector.catch_up(acme.id, made.position))
    with pytest.raises(TimeoutError):
        await parts.projector.catch_up(acme.id, made.position, 0.01)
    assert parts.projector.running_seconds(acme.id) > 0
    gate.set()
    await patient
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, made.position)
    assert parts.projector.running_seconds(acme.id) is None


async def test_a_cancelled_caller_does_not_cancel_the_catch_up_of_the_others(parts, acme, app_connection, monkeypatch):
    began, gate = asyncio.Event(), asyncio.Event()
    real = Applier._step

    async def held_back(self, connection, tenant_id, until, **options):
        began.set()
        await gate.wait()
        return await real(self, connection, tenant_id, until, **options)

    monkeypatch.setattr(Applier, "_step", held_back)
    made = await opened(parts, acme)
    impatient, patient = (asyncio.create_task(parts.projector.catch_up(acme.id, made.position)) for _ in range(2))
    await began.wait()
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    gate.set()
    await patient
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, made.position)


async def test_a_read_projects_events_that_nothing_projected(parts, acme, app_connection, owner):
    await opened(parts, acme, "Down")
    await parts.projector.catch_up(acme.id, 0)
    made = await opened(parts, acme, "Down again")
    await age(owner, acme.id)
    assert (
        len(
            msgspec.json.decode(
                b"[" + (await incidents.select_active_incidents(app_connection, acme.id))["items"] + b"]"
            )
        )
        == 1
    )
    assert await listed(parts, acme) == ["Down again", "Down"]
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, made.position)


async def test_the_first_read_of_a_tenant_shows_all_events(parts, acme):
    await opened(parts, acme, "Down")
    assert await listed(parts, acme) == ["Down"]


async def test_a_read_catches_up_a_projection_that_never_ran_for_the_tenant(parts, acme, owner):
    position = await busy_history(parts, acme, 1)
    await parts.projector.catch_up(acme.id, position)
    await owner.execute("DELETE FROM checkpoints WHERE projection = 'impact'")
    await owner.execute("DELETE FROM impact_states")
    await owner.execute("DELETE FROM service_impacts")
    (service_id,) = await owner.fetchrow("SELECT service_id FROM services")
    row = await parts.projector.read(acme.id, lambda c: services.select_service(c, acme.id, service_id))
    assert msgspec.json.decode(row["body"])["current_status"] == "degraded_performance"
    row = await parts.projector.read(
        acme.id, lambda c: impact.select_service_impacts(c, acme.id, service_id, None, None, 90, 10)
    )
    assert len(impact.impacted_services(row)[0].periods) == 1


async def test_a_read_does_not_wait_for_an_event_without_a_response(parts, acme, owner):
    await opened(parts, acme, "Down")
    await parts.projector.catch_up(acme.id, 0)
    before = await positions(owner, acme.id)
    await opened(parts, acme, "Down again")
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute("UPDATE events SET recorded_at = clock_timestamp() + interval '1 hour'")
    assert await listed(parts, acme) == ["Down"]
    assert await positions(owner, acme.id) == before


@pytest.mark.production_timeouts
async def test_a_read_that_cannot_catch_up_in_time_tells_its_position(parts, acme, holder, owner):
    await opened(parts, acme, "Down")
    await parts.projector.catch_up(acme.id, 0)
    made = await opened(parts, acme, "Down again")
    await age(owner, acme.id)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("SELECT FROM checkpoints FOR UPDATE")
    row = await parts.projector.read(acme.id, lambda connection: incidents.select_active_incidents(connection, acme.id))
    assert (row["trusted_position"], row["head_position"]) == (made.position - 1, made.position)
    assert [item["title"] for item in msgspec.json.decode(b"[" + row["items"] + b"]")] == ["Down"]
    await transaction.rollback()
    assert await listed(parts, acme) == ["Down again", "Down"]


async def test_a_stuck_catch_up_of_one_tenant_delays_no_other(parts, acme, globex, holder, app_connection):
    for tenant in (acme, globex):
        await opened(parts, tenant)
        await parts.projector.catch_up(tenant.id, 0)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("SELECT FROM checkpoints WHERE tenant_id = $1 FOR UPDATE", acme.id)
    stuck = await opened(parts, acme)
    waiting = asyncio.create_task(parts.projector.catch_up(acme.id, stuck.position))
    for _ in range(5):
        made = await opened(parts, globex)
        await parts.projector.catch_up(globex.id, made.position)
    assert not waiting.done()
    await transaction.rollback()
    await waiting
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, stuck.position)


async def test_lagging_tenants_are_listed(parts, acme, globex):
    assert sorted(await parts.projector.lagging_tenants()) == [acme.id, globex.id]
    assert len(await parts.projector.lagging_tenants(limit=1)) == 1
    for tenant in (acme, globex):
        await parts.projector.catch_up(tenant.id, 0)
    assert await parts.projector.lagging_tenants() == []
    await opened(parts, globex)
    assert await parts.projector.lagging_tenants() == [globex.id]
    await parts.projector.catch_up(globex.id, 0)
    assert await parts.projector.lagging_tenants(after=globex.id) == []


async def test_a_catch_up_that_loses_its_connection_changes_nothing(parts, acme, app_connection, monkeypatch):
    position = await busy_history(parts, acme, 4)
    real = Applier._apply_batch
    failures = iter([True, True, False])

    async def cut_off(self, connection, tenant_id, *rest):
        async with connection.transaction():
            await real(self, connection, tenant_id, *rest)
            if next(failures):
                await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    monkeypatch.setattr(Applier, "_apply_batch", cut_off)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable):
            await parts.projector.catch_up(acme.id, position)
        assert set((await positions(app_connection, acme.id)).values()) == {0}
        assert not any((await dump(app_connection)).values())
    await parts.projector.catch_up(acme.id, position)
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, position)


async def test_an_update_of_a_projected_incident_continues_from_its_row(parts, acme, app_connection):
    made = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, made.position)
    posted = await commands.change(
        parts, incident.DECIDER, acme.id, made.stream_id, PostUpdate(message="m", status="monitoring"), META
    )
    await parts.projector.catch_up(acme.id, posted.position)
    row = await incidents.select_incident(app_connection, acme.id, made.stream_id)
    body = msgspec.json.decode(row["body"])
    assert (row["etag"], body["status"], len(body["updates"])) == (str(posted.version), "monitoring", 1)
    assert row["body"] == incident_view.render(posted.history, {}, {})

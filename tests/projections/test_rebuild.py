import asyncio

import pytest

from opsentry.bootstrap import projections
from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.incident import OpenIncident, PostUpdate
from opsentry.domain.subscription import CreateSubscription
from opsentry.projections import impact_state
from opsentry.projections import incidents as incidents_module
from opsentry.projections.engine import management
from opsentry.projections.engine.rebuild import Rebuilder
from tests import commands
from tests.conftest import META, make_service
from tests.projections.histories import clear, dump, schedule
from tests.projections.planting import plant

# Rows are compared by their contents, not by the order in which they were written.
DAMAGE = {
    "services": "UPDATE services SET name = 'wrong'",
    "incidents": "UPDATE incident_updates SET body = replace(body, 'message 3', 'wrong');"
    " UPDATE incident_counts SET incidents = 7",
    "maintenance": "DELETE FROM maintenance",
    "subscriptions": "UPDATE subscriptions SET target = 'wrong'",
    "impact": "UPDATE service_impacts SET started_at = started_at - interval '1 hour'",
    "outbox": "DELETE FROM outbox_state WHERE kind = 'incident'",
}


@pytest.fixture
async def busy(parts, acme, globex):
    """Two tenants with something of everything, one incident of 120 messages among it."""
    numbers = []
    for tenant in (acme, globex):
        subscriber_filter = CreateSubscription(channel="webhook", target="x")
        await commands.create(parts, subscription.DECIDER, tenant.id, subscriber_filter, META)
        service_id = await make_service(parts, tenant.id, "web")
        opened = OpenIncident(title="Down", description="D", severity="critical", service_ids=(service_id,))
        made = await commands.create(parts, incident.DECIDER, tenant.id, opened, META)
        numbers.append(made.stream_id)
        for number in range(120):
            await commands.change(
                parts, incident.DECIDER, tenant.id, made.stream_id, PostUpdate(message=f"message {number}"), META
            )
        await commands.create(parts, maintenance.DECIDER, tenant.id, schedule(service_ids=(service_id,)), META)
        await parts.projector.catch_up(tenant.id, 0)
    return acme.id, globex.id, numbers[0]


@pytest.fixture
def rebuilder(parts):
    """Rebuilds, and compares, one projection or all."""

    class Ready:
        def of(self, *chosen):
            return Rebuilder(parts.database, chosen or projections())

        async def rebuild(self, tenant_id, *chosen, **options):
            found = self.of(*chosen)
            await found.request(tenant_id)
            return await found.rebuild(tenant_id, **options)

        async def verify(self, tenant_id):
            return [await self.of().verify(projection, tenant_id) for projection in projections()]

    return Ready()


ONE = {projection.name: projection for projection in projections()}
RIGHT = [None] * len(ONE)


@pytest.mark.parametrize("projection", projections(), ids=lambda p: p.name)
async def test_verify_finds_damaged_rows_and_a_rebuild_repairs_them(rebuilder, busy, app_connection, projection):
    acme, globex, _ = busy
    right = await dump(app_connection)
    assert await rebuilder.verify(acme) == RIGHT
    await app_connection.execute(DAMAGE[projection.name])
    assert await dump(app_connection) != right
    difference = await rebuilder.of().verify(projection, acme)
    assert difference is not None
    assert difference.table in {table.name for table in projection.tables}
    assert difference.stored != difference.replayed
    for tenant_id in (acme, globex):
        assert await rebuilder.rebuild(tenant_id, projection) == [projection.name]
        assert await rebuilder.verify(tenant_id) == RIGHT
    assert await dump(app_connection) == right


async def test_verify_finds_rows_without_a_stream_and_a_rebuild_removes_them(rebuilder, busy, app_connection):
    acme, _, _ = busy
    right = await dump(app_connection)
    await app_connection.execute(
        "INSERT INTO incidents SELECT tenant_id, 10^9, version, status, severity, visibility, service_ids,"
        " occurred_at, body FROM incidents"
    )
    difference = await rebuilder.of().verify(ONE["incidents"], acme)
    assert (difference.table, difference.replayed) == ("incidents", None)
    assert difference.stored["incident_id"] == 10**9
    await rebuilder.rebuild(acme, ONE["incidents"])
    await rebuilder.rebuild(busy[1], ONE["incidents"])
    assert await dump(app_connection) == right


async def test_verify_finds_wrong_totals_and_a_rebuild_repairs_them(rebuilder, busy, app_connection):
    acme, _, _ = busy
    right = await dump(app_connection)
    await app_connection.execute("UPDATE incident_counts SET incidents = 7 WHERE tenant_id = $1", acme)
    difference = await rebuilder.of().verify(ONE["incidents"], acme)
    assert (difference.table, difference.stored["incidents"], difference.replayed["incidents"]) == (
        "incident_counts",
        7,
        1,
    )
    await rebuilder.rebuild(acme, ONE["incidents"])
    assert await dump(app_connection) == right


@pytest.mark.parametrize("in_memory", [0, 10, 10**6])
async def test_all_projections_are_rebuilt_from_one_reading(rebuilder, busy, app_connection, monkeypatch, in_memory):
    monkeypatch.setattr("opsentry.projections.engine.replay.MAX_ROWS_IN_MEMORY", in_memory)
    acme, globex, _ = busy
    right = await dump(app_connection)
    await app_connection.execute("UPDATE checkpoints SET position = 0")
    for projection in projections():
        for tenant_id in (acme, globex):
            await clear(app_connection, projection, tenant_id)
    for tenant_id in (acme, globex):
        read: list[int] = []
        assert sorted(await rebuilder.rebuild(tenant_id, on_progress=read.append, chunk_events=7)) == sorted(ONE)
        kinds = [kind for projection in projections() for kind in projection.kinds]
        assert sum(read) == await app_connection.fetchval(
            "SELECT count(*) FROM events WHERE tenant_id = $1 AND stream_kind = ANY($2)", tenant_id, kinds
        )
    assert await dump(app_connection) == right
    rows = await app_connection.fetch("SELECT generation, rebuilt_at FROM checkpoints")
    assert all(row["rebuilt_at"] is not None for row in rows)
    assert await rebuilder.of().pending_tenants(10) == {}


async def test_commands_continue_during_a_rebuild_and_lose_nothing(rebuilder, busy, parts, app_connection):
    acme, _, number = busy
    stopping = False

    async def command():
        written = 0
        while not stopping or written < 20:
            change = PostUpdate(message=f"live {written}")
            done = await commands.change(parts, incident.DECIDER, acme, number, change, META)
            await parts.projector.catch_up(acme, done.position)
            written += 1
        return written

    live = asyncio.create_task(command())
    for _ in range(3):
        assert await rebuilder.rebuild(acme, chunk_events=10)
    stopping = True
    written = await live
    assert await rebuilder.verify(acme) == RIGHT
    updates = "SELECT count(*) FROM incident_updates WHERE tenant_id = $1 AND incident_id = $2"
    assert await app_connection.fetchval(updates, acme, number) == 121 + written


async def test_events_appended_during_a_replay_are_applied_before_the_commit(rebuilder, busy, parts, app_connection):
    acme, _, number = busy
    late: list[int] = []

    async def append_more():
        change = PostUpdate(message=f"late {len(late)}")
        done = await commands.change(parts, incident.DECIDER, acme, number, change, META)
        late.append(done.position)

    assert await rebuilder.rebuild(acme, between_chunks=append_more, chunk_events=50)
    assert late
    positions = await app_connection.fetch("SELECT position FROM checkpoints WHERE tenant_id = $1", acme)
    assert {row["position"] for row in positions} == {late[-1]}
    assert await rebuilder.verify(acme) == RIGHT


async def test_reads_show_the_old_rows_until_the_rebuild_commits(rebuilder, busy, app_connection):
    acme, _, _ = busy
    await app_connection.execute("UPDATE incidents SET body = replace(body, 'Down', 'Up') WHERE tenant_id = $1", acme)
    before = await dump(app_connection)
    looked: list[bool] = []

    async def look():
        looked.append(await dump(app_connection) == before)

    assert await rebuilder.rebuild(acme, ONE["incidents"], between_chunks=look, chunk_events=10)
    assert looked
    assert all(looked)
    assert await rebuilder.verify(acme) == RIGHT


async def test_a_second_rebuild_of_a_tenant_does_nothing(rebuilder, busy, owner):
    acme, globex, _ = busy
    async with owner.transaction():
        await owner.execute("SELECT pg_advisory_xact_lock(hashtextextended('rebuild', $1))", acme)
        assert await rebuilder.rebuild(acme) == []
        assert await rebuilder.rebuild(globex)
        assert list(await rebuilder.of().pending_tenants(10)) == [acme]


async def test_a_poison_event_fails_the_rebuild_and_changes_no_row(rebuilder, busy, owner, app_connection, parts):
    acme, _, number = busy
    right = await dump(app_connection)
    version = await owner.fetchval(
        "SELECT max(version) FROM events WHERE tenant_id = $1 AND stream_kind = 'incident' AND stream_id = $2",
        acme,
        number,
    )
    position = await plant(owner, acme, number, version + 1, type="incident.exploded")
    assert sorted(await rebuilder.rebuild(acme)) == ["maintenance", "services", "subscriptions"]
    halted = await management.list_halted(app_connection)
    assert {(row["projection"], row["phase"], row["position"]) for row in halted} == {
        (name, "rebuild", position) for name in ("impact", "incidents", "outbox")
    }
    assert all("incident.exploded" in row["error"] for row in halted)
    assert await dump(app_connection) == right
    assert await rebuilder.of().pending_tenants(10) == {}
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute("UPDATE events SET type = 'incident.updated' WHERE type = 'incident.exploded'")
    await management.retry_halted(app_connection, list(ONE), acme)
    assert list(await rebuilder.of().pending_tenants(10)) == [acme]
    assert sorted(await rebuilder.of().rebuild(acme)) == ["impact", "incidents", "outbox"]
    assert await rebuilder.verify(acme) == RIGHT
    assert await management.list_halted(app_connection) == []


async def test_a_defect_in_a_replay_names_its_event(rebuilder, busy, app_connection, monkeypatch):
    acme, _, _ = busy
    real = impact_state.evolve
    positions = "SELECT position FROM events WHERE tenant_id = $1 AND stream_kind = 'incident' AND version = 60"
    position = await app_connection.fetchval(positions, acme)

    def broken(state, recorded):
        if recorded.position >= position and recorded.kind == "incident":
            raise ZeroDivisionError("a defect")
        return real(state, recorded)

    monkeypatch.setattr(impact_state, "evolve", broken)
    assert "impact" not in await rebuilder.rebuild(acme)
    (row,) = await management.list_halted(app_connection)
    assert (row["projection"], row["position"], row["error"]) == ("impact", position, "ZeroDivisionError: a defect")


async def test_a_rebuild_of_all_tenants_continues_where_it_stopped(rebuilder, busy, app_connection):
    acme, globex, _ = busy
    found = rebuilder.of(ONE["incidents"])
    await found.request()
    assert sorted(await found.pending_tenants(10)) == sorted([acme, globex])
    assert await found.rebuild(acme) == ["incidents"]
    await found.request()
    assert list(await found.pending_tenants(10)) == [globex]
    assert await found.rebuild(acme) == []
    assert await found.rebuild(globex) == ["incidents"]
    assert await found.pending_tenants(10) == {}
    await found.request()
    assert len(await found.pending_tenants(10)) == 2
    generations = await app_connection.fetch("SELECT generation FROM projections WHERE name = 'incidents'")
    assert [row["generation"] for row in generations] == [2]


async def test_a_raised_version_rebuilds_everything_and_older_code_never_undoes_it(
    rebuilder, busy, parts, app_connection
):
    acme, globex, number = busy
    await management.register(app_connection, projections())
    newer = next(projection for projection in projections() if projection.name == "incidents")
    newer.version = 2
    assert await management.register(app_connection, [newer]) == ["incidents"]
    assert await management.register(app_connection, [newer]) == []
    older, found = rebuilder.of(ONE["incidents"]), rebuilder.of(newer)
    assert await older.pending_tenants(10) == {}
    assert sorted(await found.pending_tenants(10)) == sorted([acme, globex])
    for tenant_id in (acme, globex):
        assert await found.rebuild(tenant_id) == ["incidents"]
    assert await found.pending_tenants(10) == {}
    # A process of the older version still runs and handles a command.
    done = await commands.change(parts, incident.DECIDER, acme, number, PostUpdate(message="m"), META)
    await parts.projector.catch_up(acme, done.position)
    assert list(await found.pending_tenants(10)) == [acme]
    assert await management.register(app_connection, projections()) == []


async def test_a_new_projection_is_rebuilt_for_all_tenants(rebuilder, busy, app_connection):
    acme, globex, _ = busy
    right = await dump(app_connection)
    await management.register(app_connection, projections())
    for statement in ("DELETE FROM checkpoints WHERE projection = 'impact'", "DELETE FROM impact_states"):
        await app_connection.execute(statement)
    await app_connection.execute("DELETE FROM service_impacts")
    await app_connection.execute("UPDATE projections SET version = 0 WHERE name = 'impact'")
    assert await management.register(app_connection, projections()) == ["impact"]
    assert sorted(await rebuilder.of().pending_tenants(10)) == sorted([acme, globex])
    for tenant_id in (acme, globex):
        assert await rebuilder.of().rebuild(tenant_id) == ["impact"]
    assert await dump(app_connection) == right


async def test_a_paused_projection_stays_and_misses_nothing_after_a_resume(rebuilder, busy, parts, app_connection):
    acme, _, number = busy
    await management.register(app_connection, projections())
    assert await management.pause(app_connection, ["incidents"]) == ["incidents"]
    assert await management.pause(app_connection, ["incidents"]) == []
    done = await commands.change(parts, incident.DECIDER, acme, number, PostUpdate(message="paused"), META)
    await parts.projector.catch_up(acme, done.position)
    positions = {r["projection"]: r["position"] for r in await app_connection.fetch("SELECT * FROM checkpoints")}
    assert await rebuilder.rebuild(acme, ONE["incidents"]) == []
    shown = {
        row["projection"]: (row["lagging"], row["paused"])
        for row in await management.projection_status(app_connection, projections())
    }
    assert shown["incidents"] == (1, True)
    assert shown["impact"] == (0, False)
    assert positions
    assert await parts.projector.lagging_tenants() == []
    row = await parts.projector.read(
        acme, lambda connection: incidents_module.select_incident(connection, acme, number)
    )
    assert b"paused" not in row["body"]
    assert await management.resume(app_connection, ["incidents"]) == ["incidents"]
    assert await parts.projector.lagging_tenants() == [acme]
    await parts.projector.catch_up(acme, done.position)
    assert await parts.projector.lagging_tenants() == []
    row = await parts.projector.read(
        acme, lambda connection: incidents_module.select_incident(connection, acme, number)
    )
    assert b"paused" in row["body"]


async def test_lists_have_another_tag_after_a_rebuild(rebuilder, busy, app_connection):
    acme, _, _ = busy

    async def tag():
        return (await incidents_module.select_active_incidents(app_connection, acme))["tag"]

    before = await tag()
    assert await tag() == before
    await rebuilder.rebuild(acme, ONE["incidents"])
    assert await tag() != before

import asyncio

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.decider import TransitionRefused
from opsentry.domain.incident import ChangeIncident, OpenIncident, PostUpdate
from opsentry.domain.subscription import CreateSubscription
from opsentry.projections.rebuild import Rebuilder
from opsentry.projections.runner import Poison
from opsentry.wiring import projections
from tests.conftest import META, make_service
from tests.projections.histories import dump, schedule
from tests.projections.planting import plant

CHANGES = st.sampled_from([*incident.STATUSES, *incident.SEVERITIES])
# The order in which rows were last written shows nowhere; what they hold does.
DAMAGE = {
    "services": "UPDATE services SET name = 'wrong'",
    "incidents": "UPDATE incident_updates SET body = replace(body, 'message 3', 'wrong');"
    " UPDATE incident_counts SET incidents = 7",
    "maintenance": "DELETE FROM maintenance",
    "impact": "UPDATE impact_periods SET from_at = from_at - interval '1 hour'",
    "outbox": "DELETE FROM outbox_state WHERE kind = 'incident'",
}


@pytest.fixture
async def busy(parts, acme, globex):
    """Two tenants with something of everything, one incident of 120 messages among it."""
    numbers = []
    for tenant in (acme, globex):
        wish = CreateSubscription(channel="webhook", target="x")
        await parts.commands.create(subscription.DECIDER, tenant.id, wish, META)
        service_id = await make_service(parts, tenant.id, "web")
        opened = OpenIncident(title="Down", description="D", severity="critical", service_ids=(service_id,))
        made = await parts.commands.create(incident.DECIDER, tenant.id, opened, META)
        numbers.append(made.stream_id)
        for number in range(120):
            await parts.commands.execute(
                incident.DECIDER, tenant.id, made.stream_id, PostUpdate(message=f"message {number}"), META
            )
        await parts.commands.create(maintenance.DECIDER, tenant.id, schedule(service_ids=(service_id,)), META)
        await parts.runner.catch_up(tenant.id, 0)
    return acme.id, globex.id, numbers[0]


@pytest.fixture
def rebuilder(parts):
    return Rebuilder(parts.database)


@pytest.mark.parametrize("projection", projections(), ids=lambda p: p.name)
async def test_damaged_rows_are_found_and_derived_anew(rebuilder, busy, app_connection, projection):
    acme, globex, _ = busy
    right = await dump(app_connection)
    assert await rebuilder.verify(projection, acme) is None
    await app_connection.execute(DAMAGE[projection.name])
    assert await dump(app_connection) != right
    difference = await rebuilder.verify(projection, acme)
    assert difference is not None
    assert difference.table in projection.tables
    assert difference.live != difference.folded
    for tenant_id in (acme, globex):
        done: list[int] = []
        assert await rebuilder.rebuild(projection, tenant_id, done.append)
        assert sum(done) == await app_connection.fetchval("SELECT seq FROM heads WHERE tenant_id = $1", tenant_id)
        assert await rebuilder.verify(projection, tenant_id) is None
    assert await dump(app_connection) == right


@pytest.mark.parametrize("projection", projections(), ids=lambda p: p.name)
async def test_rows_that_are_right_are_not_written(rebuilder, busy, app_connection, projection):
    acme, _, _ = busy
    places = {t: await app_connection.fetch(f"SELECT ctid, xmin FROM {t} ORDER BY ctid") for t in projection.tables}
    assert await rebuilder.rebuild(projection, acme)
    for table, before in places.items():
        assert await app_connection.fetch(f"SELECT ctid, xmin FROM {table} ORDER BY ctid") == before
    row = await app_connection.fetchrow(
        "SELECT generation, rebuilt_at FROM checkpoints WHERE tenant_id = $1 AND projection = $2", acme, projection.name
    )
    assert row["generation"] == 1
    assert row["rebuilt_at"] is not None


async def test_commands_go_on_while_a_tenant_is_rebuilt_and_nothing_is_lost(rebuilder, busy, parts, app_connection):
    acme, _, number = busy
    stopping = False

    async def command():
        written = 0
        while not stopping or written < 20:
            change = PostUpdate(message=f"live {written}")
            done = await parts.commands.execute(incident.DECIDER, acme, number, change, META)
            await parts.runner.catch_up(acme, done.seq)
            written += 1
        return written

    live = asyncio.create_task(command())
    for _ in range(3):
        for projection in projections():
            assert await rebuilder.rebuild(projection, acme)
    stopping = True
    written = await live
    for projection in projections():
        assert await rebuilder.verify(projection, acme) is None
    updates = "SELECT count(*) FROM incident_updates WHERE tenant_id = $1 AND incident_id = $2"
    assert await app_connection.fetchval(updates, acme, number) == 121 + written


async def test_readers_see_the_old_rows_until_the_new_ones_are_whole(rebuilder, busy, app_connection, monkeypatch):
    acme, _, _ = busy
    right = await dump(app_connection)
    incidents = next(p for p in projections() if p.name == "incidents")
    real = type(incidents).apply

    async def watched(self, connection, tenant_id, events):
        await real(self, connection, tenant_id, events)
        assert await dump(app_connection) == right

    monkeypatch.setattr(type(incidents), "apply", watched)
    assert await rebuilder.rebuild(incidents, acme)
    assert await dump(app_connection) == right


async def test_a_second_rebuild_of_the_same_leaves_it_to_the_first(rebuilder, busy, owner):
    acme, _, _ = busy
    async with owner.transaction():
        await owner.execute("SELECT pg_advisory_xact_lock(hashtextextended('rebuild incidents', $1))", acme)
        incidents = next(p for p in projections() if p.name == "incidents")
        assert not await rebuilder.rebuild(incidents, acme)
        assert await rebuilder.rebuild(incidents, busy[1])


async def test_poison_leaves_the_rows_as_they_were(rebuilder, busy, owner, app_connection, parts):
    acme, _, number = busy
    right = await dump(app_connection)
    version = await owner.fetchval(
        "SELECT max(version) FROM events WHERE tenant_id = $1 AND stream_kind = 'incident' AND stream_id = $2",
        acme,
        number,
    )
    await plant(owner, acme, number, version + 1, type="incident.exploded")
    incidents = next(p for p in projections() if p.name == "incidents")
    with pytest.raises(Poison, match=r"incident\.exploded"):
        await rebuilder.rebuild(incidents, acme)
    assert await dump(app_connection) == right


async def test_a_rebuild_of_all_goes_on_where_it_was(rebuilder, busy, app_connection):
    acme, globex, _ = busy
    incidents = next(p for p in projections() if p.name == "incidents")
    left = await rebuilder.begin("incidents")
    assert [row["tenant_id"] for row in left] == sorted([acme, globex])
    await rebuilder.rebuild(incidents, acme)
    assert [row["tenant_id"] for row in await rebuilder.begin("incidents")] == [globex]
    await rebuilder.rebuild(incidents, globex)
    assert await rebuilder.begin("incidents") == []
    await rebuilder.end("incidents")
    assert len(await rebuilder.begin("incidents")) == 2


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.sampled_from([*incident.STATUSES, *incident.SEVERITIES]), max_size=12), size=st.integers(1, 9)
)
async def test_rebuilt_is_live_whatever_the_history_and_the_batches(rebuilder, parts, acme, changes, size):
    made = await parts.commands.create(incident.DECIDER, acme.id, OpenIncident(title="T", description="D"), META)
    for change in changes:
        field = "status" if change in incident.STATUSES else "severity"
        try:
            await parts.commands.execute(
                incident.DECIDER, acme.id, made.stream_id, ChangeIncident(**{field: change}), META
            )  # fmt: skip
        except TransitionRefused:
            continue
    await parts.runner.catch_up(acme.id, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsentry.projections.rebuild._BATCH", size)
        for projection in projections():
            assert await rebuilder.verify(projection, acme.id) is None
            assert await rebuilder.rebuild(projection, acme.id)
            assert await rebuilder.verify(projection, acme.id) is None

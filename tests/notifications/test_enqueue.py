"""Intents are taken over once, in order, and forgotten long after they ended."""

from opsentry.bootstrap import projections
from opsentry.domain.incident import PostUpdate, ResolveIncident
from opsentry.notifications.delivery import enqueue
from opsentry.projections.engine.rebuild import Rebuilder
from tests.conftest import make_tenant
from tests.notifications.desk import AGE, Desk, delivered


async def test_intents_are_taken_over_once_and_are_due(desk, owner):
    await desk.subscribe()
    await desk.open()
    assert await desk.take_over() == 1
    assert await desk.take_over() == 0
    assert await desk.take_over([desk.tenant.id]) == 0
    assert await owner.fetchval("SELECT count(*) FROM outbox_backlog") == 0
    (row,) = await desk.rows()
    intent = await owner.fetchrow("SELECT * FROM outbox_intents")
    assert (row["intent_id"], row["position"], row["topic"]) == (
        intent["intent_id"],
        intent["position"],
        "incident.opened",
    )
    head = await owner.fetchval("SELECT position FROM ledger_heads WHERE tenant_id = $1", desk.tenant.id)
    assert await owner.fetchval("SELECT position FROM outbox_cursors") == head
    (endpoint,), (due,) = await desk.claim()
    assert (due.intent_id, due.position, due.attempts_in_round) == (intent["intent_id"], intent["position"], 0)
    assert await desk.claim() == ([], [])
    await desk.record(delivered(endpoint, due))
    assert await desk.states() == ["delivered"]
    (attempt,) = await owner.fetch("SELECT * FROM delivery_attempts")
    assert (attempt["number"], attempt["response_status"], attempt["error"], attempt["duration_ms"]) == (
        1,
        200,
        None,
        3,
    )
    assert await owner.fetchval("SELECT available_at FROM endpoints") is None


async def test_a_rebuild_and_a_new_rule_make_nothing_be_sent_again(desk, owner):
    await desk.subscribe()
    one = await desk.open()
    await desk.take_over()
    (endpoint,), dues = await desk.claim()
    await desk.record(delivered(endpoint, *dues))
    rebuilder = Rebuilder(desk.parts.database, projections())
    await owner.execute("UPDATE checkpoints SET generation = -1")
    await rebuilder.rebuild(desk.tenant.id)
    assert await desk.take_over() == 0
    # A rule that tells more of what is old.
    await owner.execute(
        "INSERT INTO outbox_intents SELECT tenant_id, gen_random_uuid(), position, subscription_id,"
        " channel, 'incident.new',"
        " stream_kind, stream_id, suppressed, created_at FROM outbox_intents"
    )
    assert await desk.take_over() == 0
    assert await desk.take_over([desk.tenant.id]) == 0
    assert await desk.states() == ["delivered"]
    await desk.tell(one, ResolveIncident())
    assert await desk.take_over() == 1


async def test_forgetting_what_ended_long_ago_makes_nothing_be_sent_again(desk, owner):
    await desk.subscribe()
    one = await desk.open()
    await desk.tell(one, PostUpdate(message="m"))
    await desk.take_over()
    (endpoint,), dues = await desk.claim()
    await desk.record(delivered(endpoint, *dues))
    await owner.execute(
        "UPDATE deliveries SET finalized_at = finalized_at - interval '91 days' WHERE finalized_at IS NOT NULL"
    )
    async with desk.parts.database.transaction(10) as connection:
        assert await enqueue.prune_deliveries(connection, 90, 100) == 1
    assert await desk.states() == ["pending"]
    assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 0
    rebuilder = Rebuilder(desk.parts.database, projections())
    await owner.execute("UPDATE checkpoints SET generation = -1")
    await rebuilder.rebuild(desk.tenant.id)
    await desk.take_over()
    _, (due,) = await desk.claim()
    assert due.changes[0].type == "incident.updated"
    assert await desk.states() == ["pending"]


async def test_a_tenant_with_very_many_is_taken_over_some_at_a_time(desk, owner):
    for _ in range(3):
        await desk.subscribe()
    for _ in range(5):
        await desk.open()
    counts, reached = [], []
    while await desk.take_over(limit=4):
        counts.append(len(await desk.rows()))
        reached.append(await owner.fetchval("SELECT position FROM outbox_cursors"))
    assert counts == [4, 8, 12, 15]
    # Up to where everybody is told: of one event at the end of the first part two of three were, then one was.
    opened = [
        row["position"]
        for row in await owner.fetch("SELECT position FROM events WHERE type = 'incident.opened' ORDER BY 1")
    ]
    head = await owner.fetchval("SELECT max(position) FROM events")
    assert reached == [opened[1] - 1, opened[2] - 1, opened[4] - 1, head]
    assert await owner.fetchval("SELECT count(*) FROM outbox_backlog") == 0
    assert len({(row["position"], row["subscription_id"]) for row in await desk.rows()}) == 15


async def test_parts_of_an_event_that_were_taken_over_are_not_again_after_a_rebuild(desk, owner):
    for _ in range(3):
        await desk.subscribe()
    await desk.open()
    assert await desk.take_over(limit=2) == 2
    await owner.execute("UPDATE checkpoints SET generation = -1")
    await Rebuilder(desk.parts.database, projections()).rebuild(desk.tenant.id)
    assert await desk.take_over(limit=2) == 1
    assert await desk.take_over(limit=2) == 0
    assert await desk.states() == ["pending"] * 3


async def test_what_another_message_tells_is_kept_as_long_as_that(desk, owner):
    desk.burst = 100.0
    await desk.subscribe()
    one = await desk.open()
    await desk.tell(one, PostUpdate(message="m"))
    await desk.take_over()
    await owner.execute(AGE, 100.0)
    await owner.execute("UPDATE endpoints SET available_at = now()")
    (endpoint,), (due,) = await desk.claim()
    await owner.execute("UPDATE deliveries SET finalized_at = now() - interval '91 days' WHERE state = 'coalesced'")

    async def prune():
        async with desk.parts.database.transaction(10) as connection:
            return await enqueue.prune_deliveries(connection, 90, 100)

    assert await prune() == 0
    await desk.record(delivered(endpoint, due))
    await owner.execute("UPDATE deliveries SET finalized_at = now() - interval '91 days' WHERE state = 'delivered'")
    assert (await prune(), await prune()) == (1, 1)
    assert await desk.rows() == []


async def test_each_tenants_deliveries_are_its_own(parts, desk):
    other = Desk(parts, await make_tenant(parts, "initech"))
    await other.subscribe()
    await desk.open()
    await desk.take_over()
    await other.take_over()
    assert await desk.rows() == []
    assert await other.rows() == []

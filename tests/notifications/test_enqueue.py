"""Intents are enqueued once, in order. Old deliveries are pruned."""

from opsentry.bootstrap import projections
from opsentry.domain.incident import PostUpdate, ResolveIncident
from opsentry.notifications.delivery import enqueue
from opsentry.projections.engine.rebuild import Rebuilder
from tests.conftest import make_tenant
from tests.notifications.driver import AGE, DeliveryDriver, delivered


async def test_intents_are_enqueued_once_and_are_due(driver, owner):
    await driver.subscribe()
    await driver.open_incident()
    assert await driver.enqueue() == 1
    assert await driver.enqueue() == 0
    assert await driver.enqueue([driver.tenant.id]) == 0
    assert await owner.fetchval("SELECT count(*) FROM outbox_backlog") == 0
    (row,) = await driver.rows()
    intent = await owner.fetchrow("SELECT * FROM outbox_intents")
    assert (row["intent_id"], row["position"], row["topic"]) == (
        intent["intent_id"],
        intent["position"],
        "incident.opened",
    )
    head = await owner.fetchval("SELECT position FROM ledger_heads WHERE tenant_id = $1", driver.tenant.id)
    assert await owner.fetchval("SELECT position FROM outbox_cursors") == head
    (endpoint,), (due,) = await driver.lease()
    assert (due.intent_id, due.position, due.attempts_in_round) == (intent["intent_id"], intent["position"], 0)
    assert await driver.lease() == ([], [])
    await driver.record(delivered(endpoint, due))
    assert await driver.states() == ["delivered"]
    (attempt,) = await owner.fetch("SELECT * FROM delivery_attempts")
    assert (attempt["number"], attempt["response_status"], attempt["error"], attempt["duration_ms"]) == (
        1,
        200,
        None,
        3,
    )
    assert await owner.fetchval("SELECT available_at FROM endpoints") is None


async def test_neither_a_rebuild_nor_a_changed_rule_sends_old_events_again(driver, owner):
    await driver.subscribe()
    one = await driver.open_incident()
    await driver.enqueue()
    (endpoint,), dues = await driver.lease()
    await driver.record(delivered(endpoint, *dues))
    rebuilder = Rebuilder(driver.parts.database, projections())
    await owner.execute("UPDATE checkpoints SET generation = -1")
    await rebuilder.rebuild(driver.tenant.id)
    assert await driver.enqueue() == 0
    # A changed rule derives another intent for an old event.
    await owner.execute(
        "INSERT INTO outbox_intents SELECT tenant_id, gen_random_uuid(), position, subscription_id,"
        " channel, 'incident.new',"
        " stream_kind, stream_id, suppressed, created_at FROM outbox_intents"
    )
    assert await driver.enqueue() == 0
    assert await driver.enqueue([driver.tenant.id]) == 0
    assert await driver.states() == ["delivered"]
    await driver.change_incident(one, ResolveIncident())
    assert await driver.enqueue() == 1


async def test_pruning_old_deliveries_sends_nothing_again(driver, owner):
    await driver.subscribe()
    one = await driver.open_incident()
    await driver.change_incident(one, PostUpdate(message="m"))
    await driver.enqueue()
    (endpoint,), dues = await driver.lease()
    await driver.record(delivered(endpoint, *dues))
    await owner.execute(
        "UPDATE deliveries SET finalized_at = finalized_at - interval '91 days' WHERE finalized_at IS NOT NULL"
    )
    async with driver.parts.database.transaction(10) as connection:
        assert await enqueue.prune_deliveries(connection, 90, 100) == 1
    assert await driver.states() == ["pending"]
    assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 0
    rebuilder = Rebuilder(driver.parts.database, projections())
    await owner.execute("UPDATE checkpoints SET generation = -1")
    await rebuilder.rebuild(driver.tenant.id)
    await driver.enqueue()
    _, (due,) = await driver.lease()
    assert due.changes[0].type == "incident.updated"
    assert await driver.states() == ["pending"]


async def test_intents_of_a_large_tenant_are_enqueued_in_batches(driver, owner):
    for _ in range(3):
        await driver.subscribe()
    for _ in range(5):
        await driver.open_incident()
    counts, reached = [], []
    while await driver.enqueue(limit=4):
        counts.append(len(await driver.rows()))
        reached.append(await owner.fetchval("SELECT position FROM outbox_cursors"))
    assert counts == [4, 8, 12, 15]
    # The cursor passes an event only with its last intent. The first batch ends within an event, after two of three.
    opened = [
        row["position"]
        for row in await owner.fetch("SELECT position FROM events WHERE type = 'incident.opened' ORDER BY 1")
    ]
    head = await owner.fetchval("SELECT max(position) FROM events")
    assert reached == [opened[1] - 1, opened[2] - 1, opened[4] - 1, head]
    assert await owner.fetchval("SELECT count(*) FROM outbox_backlog") == 0
    assert len({(row["position"], row["subscription_id"]) for row in await driver.rows()}) == 15


async def test_an_event_enqueued_in_part_is_completed_after_a_rebuild(driver, owner):
    for _ in range(3):
        await driver.subscribe()
    await driver.open_incident()
    assert await driver.enqueue(limit=2) == 2
    await owner.execute("UPDATE checkpoints SET generation = -1")
    await Rebuilder(driver.parts.database, projections()).rebuild(driver.tenant.id)
    assert await driver.enqueue(limit=2) == 1
    assert await driver.enqueue(limit=2) == 0
    assert await driver.states() == ["pending"] * 3


async def test_a_coalesced_delivery_is_kept_as_long_as_the_one_that_reported_it(driver, owner):
    driver.coalesce_seconds = 100.0
    await driver.subscribe()
    one = await driver.open_incident()
    await driver.change_incident(one, PostUpdate(message="m"))
    await driver.enqueue()
    await owner.execute(AGE, 100.0)
    await owner.execute("UPDATE endpoints SET available_at = now()")
    (endpoint,), (due,) = await driver.lease()
    await owner.execute("UPDATE deliveries SET finalized_at = now() - interval '91 days' WHERE state = 'coalesced'")

    async def prune():
        async with driver.parts.database.transaction(10) as connection:
            return await enqueue.prune_deliveries(connection, 90, 100)

    assert await prune() == 0
    await driver.record(delivered(endpoint, due))
    await owner.execute("UPDATE deliveries SET finalized_at = now() - interval '91 days' WHERE state = 'delivered'")
    assert (await prune(), await prune()) == (1, 1)
    assert await driver.rows() == []


async def test_intents_of_one_tenant_reach_no_subscription_of_another(parts, driver):
    other = DeliveryDriver(parts, await make_tenant(parts, "initech"))
    await other.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    await other.enqueue()
    assert await driver.rows() == []
    assert await other.rows() == []

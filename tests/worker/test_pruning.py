from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident
from opsentry.events.store import IdempotencyKey
from opsentry.worker import worker
from opsentry.worker.worker import Worker
from tests.conftest import META
from tests.notifications.desk import Desk, delivered


async def test_keys_that_were_kept_long_enough_are_forgotten_and_others_are_not(parts, acme, owner, monkeypatch):
    monkeypatch.setattr(worker, "_PRUNE_BATCH", 3)
    for number in range(10):
        key = IdempotencyKey(b"%032d" % number, b"f" * 32)
        await parts.commands.create(incident.DECIDER, acme.id, OpenIncident(title="T"), META, key=key)
    await owner.execute(
        "UPDATE idempotency_keys SET recorded_at = recorded_at - interval '25 hours' WHERE key < $1", b"%032d" % 7
    )
    await Worker(parts.database, parts.commands, parts.projector, keys_kept=24 * 3600).prune_keys()
    kept = await owner.fetch("SELECT key FROM idempotency_keys ORDER BY key")
    assert [row["key"] for row in kept] == [b"%032d" % number for number in (7, 8, 9)]


async def test_what_came_of_messages_long_ago_is_forgotten_and_what_waits_is_not(parts, acme, owner, monkeypatch):
    monkeypatch.setattr(worker, "_PRUNE_BATCH", 3)
    desk = Desk(parts, acme)
    await desk.subscribe()
    for _ in range(9):
        await desk.open()
    await desk.take_over()
    (endpoint,), dues = await desk.claim()
    await desk.record(delivered(endpoint, *dues[:8]))
    await owner.execute(
        "UPDATE deliveries SET settled_at = settled_at - interval '31 days' WHERE intent_id = ANY($1)",
        [due.intent_id for due in dues[:7]],
    )
    await Worker(parts.database, parts.commands, parts.projector, delivery_retention_days=30).prune_deliveries()
    assert sorted(await desk.states()) == ["delivered", "waiting"]
    assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 1

from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident
from opsentry.events.store import IdempotencyKey
from opsentry.worker.tasks import delivery_retention, idempotency_keys
from opsentry.worker.tasks.delivery_retention import DeliveryRetention
from opsentry.worker.tasks.idempotency_keys import IdempotencyKeys
from tests import commands
from tests.conftest import META
from tests.notifications.driver import DeliveryDriver, delivered


async def test_expired_idempotency_keys_are_deleted_and_others_stay(parts, acme, owner, monkeypatch):
    monkeypatch.setattr(idempotency_keys, "BATCH_SIZE_KEYS", 3)
    for number in range(10):
        key = IdempotencyKey(b"%032d" % number, b"f" * 32)
        await commands.create(parts, incident.DECIDER, acme.id, OpenIncident(title="T"), META, key=key)
    await owner.execute(
        "UPDATE idempotency_keys SET recorded_at = recorded_at - interval '25 hours' WHERE key < $1", b"%032d" % 7
    )
    await IdempotencyKeys(parts.application, ttl_hours=24).delete_expired_keys()
    kept = await owner.fetch("SELECT key FROM idempotency_keys ORDER BY key")
    assert [row["key"] for row in kept] == [b"%032d" % number for number in (7, 8, 9)]


async def test_old_final_deliveries_are_deleted_and_pending_ones_stay(parts, acme, owner, monkeypatch):
    monkeypatch.setattr(delivery_retention, "BATCH_SIZE_DELIVERIES", 3)
    driver = DeliveryDriver(parts, acme)
    await driver.subscribe()
    for _ in range(9):
        await driver.open_incident()
    await driver.enqueue()
    (endpoint,), dues = await driver.lease()
    await driver.record(delivered(endpoint, *dues[:8]))
    await owner.execute(
        "UPDATE deliveries SET finalized_at = finalized_at - interval '31 days' WHERE intent_id = ANY($1)",
        [due.intent_id for due in dues[:7]],
    )
    await DeliveryRetention(parts.application, retention_days=30).delete_old_deliveries()
    assert sorted(await driver.states()) == ["delivered", "pending"]
    assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 1

"""Operators measure, retry, cancel and pause sending; readiness reports its backlog."""

import json
from uuid import UUID

import pytest

from opsentry.application import readiness
from opsentry.bootstrap import projections
from opsentry.domain import subscription
from opsentry.domain.incident import ResolveIncident
from opsentry.domain.subscription import ChangeSubscription
from opsentry.notifications.delivery import management
from opsentry.notifications.delivery.management import DeliverySelection, SendingBacklog
from opsentry.notifications.delivery.results import DeliveryResult, EndpointResults, Release
from opsentry.notifications.delivery.retry_policy import EndpointHealth
from opsentry.notifications.delivery.states import CANCELLABLE_STATES, RETRYABLE_STATES
from opsentry.projections.engine import management as projecting
from tests import commands
from tests.api.conftest import make_operator
from tests.conftest import META, Client, expire_caches
from tests.notifications.driver import delivered
from tests.projections.planting import plant
from tests.system.processes import environment, opsentry

MANY = """
INSERT INTO deliveries (tenant_id, intent_id, subscription_id, stream_kind, stream_id, position, channel,
topic, created_at,
    next_attempt_at, attempts_in_round)
SELECT $1, gen_random_uuid(), 1, 'incident', n, 1, 'webhook', 'incident.opened', now(),
    now() + $3 * interval '1 second', $4
FROM generate_series(1, $2::int) AS n
"""
ENDPOINT = """
INSERT INTO endpoints (tenant_id, subscription_id, channel, available_at)
VALUES ($1, 1, 'webhook', now() + $2 * interval '1 second')
"""


@pytest.fixture
async def ready(http, base_url, parts, monkeypatch):
    expire_caches(monkeypatch)
    operator = Client(http, base_url, await make_operator(parts))

    async def ask():
        status, body, _ = await operator.send("GET", "/health/ready")
        outbox = body["checks"]["outbox"]
        assert (outbox["status"] == "ok") == (status == 200)
        return status, outbox

    return ask


@pytest.fixture
def backlog(parts):
    async def ask(limit=10):
        async with parts.database.transaction(10) as connection:
            return await management.measure_backlog(connection, limit)

    return ask


async def move(parts, how, chosen):
    return await how(parts.database, chosen, seconds=10)


async def exhausted(driver):
    """Make an exhausted delivery and a pending one behind it; return the intents of both."""
    await driver.subscribe()
    one = await driver.open_incident()
    await driver.change_incident(one, ResolveIncident())
    await driver.enqueue()
    (endpoint,), (due,) = await driver.lease()
    result = DeliveryResult(due, "exhausted", None, 500, "answered 500", 5)
    await driver.record(EndpointResults(endpoint, [result], Release(EndpointHealth(1, 1))))
    return [row["intent_id"] for row in await driver.rows()]


async def test_the_backlog_counts_due_deliveries_and_unseen_events(driver, globex, backlog, owner):
    for tenant in (driver.tenant, globex):
        await driver.parts.projector.catch_up(tenant.id, 0)
    assert await backlog() == SendingBacklog(
        0, 0, None, 0, 0, is_paused=False, unseen_events=0, oldest_unseen_seconds=None, halted_tenants=0
    )
    await driver.subscribe()
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    for _ in range(3):
        await driver.open_incident()
    lagging = await backlog()
    assert (lagging.due, lagging.unseen_events) == (0, 3)
    assert lagging.oldest_unseen_seconds >= 0
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    projected = await backlog()
    assert (projected.due, projected.due_deliveries, projected.unseen_events) == (3, 0, 0)
    assert projected.oldest_due_seconds >= 0
    assert (await backlog(2)).due == 2
    await driver.enqueue()
    enqueued = await backlog()
    assert (enqueued.due, enqueued.due_deliveries, enqueued.pending_deliveries) == (3, 3, 3)
    assert (await backlog(2)).due == 2
    (endpoint,), dues = await driver.lease(lease_seconds=60.0)
    leased = await backlog()
    assert (leased.due, leased.pending_deliveries) == (0, 3)
    await owner.execute("UPDATE endpoints SET available_at = now() - interval '1 second'")
    assert (await backlog()).due == 3, "the sender died and its lease expired"
    await driver.record(delivered(endpoint, *dues))
    assert (await backlog()).pending_deliveries == 0
    await plant(owner, globex.id, 1, 1, data="{")
    await driver.parts.projector.catch_up(globex.id, 0)
    halted = await backlog()
    assert (halted.unseen_events, halted.halted_tenants) == (1, 1)


async def test_readiness_fails_while_nobody_sends(driver, ready, owner):
    """It fails both before and after the intents are enqueued."""
    await driver.subscribe()
    await driver.open_incident()
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    assert (await ready())[0] == 200
    await owner.execute(
        "INSERT INTO outbox_intents SELECT tenant_id, gen_random_uuid(), position, subscription_id, channel, topic,"
        " stream_kind, stream_id + n, suppressed, created_at FROM outbox_intents, generate_series(1, 1000) AS n"
    )
    status, outbox = await ready()
    assert (status, outbox["pending"]) == (503, 1001)
    await driver.enqueue()
    status, outbox = await ready()
    assert (status, outbox["pending"]) == (503, 1001)
    await driver.enqueue()
    while (claimed := await driver.lease(per_endpoint=100))[0]:
        (endpoint,), dues = claimed
        await driver.record(delivered(endpoint, *dues))
    assert (await ready())[0] == 200


async def test_readiness_fails_once_a_delivery_is_due_for_five_minutes(driver, ready, owner):
    await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    for table, column in (("endpoints", "available_at"), ("deliveries", "next_attempt_at")):
        await owner.execute(f"UPDATE {table} SET {column} = now() - interval '299 seconds'")
    assert (await ready())[0] == 200
    for table, column in (("endpoints", "available_at"), ("deliveries", "next_attempt_at")):
        await owner.execute(f"UPDATE {table} SET {column} = now() - interval '301 seconds'")
    status, outbox = await ready()
    assert status == 503
    assert outbox["oldest_pending_seconds"] > 300
    (endpoint,), dues = await driver.lease()
    await driver.record(delivered(endpoint, *dues))
    assert (await ready())[0] == 200


async def test_readiness_fails_once_unseen_events_are_too_old(driver, ready, owner, monkeypatch):
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    await projecting.register(owner, projections())
    await projecting.pause(owner, ["outbox"])
    await driver.open_incident()
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    status, outbox = await ready()
    assert (status, outbox["lag_events"]) == (200, 1)
    monkeypatch.setattr(readiness, "MAX_PENDING_AGE_SECONDS", 0)
    assert (await ready())[0] == 503
    await projecting.resume(owner, ["outbox"])
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    assert (await ready())[0] == 200


async def test_scheduled_and_paused_deliveries_never_fail_readiness(driver, ready, owner):
    await owner.execute(MANY, driver.tenant.id, 5000, 3600, 3)
    await owner.execute(ENDPOINT, driver.tenant.id, 3600)
    status, outbox = await ready()
    assert (status, outbox["scheduled"], outbox["pending"]) == (200, 5000, 0)
    # The delivery is due, but its endpoint is not available yet.
    await owner.execute("UPDATE deliveries SET next_attempt_at = now() - interval '1 hour'")
    status, outbox = await ready()
    assert (status, outbox["scheduled"], outbox["pending"]) == (200, 5000, 0)
    await owner.execute("UPDATE endpoints SET available_at = now()")
    status, outbox = await ready()
    assert (status, outbox["pending"]) == (503, 1001)
    async with driver.parts.database.transaction(10) as connection:
        await management.pause_sending(connection, management.ALL_TENANTS)
    status, outbox = await ready()
    assert (status, outbox["pending"], outbox["paused"], outbox["scheduled"]) == (200, 0, True, 5000)


async def test_a_retry_starts_a_new_round_and_a_cancellation_lets_the_next_follow(driver, parts, owner):
    first, second = await exhausted(driver)
    (endpoint,), dues = await driver.lease()
    await driver.record(
        EndpointResults(
            endpoint,
            [DeliveryResult(dues[0], "pending", 7200.0, 500, "answered 500", 5)],
            Release(EndpointHealth(10, 1, 300)),
        )
    )
    assert (
        await move(parts, management.retry_deliveries, DeliverySelection(("exhausted",), tenant_id=driver.tenant.id))
        == 1
    )
    _, (again,) = await driver.lease(lease_seconds=0.0)
    assert (again.intent_id, again.attempts_in_round) == (first, 0)
    assert await move(parts, management.cancel_deliveries, DeliverySelection(CANCELLABLE_STATES, [first])) == 1
    assert await move(parts, management.cancel_deliveries, DeliverySelection(CANCELLABLE_STATES, [UUID(int=7)])) == 0
    assert await move(parts, management.retry_deliveries, DeliverySelection(RETRYABLE_STATES, [second])) == 1
    assert await driver.states() == ["cancelled", "pending"]
    _, (other,) = await driver.lease()
    assert other.intent_id == second


async def test_a_retried_delivery_precedes_younger_ones_of_its_ordering_key(driver, parts):
    first, second = await exhausted(driver)
    assert await move(parts, management.retry_deliveries, DeliverySelection(("exhausted",))) == 1
    _, dues = await driver.lease(lease_seconds=0.0)
    assert [due.intent_id for due in dues] == [first]
    assert second not in {due.intent_id for due in dues}


async def test_retries_at_a_probed_endpoint_follow_its_first_success(driver, parts, owner):
    await driver.subscribe()
    for _ in range(3):
        await driver.open_incident()
    await driver.enqueue()
    await owner.execute("UPDATE endpoints SET consecutive_failures = 12, available_at = now() + interval '5 minutes'")
    assert await driver.lease() == ([], [])
    assert await move(parts, management.retry_deliveries, DeliverySelection(("pending",))) == 3
    (endpoint,), dues = await driver.lease()
    assert (endpoint.health.consecutive_failures, len(dues)) == (9, 3)


async def test_a_disabled_delivery_can_be_retried_once_its_subscription_is_enabled(driver, parts, owner):
    number = await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    await owner.execute("UPDATE deliveries SET state = 'disabled', finalized_at = now(), next_attempt_at = NULL")

    async def switch(*, enabled):
        command = ChangeSubscription(enabled=enabled)
        done = await commands.change(parts, subscription.DECIDER, driver.tenant.id, number, command, META)
        await parts.projector.catch_up(driver.tenant.id, done.position)

    await switch(enabled=False)
    assert await move(parts, management.retry_deliveries, DeliverySelection(RETRYABLE_STATES)) == 0
    await switch(enabled=True)
    assert await move(parts, management.retry_deliveries, DeliverySelection(RETRYABLE_STATES)) == 1


async def test_many_deliveries_are_moved_in_batches(driver, parts, owner, monkeypatch):
    monkeypatch.setattr(management, "_MOVE_BATCH", 7)
    await owner.execute(MANY, driver.tenant.id, 50, 3600, 3)
    assert await move(parts, management.retry_deliveries, DeliverySelection(("pending",))) == 50
    assert await move(parts, management.cancel_deliveries, DeliverySelection(CANCELLABLE_STATES)) == 50
    assert set(await driver.states()) == {"cancelled"}


async def test_a_delivery_cancelled_in_flight_stays_cancelled(driver, parts):
    await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    (endpoint,), (due,) = await driver.lease()
    assert (
        await move(
            parts,
            management.cancel_deliveries,
            DeliverySelection(CANCELLABLE_STATES, tenant_id=driver.tenant.id),
        )
        == 1
    )
    await driver.record(delivered(endpoint, due))
    assert await driver.states() == ["cancelled"]
    assert await driver.lease() == ([], [])


async def test_the_commands_for_deliveries_and_sending(driver, settings):
    async def run(*arguments):
        ran = await opsentry(environment(settings), *arguments)
        assert "Traceback" not in ran.err
        return ran

    first, second = await exhausted(driver)
    names = [f"msg_{first.hex}", f"msg_{second.hex}"]
    (row,) = json.loads((await run("deliveries", "status", "--json")).out)
    assert (row["slug"], row["due"], row["exhausted"], row["paused"], row["failing"]) == ("acme", 1, 1, False, 1)
    rows = json.loads((await run("deliveries", "list", "--tenant", "acme", "--json")).out)
    assert [(row["id"], row["state"], row["error"]) for row in rows] == [
        (names[1], "pending", None),
        (names[0], "exhausted", "answered 500"),
    ]
    assert [
        row["id"] for row in json.loads((await run("deliveries", "list", "--state", "exhausted", "--json")).out)
    ] == names[:1]
    assert "acme" in (await run("deliveries", "status")).out
    assert (await run("deliveries", "retry", names[0])).out == "retried 1 delivery\n"
    ran = await run("deliveries", "cancel", names[0], "msg_" + "0" * 32)
    assert (ran.code, ran.out) == (1, "cancelled 1 delivery\n")
    ran = await run("deliveries", "cancel", "--all", "--tenant", "acme", "--yes", "--json")
    assert (ran.code, json.loads(ran.out)) == (0, {"cancelled": 1})
    assert await driver.states() == ["cancelled", "cancelled"]
    for arguments in (
        ("retry",),
        ("retry", "x"),
        ("cancel", "--all", names[0]),
        ("list", "--state", "x"),
        ("list", "--subscription", "1"),
    ):
        assert (await run("deliveries", *arguments)).code == 2
    assert (await run("deliveries", "cancel", "--all")).code == 1, "nobody said yes"
    assert (await run("deliveries", "status", "--tenant", "nobody")).code == 1
    assert (await run("sending", "pause", "--tenant", "acme")).out == "acme: paused\npaused now: acme\n"
    assert (await run("sending", "pause", "--tenant", "acme")).out == "acme: was paused already\npaused now: acme\n"
    assert (await run("sending", "pause")).out == "all tenants: paused\npaused now: (all tenants), acme\n"
    found = {row["slug"]: row["paused"] for row in json.loads((await run("deliveries", "status", "--json")).out)}
    assert found == {"(all tenants)": True, "acme": True}
    assert (await run("sending", "resume", "--tenant", "acme")).out == "acme: resumed\npaused now: (all tenants)\n"
    assert (await run("sending", "resume")).out == "all tenants: resumed\n"
    assert (await run("sending", "resume")).out == "all tenants: was not paused\n"
    for switch, tenant, changed, paused in (
        ("pause", ["--tenant", "acme"], True, ["acme"]),
        ("pause", ["--tenant", "acme"], False, ["acme"]),
        ("pause", [], True, ["(all tenants)", "acme"]),
        ("resume", [], True, ["acme"]),
        ("resume", ["--tenant", "acme"], True, []),
        ("resume", ["--tenant", "acme"], False, []),
    ):
        ran = await run("sending", switch, *tenant, "--json")
        assert (ran.code, json.loads(ran.out)) == (0, {"changed": changed, "paused": paused})
    key = (await opsentry(environment(settings), "keys", "generate")).out.strip()
    assert (await opsentry(environment(settings, OPSENTRY_ENCRYPTION_KEYS=key), "config")).code == 0

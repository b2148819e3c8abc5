"""Deliveries keep their order. Only the holder of a lease records results."""

import asyncio
from uuid import uuid4

from opsentry.domain import subscription
from opsentry.domain.incident import PostUpdate, ResolveIncident
from opsentry.notifications.delivery import history, leases, results
from opsentry.notifications.delivery.results import DeliveryResult, EndpointResults, Release
from opsentry.notifications.delivery.retry_policy import RETRY_SECONDS, EndpointHealth
from tests import commands
from tests.conftest import META
from tests.notifications.driver import AGE, DeliveryDriver, delivered


async def test_only_the_oldest_delivery_of_an_ordering_key_is_due(driver):
    first, second = await driver.subscribe(), await driver.subscribe()
    one, other = await driver.open_incident(), await driver.open_incident()
    await driver.change_incident(one, PostUpdate(message="m"), ResolveIncident())
    await driver.change_incident(other, ResolveIncident())
    await driver.enqueue()
    told = []
    while (claimed := await driver.lease())[0]:
        endpoints, dues = claimed
        assert len({(due.subscription_id, due.stream_id) for due in dues}) == len(dues)
        told += [(due.subscription_id, due.stream_id, due.position) for due in dues]
        await driver.record(
            *(delivered(e, *(d for d in dues if d.subscription_id == e.subscription_id)) for e in endpoints)
        )
    assert len(told) == 10
    for subscription_id in (first, second):
        for stream_id in (one, other):
            positions = [position for who, what, position in told if (who, what) == (subscription_id, stream_id)]
            assert positions == sorted(positions)


async def test_a_retry_delays_its_own_ordering_key_only(driver):
    await driver.subscribe()
    one, other = await driver.open_incident(), await driver.open_incident()
    await driver.change_incident(one, ResolveIncident())
    await driver.enqueue()
    (endpoint,), dues = await driver.lease()
    failed = next(due for due in dues if due.stream_id == one)
    fine = next(due for due in dues if due.stream_id == other)
    await driver.record(
        EndpointResults(endpoint, [DeliveryResult(failed, "pending", 300.0, 500, "answered 500", 5)]),
        delivered(endpoint, fine),
    )
    assert await driver.states() == ["pending", "delivered", "pending"]
    assert await driver.lease() == ([], [])
    await driver.change_incident(other, ResolveIncident())
    await driver.enqueue()
    (endpoint,), (due,) = await driver.lease()
    assert due.stream_id == other
    await driver.record(delivered(endpoint, due))
    rows = await driver.rows()
    assert [
        (row["attempts_in_round"], row["next_attempt_at"] is not None) for row in rows if row["stream_id"] == one
    ] == [
        (1, True),
        (0, False),
    ]


async def test_an_exhausted_delivery_lets_the_next_one_follow(driver):
    await driver.subscribe()
    one = await driver.open_incident()
    await driver.change_incident(one, ResolveIncident())
    await driver.enqueue()
    (endpoint,), (due,) = await driver.lease()
    await driver.record(
        EndpointResults(
            endpoint, [DeliveryResult(due, "exhausted", None, 500, "answered 500", 5)], Release(EndpointHealth(1, 1))
        )
    )
    (endpoint,), (due,) = await driver.lease()
    assert endpoint.health.consecutive_failures == 1
    assert due.changes[0].type == "incident.resolved"


async def test_changes_within_the_coalescing_time_share_one_message_in_every_attempt(parts, acme, owner):
    driver = DeliveryDriver(parts, acme, coalesce_seconds=30.0)
    await driver.subscribe()
    one = await driver.open_incident(description="We look into it.")
    await driver.enqueue()
    assert await driver.lease() == ([], [])
    await driver.change_incident(one, PostUpdate(message="m"))
    await driver.enqueue()
    await owner.execute(AGE, 31.0)
    await owner.execute("UPDATE endpoints SET available_at = now() - interval '1 second'")
    _, (due,) = await driver.lease(lease_seconds=0.0)
    assert [change.type for change in due.changes] == ["incident.opened", "incident.updated", "incident.updated"]
    assert await driver.states() == ["pending", "coalesced", "coalesced"]
    # A later change gets its own message even within the time: every attempt must send the same content.
    await driver.change_incident(one, PostUpdate(message="late"))
    await driver.enqueue()
    await owner.execute(
        "UPDATE deliveries SET created_at = created_at - interval '30 seconds' WHERE finalized_at IS NULL"
    )
    (endpoint,), (again,) = await driver.lease()
    assert again.intent_id == due.intent_id
    assert [change.position for change in again.changes] == [change.position for change in due.changes]
    await driver.record(delivered(endpoint, again))
    assert await driver.states() == ["delivered", "coalesced", "coalesced", "pending"]


async def test_a_sender_that_lost_its_lease_records_nothing(driver):
    await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    (slow,), (due,) = await driver.lease(lease_seconds=0.0)
    (other,), (same,) = await driver.lease()
    assert same == due
    await driver.record(delivered(slow, due))
    assert await driver.states() == ["pending"]
    await driver.record(delivered(other, same))
    assert await driver.states() == ["delivered"]


async def test_a_result_recorded_twice_counts_as_one_attempt(driver, owner):
    await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    (endpoint,), (due,) = await driver.lease()
    failed = EndpointResults(endpoint, [DeliveryResult(due, "pending", 5.0, 500, "answered 500", 3)])
    await driver.record(failed)
    await driver.record(failed)
    (row,) = await driver.rows()
    assert (row["attempts_in_round"], row["attempts_total"]) == (1, 1)
    assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 1


async def test_a_lease_covers_endpoints_of_one_channel(driver):
    await driver.subscribe()
    await driver.subscribe(channel="email", target="kim@example.com")
    await driver.open_incident()
    await driver.enqueue()
    (endpoint,), (due,) = await driver.lease()
    assert endpoint.subscription is not None
    assert (endpoint.subscription.channel, due.subscription_id) == ("webhook", endpoint.subscription_id)
    assert await driver.lease() == ([], [])


async def test_tenants_at_their_share_and_unproven_endpoints_are_skipped(driver, globex):
    other = DeliveryDriver(driver.parts, globex)
    for each in (driver, other):
        await each.subscribe()
        await each.open_incident()
        await each.enqueue()
    assert await driver.lease(proven_only=True) == ([], [])
    (endpoint,), _ = await driver.lease(skipped_tenants=[driver.tenant.id])
    assert endpoint.tenant_id == globex.id


async def test_a_pause_stops_one_tenant_or_all(driver, owner):
    await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    for tenant_id in (driver.tenant.id, 0):
        await owner.execute("INSERT INTO sending_pauses (tenant_id) VALUES ($1)", tenant_id)
        assert await driver.lease() == ([], [])
        await owner.execute("DELETE FROM sending_pauses")
    assert len((await driver.lease())[1]) == 1


async def test_an_endpoint_that_fails_for_days_is_reported_and_disabling_ends_its_deliveries(driver, owner):
    await driver.subscribe()
    one = await driver.open_incident()
    await driver.change_incident(one, ResolveIncident())
    await driver.enqueue()
    (endpoint,), (due,) = await driver.lease()
    failed = DeliveryResult(due, "pending", RETRY_SECONDS[0], None, "no answer", 15_000)
    assert await driver.record(EndpointResults(endpoint, [failed], Release(EndpointHealth(10, 1, 0.0)))) == []
    await owner.execute("UPDATE endpoints SET failing_since = failing_since - interval '6 days', available_at = now()")
    await owner.execute("UPDATE deliveries SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")
    (endpoint,), (due,) = await driver.lease()
    # Without a failed attempt in this turn, the endpoint is not reported.
    assert await driver.record(EndpointResults(endpoint, [], Release(EndpointHealth(10, 1, 0.0)))) == []
    (endpoint,), (due,) = await driver.lease()
    failed = failed._replace(delivery=due)
    hopeless = await driver.record(
        EndpointResults(endpoint, [failed], Release(EndpointHealth(11, 1, 300.0), has_failed=True))
    )
    assert hopeless == [endpoint]
    async with driver.parts.database.transaction(10) as connection:
        await results.disable_pending(connection, endpoint)
    assert await driver.states() == ["disabled", "disabled"]
    assert dict(await owner.fetchrow("SELECT consecutive_failures, failing_since, available_at FROM endpoints")) == {
        "consecutive_failures": 0,
        "failing_since": None,
        "available_at": None,
    }


async def test_a_delivery_enqueued_while_another_ends_is_always_scheduled(driver, owner):
    """Enqueue and record for one ordering key concurrently, many times: the last delivery always becomes due."""
    await driver.subscribe()
    one = await driver.open_incident()
    await driver.enqueue()
    for _ in range(30):
        (endpoint,), (due,) = await driver.lease()
        await driver.change_incident(one, PostUpdate(message="m"))
        await driver.parts.projector.catch_up(driver.tenant.id, 0)
        await asyncio.gather(driver.enqueue([driver.tenant.id]), driver.record(delivered(endpoint, due)))
    assert (await driver.states()).count("pending") == 1
    assert len((await driver.lease())[1]) == 1


async def test_the_server_ends_a_session_that_idles_with_locks(driver, owner):
    await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    async with driver.parts.database.connection(10) as connection, connection.transaction():
        await leases.lease_endpoints(connection, uuid4(), "webhook", lease_seconds=60, limit=1)
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "3s"


async def test_events_after_the_projected_position_survive_disabling(driver, owner):
    """The lease knows the subscription up to a position; later deliveries are looked at afterwards."""
    await driver.subscribe()
    one, _ = await driver.open_incident(), await driver.open_incident()
    await driver.enqueue()
    (endpoint,), dues = await driver.lease()
    await driver.change_incident(one, ResolveIncident())
    await driver.enqueue()
    gone = DeliveryResult(next(due for due in dues if due.stream_id != one), "disabled", None, 410, "answered 410", 3)
    await driver.record(EndpointResults(endpoint, [gone], Release(EndpointHealth(1, 1), is_disabled=True)))
    assert await driver.states() == ["disabled", "disabled", "pending"]
    assert (await driver.rows())[-1]["next_attempt_at"] is not None
    assert len((await driver.lease())[1]) == 1


async def test_a_delivery_enqueued_while_its_endpoint_is_disabled_is_looked_at(driver, owner):
    await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    (endpoint,), _ = await driver.lease()
    await driver.record(EndpointResults(endpoint, [], Release(EndpointHealth(11, 1, 300.0))))
    await driver.open_incident()
    await driver.enqueue()
    async with driver.parts.database.transaction(10) as connection:
        await results.disable_pending(connection, endpoint)
    assert await driver.states() == ["disabled", "pending"]
    assert len((await driver.lease())[1]) == 1


async def test_deliveries_of_a_disabled_endpoint_end_in_batches(driver, monkeypatch):
    monkeypatch.setattr(results, "_DISABLE_BATCH", 2)
    await driver.subscribe()
    for _ in range(5):
        await driver.open_incident()
    await driver.enqueue()
    ended = []
    while (claimed := await driver.lease())[0]:
        await driver.record(EndpointResults(claimed[0][0], [], Release(EndpointHealth(0, 1), is_disabled=True)))
        ended.append((await driver.states()).count("disabled"))
    assert ended == [2, 4, 5]


async def test_a_redelivery_precedes_a_younger_retry(driver, owner):
    number = await driver.subscribe()
    one = await driver.open_incident()
    await driver.change_incident(one, PostUpdate(message="m"))
    await driver.enqueue()
    (endpoint,), (first,) = await driver.lease()
    await driver.record(
        EndpointResults(
            endpoint, [DeliveryResult(first, "exhausted", None, 500, "answered 500", 3)], Release(EndpointHealth(0, 1))
        )
    )
    (endpoint,), (second,) = await driver.lease()
    async with driver.parts.database.transaction(10) as connection:
        assert await history.redeliver(connection, driver.tenant.id, number, first.intent_id)
    await driver.record(
        EndpointResults(
            endpoint, [DeliveryResult(second, "pending", 5.0, 500, "answered 500", 3)], Release(EndpointHealth(0, 1))
        )
    )
    assert [row["next_attempt_at"] is None for row in await driver.rows()] == [False, True]
    (endpoint,), (again,) = await driver.lease()
    assert again.intent_id == first.intent_id
    await driver.record(delivered(endpoint, again))
    assert [due.intent_id for due in (await driver.lease())[1]] == [second.intent_id]


async def test_health_restarts_if_the_subscription_changed_during_the_lease(driver, owner):
    number = await driver.subscribe()
    await driver.open_incident()
    await driver.enqueue()
    (endpoint,), (due,) = await driver.lease()
    change = subscription.ChangeSubscription(target="https://example.com/mended")
    await commands.change(driver.parts, subscription.DECIDER, driver.tenant.id, number, change, META)
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    failed = DeliveryResult(due, "pending", 0.0, None, "no answer", 15_000)
    await driver.record(EndpointResults(endpoint, [failed], Release(EndpointHealth(10, 1, 300.0), has_failed=True)))
    (endpoint,), _ = await driver.lease()
    assert (endpoint.health.consecutive_failures, endpoint.health.concurrency) == (0, 1)
    assert await owner.fetchval("SELECT failing_since FROM endpoints") is None

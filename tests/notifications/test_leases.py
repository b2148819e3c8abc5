"""Deliveries are sent in order, by whoever holds the lease."""

import asyncio
from uuid import uuid4

from opsentry.domain import subscription
from opsentry.domain.incident import PostUpdate, ResolveIncident
from opsentry.notifications.delivery import history, leases, results
from opsentry.notifications.delivery.results import DeliveryResult, EndpointResults, Release
from opsentry.notifications.delivery.retry_policy import RETRY_SECONDS, EndpointHealth
from tests import commands
from tests.conftest import META
from tests.notifications.desk import AGE, Desk, delivered


async def test_only_the_oldest_of_a_lane_is_due_and_its_end_makes_the_next_due(desk):
    first, second = await desk.subscribe(), await desk.subscribe()
    one, other = await desk.open(), await desk.open()
    await desk.tell(one, PostUpdate(message="m"), ResolveIncident())
    await desk.tell(other, ResolveIncident())
    await desk.take_over()
    told = []
    while (claimed := await desk.claim())[0]:
        endpoints, dues = claimed
        assert len({(due.subscription_id, due.stream_id) for due in dues}) == len(dues)
        told += [(due.subscription_id, due.stream_id, due.position) for due in dues]
        await desk.record(
            *(delivered(e, *(d for d in dues if d.subscription_id == e.subscription_id)) for e in endpoints)
        )
    assert len(told) == 10
    for subscription_id in (first, second):
        for stream_id in (one, other):
            positions = [position for who, what, position in told if (who, what) == (subscription_id, stream_id)]
            assert positions == sorted(positions)


async def test_one_that_waits_for_its_retry_holds_up_its_lane_only(desk):
    await desk.subscribe()
    one, other = await desk.open(), await desk.open()
    await desk.tell(one, ResolveIncident())
    await desk.take_over()
    (endpoint,), dues = await desk.claim()
    failed = next(due for due in dues if due.stream_id == one)
    fine = next(due for due in dues if due.stream_id == other)
    await desk.record(
        EndpointResults(endpoint, [DeliveryResult(failed, "pending", 300.0, 500, "answered 500", 5)]),
        delivered(endpoint, fine),
    )
    assert await desk.states() == ["pending", "delivered", "pending"]
    assert await desk.claim() == ([], [])
    await desk.tell(other, ResolveIncident())
    await desk.take_over()
    (endpoint,), (due,) = await desk.claim()
    assert due.stream_id == other
    await desk.record(delivered(endpoint, due))
    rows = await desk.rows()
    assert [
        (row["attempts_in_round"], row["next_attempt_at"] is not None) for row in rows if row["stream_id"] == one
    ] == [
        (1, True),
        (0, False),
    ]


async def test_what_ends_in_failure_lets_the_next_one_go(desk):
    await desk.subscribe()
    one = await desk.open()
    await desk.tell(one, ResolveIncident())
    await desk.take_over()
    (endpoint,), (due,) = await desk.claim()
    await desk.record(
        EndpointResults(
            endpoint, [DeliveryResult(due, "exhausted", None, 500, "answered 500", 5)], Release(EndpointHealth(1, 1))
        )
    )
    (endpoint,), (due,) = await desk.claim()
    assert endpoint.health.consecutive_failures == 1
    assert due.changes[0].type == "incident.resolved"


async def test_changes_within_the_burst_become_one_message_and_stay_it(parts, acme, owner):
    desk = Desk(parts, acme, burst=30.0)
    await desk.subscribe()
    one = await desk.open(description="We look into it.")
    await desk.take_over()
    assert await desk.claim() == ([], [])
    await desk.tell(one, PostUpdate(message="m"))
    await desk.take_over()
    await owner.execute(AGE, 31.0)
    await owner.execute("UPDATE endpoints SET available_at = now() - interval '1 second'")
    _, (due,) = await desk.claim(seconds=0.0)
    assert [change.type for change in due.changes] == ["incident.opened", "incident.updated", "incident.updated"]
    assert await desk.states() == ["pending", "coalesced", "coalesced"]
    # A later one, even if it seems to fall within, is told by itself: the message must not become another one.
    await desk.tell(one, PostUpdate(message="late"))
    await desk.take_over()
    await owner.execute(
        "UPDATE deliveries SET created_at = created_at - interval '30 seconds' WHERE finalized_at IS NULL"
    )
    (endpoint,), (again,) = await desk.claim()
    assert again.intent_id == due.intent_id
    assert [change.position for change in again.changes] == [change.position for change in due.changes]
    await desk.record(delivered(endpoint, again))
    assert await desk.states() == ["delivered", "coalesced", "coalesced", "pending"]


async def test_who_lost_the_lease_records_nothing(desk):
    await desk.subscribe()
    await desk.open()
    await desk.take_over()
    (slow,), (due,) = await desk.claim(seconds=0.0)
    (other,), (same,) = await desk.claim()
    assert same == due
    await desk.record(delivered(slow, due))
    assert await desk.states() == ["pending"]
    await desk.record(delivered(other, same))
    assert await desk.states() == ["delivered"]


async def test_an_attempt_is_recorded_once_though_it_is_said_twice(desk, owner):
    await desk.subscribe()
    await desk.open()
    await desk.take_over()
    (endpoint,), (due,) = await desk.claim()
    failed = EndpointResults(endpoint, [DeliveryResult(due, "pending", 5.0, 500, "answered 500", 3)])
    await desk.record(failed)
    await desk.record(failed)
    (row,) = await desk.rows()
    assert (row["attempts_in_round"], row["attempts_total"]) == (1, 1)
    assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 1


async def test_a_claim_is_of_one_channel(desk):
    await desk.subscribe()
    await desk.subscribe(channel="email", target="kim@example.com")
    await desk.open()
    await desk.take_over()
    (endpoint,), (due,) = await desk.claim()
    assert endpoint.subscription is not None
    assert (endpoint.subscription.channel, due.subscription_id) == ("webhook", endpoint.subscription_id)
    assert await desk.claim() == ([], [])


async def test_tenants_with_their_share_and_unproven_endpoints_are_passed_over(desk, globex):
    other = Desk(desk.parts, globex)
    for each in (desk, other):
        await each.subscribe()
        await each.open()
        await each.take_over()
    assert await desk.claim(proven_only=True) == ([], [])
    (endpoint,), _ = await desk.claim(passing_over=[desk.tenant.id])
    assert endpoint.tenant_id == globex.id


async def test_pausing_holds_back_one_tenant_or_all(desk, owner):
    await desk.subscribe()
    await desk.open()
    await desk.take_over()
    for tenant_id in (desk.tenant.id, 0):
        await owner.execute("INSERT INTO sending_pauses (tenant_id) VALUES ($1)", tenant_id)
        assert await desk.claim() == ([], [])
        await owner.execute("DELETE FROM sending_pauses")
    assert len((await desk.claim())[1]) == 1


async def test_an_endpoint_that_fails_for_days_is_told_apart_and_turning_it_off_ends_what_waits(desk, owner):
    await desk.subscribe()
    one = await desk.open()
    await desk.tell(one, ResolveIncident())
    await desk.take_over()
    (endpoint,), (due,) = await desk.claim()
    failed = DeliveryResult(due, "pending", RETRY_SECONDS[0], None, "no answer", 15_000)
    assert await desk.record(EndpointResults(endpoint, [failed], Release(EndpointHealth(10, 1, 0.0)))) == []
    await owner.execute("UPDATE endpoints SET failing_since = failing_since - interval '6 days', available_at = now()")
    await owner.execute("UPDATE deliveries SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")
    (endpoint,), (due,) = await desk.claim()
    # Not where nothing was tried, for a reason of ours.
    assert await desk.record(EndpointResults(endpoint, [], Release(EndpointHealth(10, 1, 0.0)))) == []
    (endpoint,), (due,) = await desk.claim()
    failed = failed._replace(delivery=due)
    hopeless = await desk.record(
        EndpointResults(endpoint, [failed], Release(EndpointHealth(11, 1, 300.0), has_failed=True))
    )
    assert hopeless == [endpoint]
    async with desk.parts.database.transaction(10) as connection:
        await results.disable_pending(connection, endpoint)
    assert await desk.states() == ["disabled", "disabled"]
    assert dict(await owner.fetchrow("SELECT consecutive_failures, failing_since, available_at FROM endpoints")) == {
        "consecutive_failures": 0,
        "failing_since": None,
        "available_at": None,
    }


async def test_what_comes_while_another_ends_is_never_forgotten(desk, owner):
    """Taking over and recording in the same lane at the same time, again and again: the last one becomes due always."""
    await desk.subscribe()
    one = await desk.open()
    await desk.take_over()
    for _ in range(30):
        (endpoint,), (due,) = await desk.claim()
        await desk.tell(one, PostUpdate(message="m"))
        await desk.parts.projector.catch_up(desk.tenant.id, 0)
        await asyncio.gather(desk.take_over([desk.tenant.id]), desk.record(delivered(endpoint, due)))
    assert (await desk.states()).count("pending") == 1
    assert len((await desk.claim())[1]) == 1


async def test_a_session_that_stands_still_with_the_locks_is_thrown_out(desk, owner):
    await desk.subscribe()
    await desk.open()
    await desk.take_over()
    async with desk.parts.database.connection(10) as connection, connection.transaction():
        await leases.lease_endpoints(connection, uuid4(), "webhook", lease_seconds=60, limit=1)
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "3s"


async def test_what_follows_on_what_is_turned_off_goes_on(desk, owner):
    """Up to which event a subscription is off is known at the claim; what comes later is looked at then."""
    await desk.subscribe()
    one, _ = await desk.open(), await desk.open()
    await desk.take_over()
    (endpoint,), dues = await desk.claim()
    await desk.tell(one, ResolveIncident())
    await desk.take_over()
    gone = DeliveryResult(next(due for due in dues if due.stream_id != one), "disabled", None, 410, "answered 410", 3)
    await desk.record(EndpointResults(endpoint, [gone], Release(EndpointHealth(1, 1), is_disabled=True)))
    assert await desk.states() == ["disabled", "disabled", "pending"]
    assert (await desk.rows())[-1]["next_attempt_at"] is not None
    assert len((await desk.claim())[1]) == 1


async def test_what_comes_while_an_endpoint_is_given_up_is_looked_at(desk, owner):
    await desk.subscribe()
    await desk.open()
    await desk.take_over()
    (endpoint,), _ = await desk.claim()
    await desk.record(EndpointResults(endpoint, [], Release(EndpointHealth(11, 1, 300.0))))
    await desk.open()
    await desk.take_over()
    async with desk.parts.database.transaction(10) as connection:
        await results.disable_pending(connection, endpoint)
    assert await desk.states() == ["disabled", "pending"]
    assert len((await desk.claim())[1]) == 1


async def test_very_much_that_is_turned_off_ends_some_at_a_time(desk, monkeypatch):
    monkeypatch.setattr(results, "_DISABLE_BATCH", 2)
    await desk.subscribe()
    for _ in range(5):
        await desk.open()
    await desk.take_over()
    ended = []
    while (claimed := await desk.claim())[0]:
        await desk.record(EndpointResults(claimed[0][0], [], Release(EndpointHealth(0, 1), is_disabled=True)))
        ended.append((await desk.states()).count("disabled"))
    assert ended == [2, 4, 5]


async def test_what_came_back_goes_before_what_is_tried_again(desk, owner):
    number = await desk.subscribe()
    one = await desk.open()
    await desk.tell(one, PostUpdate(message="m"))
    await desk.take_over()
    (endpoint,), (first,) = await desk.claim()
    await desk.record(
        EndpointResults(
            endpoint, [DeliveryResult(first, "exhausted", None, 500, "answered 500", 3)], Release(EndpointHealth(0, 1))
        )
    )
    (endpoint,), (second,) = await desk.claim()
    async with desk.parts.database.transaction(10) as connection:
        assert await history.redeliver(connection, desk.tenant.id, number, first.intent_id)
    await desk.record(
        EndpointResults(
            endpoint, [DeliveryResult(second, "pending", 5.0, 500, "answered 500", 3)], Release(EndpointHealth(0, 1))
        )
    )
    assert [row["next_attempt_at"] is None for row in await desk.rows()] == [False, True]
    (endpoint,), (again,) = await desk.claim()
    assert again.intent_id == first.intent_id
    await desk.record(delivered(endpoint, again))
    assert [due.intent_id for due in (await desk.claim())[1]] == [second.intent_id]


async def test_how_it_went_says_nothing_of_a_subscription_that_was_changed_meanwhile(desk, owner):
    number = await desk.subscribe()
    await desk.open()
    await desk.take_over()
    (endpoint,), (due,) = await desk.claim()
    change = subscription.ChangeSubscription(target="https://example.com/mended")
    await commands.change(desk.parts, subscription.DECIDER, desk.tenant.id, number, change, META)
    await desk.parts.projector.catch_up(desk.tenant.id, 0)
    failed = DeliveryResult(due, "pending", 0.0, None, "no answer", 15_000)
    await desk.record(EndpointResults(endpoint, [failed], Release(EndpointHealth(10, 1, 300.0), has_failed=True)))
    (endpoint,), _ = await desk.claim()
    assert (endpoint.health.consecutive_failures, endpoint.health.concurrency) == (0, 1)
    assert await owner.fetchval("SELECT failing_since FROM endpoints") is None

"""Deliveries: taken over once, in order, by whoever holds the lease."""

import asyncio
from collections.abc import Sequence
from uuid import uuid4

import pytest

from opsentry.domain import incident, subscription
from opsentry.domain.incident import OpenIncident, PostUpdate, ResolveIncident
from opsentry.domain.subscription import CreateSubscription
from opsentry.notifications import ledger
from opsentry.notifications.ledger import RETRY_SECONDS, Claimed, Due, Release, Result, Work
from opsentry.projections.rebuild import Rebuilder
from opsentry.wiring import projections
from tests.conftest import META, make_tenant

DELIVERIES = "SELECT * FROM deliveries WHERE tenant_id = $1 ORDER BY seq, subscription_id"
# An age makes that what is due after a burst is due now.
AGE = """
UPDATE deliveries SET due_at = due_at - $1 * interval '1 second', created_at = created_at - $1 * interval '1 second'
"""


class Desk:
    """A sender's hands: what it does to the ledger, step by step."""

    def __init__(self, parts, tenant, burst=0.0):
        self.parts = parts
        self.tenant = tenant
        self.burst = burst

    async def subscribe(self, **fields):
        command = CreateSubscription(**{"channel": "webhook", "target": "https://example.com/x", **fields})
        made = await self.parts.commands.create(subscription.DECIDER, self.tenant.id, command, META)
        return made.stream_id

    async def open(self, **fields):
        opened = await self.parts.commands.create(
            incident.DECIDER, self.tenant.id, OpenIncident(**{"title": "Down", **fields}), META
        )
        return opened.stream_id

    async def tell(self, number, *commands):
        for command in commands:
            await self.parts.commands.execute(incident.DECIDER, self.tenant.id, number, command, META)

    async def take_over(self, tenants: Sequence[int] | None = None, **options):
        await self.parts.runner.catch_up(self.tenant.id, 0)
        async with self.parts.database.transaction(10) as connection:
            found = await ledger.fresh(connection, 0, 100) if tenants is None else tenants
            return await ledger.take_over(connection, found, self.burst, **options) if found else 0

    async def claim(self, seconds=60.0, at_most=10, passing_over=(), *, proven=False, each=10):
        async with self.parts.database.transaction(10) as connection:
            claimed = await ledger.claim(
                connection, uuid4(), seconds=seconds, at_most=at_most, passing_over=passing_over, proven=proven
            )
            due = await ledger.take(connection, [(one, each) for one in claimed], self.burst)
        return claimed, due

    async def record(self, *work: Work):
        async with self.parts.database.transaction(10) as connection:
            return await ledger.record(connection, work, self.burst)

    async def rows(self):
        return await self.parts.database.fetch(DELIVERIES, self.tenant.id)

    async def states(self):
        return [row["state"] for row in await self.rows()]


def delivered(endpoint: Claimed, *dues: Due, release=True) -> Work:
    results = [Result(due, "delivered", None, 200, None, 3, counted=True) for due in dues]
    return Work(endpoint, results, Release(0, 2) if release else None)


@pytest.fixture
def desk(parts, acme):
    return Desk(parts, acme)


async def test_intents_are_taken_over_once_and_are_due(desk, owner):
    await desk.subscribe()
    await desk.open()
    assert await desk.take_over() == 1
    assert await desk.take_over() == 0
    assert await desk.take_over([desk.tenant.id]) == 0
    assert await owner.fetchval("SELECT count(*) FROM outbox_fresh") == 0
    (row,) = await desk.rows()
    intent = await owner.fetchrow("SELECT * FROM outbox_intents")
    assert (row["intent_id"], row["seq"], row["topic"]) == (intent["intent_id"], intent["seq"], "incident.opened")
    head = await owner.fetchval("SELECT seq FROM heads WHERE tenant_id = $1", desk.tenant.id)
    assert await owner.fetchval("SELECT position FROM outbox_settled") == head
    (endpoint,), (due,) = await desk.claim()
    assert (due.intent_id, due.sequence, due.attempts) == (intent["intent_id"], intent["seq"], 0)
    assert await desk.claim() == ([], [])
    await desk.record(delivered(endpoint, due))
    assert await desk.states() == ["delivered"]
    (attempt,) = await owner.fetch("SELECT * FROM delivery_attempts")
    assert (attempt["number"], attempt["answer"], attempt["error"], attempt["milliseconds"]) == (1, 200, None, 3)
    assert await owner.fetchval("SELECT due_at FROM endpoints") is None


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
        told += [(due.subscription_id, due.stream_id, due.sequence) for due in dues]
        await desk.record(
            *(delivered(e, *(d for d in dues if d.subscription_id == e.subscription_id)) for e in endpoints)
        )
    assert len(told) == 10
    for subscription_id in (first, second):
        for stream_id in (one, other):
            seqs = [seq for who, what, seq in told if (who, what) == (subscription_id, stream_id)]
            assert seqs == sorted(seqs)


async def test_one_that_waits_for_its_retry_holds_up_its_lane_only(desk):
    await desk.subscribe()
    one, other = await desk.open(), await desk.open()
    await desk.tell(one, ResolveIncident())
    await desk.take_over()
    (endpoint,), dues = await desk.claim()
    failed = next(due for due in dues if due.stream_id == one)
    fine = next(due for due in dues if due.stream_id == other)
    await desk.record(
        Work(endpoint, [Result(failed, "waiting", 300.0, 500, "answered 500", 5, counted=True)]),
        delivered(endpoint, fine),
    )
    assert await desk.states() == ["waiting", "delivered", "waiting"]
    assert await desk.claim() == ([], [])
    await desk.tell(other, ResolveIncident())
    await desk.take_over()
    (endpoint,), (due,) = await desk.claim()
    assert due.stream_id == other
    await desk.record(delivered(endpoint, due))
    rows = await desk.rows()
    assert [(row["attempts"], row["due_at"] is not None) for row in rows if row["stream_id"] == one] == [
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
        Work(endpoint, [Result(due, "parked", None, 500, "answered 500", 5, counted=True)], Release(1, 1))
    )
    (endpoint,), (due,) = await desk.claim()
    assert endpoint.failures == 1
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
    await owner.execute("UPDATE endpoints SET due_at = now() - interval '1 second'")
    _, (due,) = await desk.claim(seconds=0.0)
    assert [change.type for change in due.changes] == ["incident.opened", "incident.updated", "incident.updated"]
    assert await desk.states() == ["waiting", "merged", "merged"]
    # A later one, even if it seems to fall within, is told by itself: the message must not become another one.
    await desk.tell(one, PostUpdate(message="late"))
    await desk.take_over()
    await owner.execute(
        "UPDATE deliveries SET created_at = created_at - interval '30 seconds' WHERE settled_at IS NULL"
    )
    (endpoint,), (again,) = await desk.claim()
    assert again.intent_id == due.intent_id
    assert [change.seq for change in again.changes] == [change.seq for change in due.changes]
    await desk.record(delivered(endpoint, again))
    assert await desk.states() == ["delivered", "merged", "merged", "waiting"]


async def test_who_lost_the_lease_records_nothing(desk):
    await desk.subscribe()
    await desk.open()
    await desk.take_over()
    (slow,), (due,) = await desk.claim(seconds=0.0)
    (other,), (same,) = await desk.claim()
    assert same == due
    await desk.record(delivered(slow, due))
    assert await desk.states() == ["waiting"]
    await desk.record(delivered(other, same))
    assert await desk.states() == ["delivered"]


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
        "INSERT INTO outbox_intents SELECT tenant_id, gen_random_uuid(), seq, subscription_id, channel, 'incident.new',"
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
        "UPDATE deliveries SET settled_at = settled_at - interval '91 days' WHERE settled_at IS NOT NULL"
    )
    async with desk.parts.database.transaction(10) as connection:
        assert await ledger.prune(connection, 90, 100) == 1
    assert await desk.states() == ["waiting"]
    assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 0
    rebuilder = Rebuilder(desk.parts.database, projections())
    await owner.execute("UPDATE checkpoints SET generation = -1")
    await rebuilder.rebuild(desk.tenant.id)
    await desk.take_over()
    _, (due,) = await desk.claim()
    assert due.changes[0].type == "incident.updated"
    assert await desk.states() == ["waiting"]


async def test_a_tenant_with_very_many_is_taken_over_some_at_a_time(desk, owner):
    for _ in range(3):
        await desk.subscribe()
    for _ in range(5):
        await desk.open()
    counts = []
    while await desk.take_over(at_most=4):
        counts.append(len(await desk.rows()))
    assert counts == [6, 12, 15]
    assert await owner.fetchval("SELECT count(*) FROM outbox_fresh") == 0


async def test_tenants_with_their_share_and_unproven_endpoints_are_passed_over(desk, globex):
    other = Desk(desk.parts, globex)
    for each in (desk, other):
        await each.subscribe()
        await each.open()
        await each.take_over()
    assert await desk.claim(proven=True) == ([], [])
    (endpoint,), _ = await desk.claim(passing_over=[desk.tenant.id])
    assert endpoint.tenant_id == globex.id


async def test_pausing_holds_back_one_tenant_or_all(desk, owner):
    await desk.subscribe()
    await desk.open()
    await desk.take_over()
    for tenant_id in (desk.tenant.id, 0):
        await owner.execute("INSERT INTO outbox_paused (tenant_id) VALUES ($1)", tenant_id)
        assert await desk.claim() == ([], [])
        await owner.execute("DELETE FROM outbox_paused")
    assert len((await desk.claim())[1]) == 1


async def test_an_endpoint_that_fails_for_days_is_told_apart_and_turning_it_off_ends_what_waits(desk, owner):
    await desk.subscribe()
    one = await desk.open()
    await desk.tell(one, ResolveIncident())
    await desk.take_over()
    (endpoint,), (due,) = await desk.claim()
    failed = Result(due, "waiting", RETRY_SECONDS[0], None, "no answer", 15_000, counted=True)
    assert await desk.record(Work(endpoint, [failed], Release(10, 1, hold=0.0))) == []
    await owner.execute("UPDATE endpoints SET failing_since = failing_since - interval '6 days', due_at = now()")
    await owner.execute("UPDATE deliveries SET due_at = now() WHERE due_at IS NOT NULL")
    (endpoint,), (due,) = await desk.claim()
    hopeless = await desk.record(Work(endpoint, [failed], Release(11, 1, hold=300.0)))
    assert hopeless == [endpoint]
    async with desk.parts.database.transaction(10) as connection:
        await ledger.turn_off(connection, endpoint)
    assert await desk.states() == ["disabled", "disabled"]
    assert dict(await owner.fetchrow("SELECT failures, failing_since, due_at FROM endpoints")) == {
        "failures": 0,
        "failing_since": None,
        "due_at": None,
    }


async def test_what_comes_while_another_ends_is_never_forgotten(desk, owner):
    """Taking over and recording in the same lane at the same time, again and again: the last one becomes due always."""
    await desk.subscribe()
    one = await desk.open()
    await desk.take_over()
    for _ in range(30):
        (endpoint,), (due,) = await desk.claim()
        await desk.tell(one, PostUpdate(message="m"))
        await desk.parts.runner.catch_up(desk.tenant.id, 0)
        await asyncio.gather(desk.take_over([desk.tenant.id]), desk.record(delivered(endpoint, due)))
    assert (await desk.states()).count("waiting") == 1
    assert len((await desk.claim())[1]) == 1


async def test_a_session_that_stands_still_with_the_locks_is_thrown_out(desk, owner):
    await desk.subscribe()
    await desk.open()
    await desk.take_over()
    async with desk.parts.database.connection(10) as connection, connection.transaction():
        await ledger.claim(connection, uuid4(), seconds=60, at_most=1, passing_over=[], proven=False)
        assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "3s"


async def test_each_tenants_deliveries_are_its_own(parts, desk):
    other = Desk(parts, await make_tenant(parts, "initech"))
    await other.subscribe()
    await desk.open()
    await desk.take_over()
    await other.take_over()
    assert await desk.rows() == []
    assert await other.rows() == []

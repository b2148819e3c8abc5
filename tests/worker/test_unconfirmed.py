"""Whoever was asked whether they want to be told and never agreed is forgotten."""

import pytest

from opsentry.bootstrap import core, working
from opsentry.domain import subscription
from opsentry.domain.subscription import (
    CONFIRMATION_DAYS,
    ChangeSubscription,
    ConfirmSubscription,
    CreateSubscription,
    RequestTest,
    SubscriptionCreated,
    SubscriptionRemoved,
)
from opsentry.events import store
from opsentry.worker import worker
from opsentry.worker.worker import Worker
from tests.conftest import META
from tests.waiting import until

CREATED, CONFIRMED = "subscription.created", "subscription.confirmed"
LAPSED = [CREATED, "subscription.removed", "subscription.redacted"]
ADDRESS = "jo@example.org"


def forgetting(parts):
    return Worker(parts.database, parts.commands, parts.projector).forget_unconfirmed()


async def execute(parts, tenant, number, *commands):
    for command in commands:
        done = await parts.commands.execute(subscription.DECIDER, tenant.id, number, command, META)
        await parts.projector.catch_up(tenant.id, done.position)


@pytest.fixture
async def ask(parts, acme, app_connection):
    """Ask to be told, so many days ago."""

    async def make(days, tenant=acme, *, pending=True):
        command = CreateSubscription(channel="email", target=ADDRESS, pending=pending)
        made = await parts.commands.create(subscription.DECIDER, tenant.id, command, META)
        await parts.projector.catch_up(tenant.id, made.position)
        await app_connection.execute(
            "UPDATE subscriptions SET created_at = created_at - $3 * interval '1 day'"
            " WHERE tenant_id = $1 AND subscription_id = $2",
            tenant.id,
            made.stream_id,
            days,
        )
        return made.stream_id

    return make


async def story(connection, number):
    """The types of a subscription's events."""
    rows = await connection.fetch(
        "SELECT type FROM events WHERE stream_kind = 'subscription' AND stream_id = $1 ORDER BY version", number
    )
    return [row["type"] for row in rows]


async def test_an_address_of_someone_who_never_agreed_is_forgotten(parts, acme, ask, owner):
    forgotten, waiting = await ask(CONFIRMATION_DAYS + 0.01), await ask(CONFIRMATION_DAYS - 0.01)
    for _ in range(3):
        await forgetting(parts)
    assert await story(owner, forgotten) == LAPSED
    assert await story(owner, waiting) == [CREATED]
    async with parts.database.connection() as connection:
        created, removed, _ = await store.read_stream(connection, acme.id, "subscription", forgotten)
    asked = SubscriptionCreated(channel="email", target="[redacted]", audience="public", pending=True)
    assert (created.event, removed.event) == (asked, SubscriptionRemoved(unsubscribed=False))
    assert removed.meta.actor.kind == "scheduler"
    assert await owner.fetchval("SELECT count(*) FROM events WHERE erasable::text LIKE '%' || $1 || '%'", ADDRESS) == 1
    rows = await owner.fetch("SELECT status, target FROM subscriptions ORDER BY created_at")
    assert [tuple(row) for row in rows] == [("removed", ""), ("pending", ADDRESS)]


async def test_whoever_agreed_stays_whatever_became_of_it(parts, acme, ask, owner):
    agreed, off, told = await ask(400), await ask(400), await ask(400, pending=False)
    await execute(parts, acme, agreed, ConfirmSubscription(), RequestTest())
    await execute(parts, acme, off, ConfirmSubscription(), ChangeSubscription(enabled=False))
    await forgetting(parts)
    assert await story(owner, agreed) == [CREATED, CONFIRMED, "subscription.test_requested"]
    assert await story(owner, off) == [CREATED, CONFIRMED, "subscription.disabled"]
    assert await story(owner, told) == [CREATED]


async def test_who_agrees_at_the_last_moment_stays(parts, acme, ask, owner):
    late = await ask(8)
    await parts.commands.execute(subscription.DECIDER, acme.id, late, ConfirmSubscription(), META)
    assert await owner.fetchval("SELECT status FROM subscriptions") == "pending"  # the row is old
    await forgetting(parts)
    assert await story(owner, late) == [CREATED, CONFIRMED]
    assert await owner.fetchval("SELECT status FROM subscriptions") == "active"


async def test_what_cannot_be_removed_just_now_does_not_hold_up_others(
    parts, acme, globex, ask, owner, app_connection, monkeypatch
):
    monkeypatch.setattr(worker, "_BATCH", 2)
    held = [await ask(30) for _ in range(3)]
    free = [await ask(20, globex) for _ in range(3)]
    async with owner.transaction():
        await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", acme.id)
        await forgetting(parts)
        for number in free:
            assert await story(app_connection, number) == LAPSED
    for number in held:
        assert await story(owner, number) == [CREATED]
    await forgetting(parts)
    for number in held:
        assert await story(owner, number) == LAPSED


async def test_a_tenant_whose_subscriptions_are_parked_is_left_alone(parts, ask, owner):
    number = await ask(30)
    await owner.execute("UPDATE checkpoints SET halted_at = 9 WHERE projection = 'subscriptions'")
    await forgetting(parts)
    assert await story(owner, number) == [CREATED]


async def test_several_workers_at_their_work_remove_once(settings, parts, ask, owner):
    numbers = [await ask(30) for _ in range(5)]
    async with core(settings) as other, working(parts), working(other):
        await until(lambda: owner.fetchval("SELECT count(*) >= 5 FROM events WHERE type = 'subscription.removed'"))
    for number in numbers:
        assert await story(owner, number) == LAPSED

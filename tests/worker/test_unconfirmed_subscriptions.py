"""Subscriptions that nobody confirmed in time are removed, and their addresses erased."""

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
from opsentry.worker.scheduler import Scheduler
from opsentry.worker.tasks import unconfirmed_subscriptions
from opsentry.worker.tasks.unconfirmed_subscriptions import UnconfirmedSubscriptions
from tests import commands
from tests.conftest import META
from tests.waiting import until

CREATED, CONFIRMED = "subscription.created", "subscription.confirmed"
EXPIRED = [CREATED, "subscription.removed", "subscription.redacted"]
ADDRESS = "jo@example.org"


async def remove_unconfirmed(parts):
    await UnconfirmedSubscriptions(parts.application, Scheduler(parts.application)).remove_unconfirmed()


async def execute(parts, tenant, number, *changes):
    for command in changes:
        done = await commands.change(parts, subscription.DECIDER, tenant.id, number, command, META)
        await parts.projector.catch_up(tenant.id, done.position)


@pytest.fixture
async def subscribe(parts, acme, app_connection):
    """Create a subscription that is `days` old."""

    async def make(days, tenant=acme, *, pending=True):
        command = CreateSubscription(channel="email", target=ADDRESS, pending=pending)
        made = await commands.create(parts, subscription.DECIDER, tenant.id, command, META)
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


async def story(connection, number, tenant_id=None):
    """Return the types of a subscription's events; `tenant_id` tells it from another tenant's with the same id."""
    rows = await connection.fetch(
        "SELECT type FROM events WHERE stream_kind = 'subscription' AND stream_id = $1"
        " AND ($2::bigint IS NULL OR tenant_id = $2) ORDER BY version",
        number,
        tenant_id,
    )
    return [row["type"] for row in rows]


async def test_an_unconfirmed_address_is_erased(parts, acme, subscribe, owner):
    forgotten, waiting = await subscribe(CONFIRMATION_DAYS + 0.01), await subscribe(CONFIRMATION_DAYS - 0.01)
    for _ in range(3):
        await remove_unconfirmed(parts)
    assert await story(owner, forgotten) == EXPIRED
    assert await story(owner, waiting) == [CREATED]
    async with parts.database.connection() as connection:
        created, removed, _ = await store.read_stream(connection, acme.id, "subscription", forgotten)
    asked = SubscriptionCreated(channel="email", target="[redacted]", audience="public", pending=True)
    assert (created.event, removed.event) == (asked, SubscriptionRemoved(unsubscribed=False))
    assert removed.meta.actor.kind == "scheduler"
    assert await owner.fetchval("SELECT count(*) FROM events WHERE erasable::text LIKE '%' || $1 || '%'", ADDRESS) == 1
    rows = await owner.fetch("SELECT status, target FROM subscriptions ORDER BY created_at")
    assert [tuple(row) for row in rows] == [("removed", ""), ("pending", ADDRESS)]


async def test_confirmed_and_disabled_subscriptions_stay(parts, acme, subscribe, owner):
    confirmed, disabled, created = await subscribe(400), await subscribe(400), await subscribe(400, pending=False)
    await execute(parts, acme, confirmed, ConfirmSubscription(), RequestTest())
    await execute(parts, acme, disabled, ConfirmSubscription(), ChangeSubscription(enabled=False))
    await remove_unconfirmed(parts)
    assert await story(owner, confirmed) == [CREATED, CONFIRMED, "subscription.test_requested"]
    assert await story(owner, disabled) == [CREATED, CONFIRMED, "subscription.disabled"]
    assert await story(owner, created) == [CREATED]


async def test_a_confirmation_at_the_last_moment_wins(parts, acme, subscribe, owner):
    late = await subscribe(8)
    await commands.change(parts, subscription.DECIDER, acme.id, late, ConfirmSubscription(), META)
    assert await owner.fetchval("SELECT status FROM subscriptions") == "pending"  # the row is stale
    await remove_unconfirmed(parts)
    assert await story(owner, late) == [CREATED, CONFIRMED]
    assert await owner.fetchval("SELECT status FROM subscriptions") == "active"


async def test_a_busy_tenant_does_not_delay_others(parts, acme, globex, subscribe, owner, app_connection, monkeypatch):
    monkeypatch.setattr(unconfirmed_subscriptions, "BATCH_SIZE_SUBSCRIPTIONS", 2)
    held = [await subscribe(30) for _ in range(3)]
    free = [await subscribe(20, globex) for _ in range(3)]
    async with owner.transaction():
        await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", acme.id)
        await remove_unconfirmed(parts)
        for number in free:
            assert await story(app_connection, number, globex.id) == EXPIRED
    for number in held:
        assert await story(owner, number, acme.id) == [CREATED]
    await remove_unconfirmed(parts)
    for number in held:
        assert await story(owner, number, acme.id) == EXPIRED


async def test_a_halted_projection_keeps_its_subscriptions(parts, subscribe, owner):
    number = await subscribe(30)
    await owner.execute("UPDATE checkpoints SET halted_at = 9 WHERE projection = 'subscriptions'")
    await remove_unconfirmed(parts)
    assert await story(owner, number) == [CREATED]


async def test_several_workers_remove_each_subscription_once(settings, parts, subscribe, owner):
    numbers = [await subscribe(30) for _ in range(5)]
    async with core(settings) as other, working(parts), working(other):
        await until(lambda: owner.fetchval("SELECT count(*) >= 5 FROM events WHERE type = 'subscription.removed'"))
    for number in numbers:
        assert await story(owner, number) == EXPIRED

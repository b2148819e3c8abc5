"""Dispatchers: each channel has its own, and what came of messages is recorded whatever else happens."""

import asyncio

import asyncpg
import pytest

from opsentry.domain import subscription
from opsentry.notifications.channel import Outcome
from opsentry.notifications.delivery import dispatcher, enqueue, recorder, results
from opsentry.notifications.delivery.dispatcher import Dispatcher
from tests import commands
from tests.conftest import META
from tests.notifications.desk import Desk
from tests.notifications.sending import BROKEN, OK, Scripted, hurry
from tests.waiting import until

X = "https://example.com/x"


async def has(*said):
    return all(said)


async def test_a_channel_that_hangs_holds_up_no_other(desk, channel, sending, settled):
    mail, hanging = Scripted("email", max_concurrency=3), asyncio.Event()
    for number in range(40):
        await desk.subscribe(channel="email", target=f"kim{number}@example.com")
        mail.answers[f"kim{number}@example.com"] = hanging
    for number in range(8):
        await desk.subscribe(target=f"https://example.com/{number}")
    async with sending([mail, channel], max_concurrent_deliveries=8):
        await desk.open()
        await desk.parts.projector.catch_up(desk.tenant.id, 0)
        await until(lambda: has(len(mail.sent) == 3, len(channel.sent) == 8))
        hanging.set()
        await settled()
    assert len(mail.sent) == 40
    # All at once that may be, though none of them has answered well before: it is not theirs to answer.
    assert mail.most == 3


async def test_what_another_channel_is_to_send_is_left_alone(desk, channel, sending, settled, owner):
    await desk.subscribe(channel="pager", target="kim")
    await desk.subscribe()
    await desk.open()
    async with sending():
        await desk.parts.projector.catch_up(desk.tenant.id, 0)
        await until(lambda: has(channel.sent))
    assert sorted(await desk.states()) == ["delivered", "pending"]
    assert await owner.fetchval("SELECT count(*) FROM endpoints WHERE lease IS NOT NULL") == 0


async def test_what_is_under_way_ends_before_a_sender_stops(desk, channel, sending):
    hanging = asyncio.Event()
    await desk.subscribe()
    channel.answers["https://example.com/x"] = hanging
    await desk.open()
    async with sending() as sender:
        await desk.parts.projector.catch_up(desk.tenant.id, 0)
        await until(lambda: asyncio.sleep(0, bool(channel.sent)))
        stopping = asyncio.create_task(sender.stop())
        hanging.set()
        await stopping
    assert await desk.states() == ["delivered"]


async def test_stopping_begins_nothing_more_and_records_what_came_though_something_hangs(
    desk, channel, sending, owner, monkeypatch
):
    monkeypatch.setattr(dispatcher, "_STOP_SECONDS", 0.3)
    monkeypatch.setattr(dispatcher, "_RECORD_SECONDS", 10.0)
    hanging, answered = await desk.subscribe(target="https://example.com/hangs"), await desk.subscribe()
    channel.answers["https://example.com/hangs"] = asyncio.Event()
    channel.answers[X] = answer = asyncio.Event()
    for _ in range(20):
        await desk.open()
    await desk.take_over()
    async with sending() as sender:
        await until(lambda: has(channel.to("https://example.com/hangs"), channel.to(X)))
        async with owner.transaction():
            # Whoever holds this lock keeps results from being recorded.
            await owner.execute("SELECT FROM endpoints WHERE subscription_id = $1 FOR UPDATE", answered)
            stopping = asyncio.create_task(sender.stop())
            await asyncio.sleep(0)
            answer.set()
            await until(lambda: has(not channel.open.total()))
            assert not stopping.done()
        await stopping
    assert len(channel.sent) == 2
    rows = await desk.rows()
    assert sum(row["state"] == "delivered" for row in rows) == 1
    assert {row["state"] for row in rows if row["subscription_id"] == hanging} == {"pending"}


async def test_what_cannot_be_recorded_holds_up_nothing_else(desk, channel, sending, owner):
    await desk.subscribe(target="https://example.com/odd")
    await desk.subscribe()
    # Nothing that PostgreSQL takes for text.
    channel.answers["https://example.com/odd"] = Outcome("answered \0", 500)
    async with sending(max_concurrent_deliveries=2):
        for _ in range(5):
            await desk.open()
        await desk.take_over()
        await until(lambda: owner.fetchval("SELECT count(*) = 5 FROM deliveries WHERE state = 'delivered'"))
        await until(lambda: owner.fetchval("SELECT count(*) = 0 FROM endpoints WHERE lease IS NOT NULL"))
    # Sent again later, not again and again.
    sent = [message.id for message in channel.to("https://example.com/odd")]
    assert len(sent) == len(set(sent))
    assert await owner.fetchval("SELECT max(available_at) > now() + interval '30 seconds' FROM endpoints")
    odd = [row for row in await desk.rows() if row["state"] != "delivered"]
    assert [(row["state"], row["attempts_total"]) for row in odd] == [("pending", 0)] * 5


async def test_disabling_waits_for_its_tenant_and_nobody_waits_for_that(desk, globex, channel, sending, owner):
    other = Desk(desk.parts, globex)
    await desk.subscribe()
    await other.subscribe(target="https://example.com/other")
    channel.answers[X] = BROKEN
    await desk.open()
    await desk.take_over()
    await owner.execute("UPDATE endpoints SET consecutive_failures = 12, failing_since = now() - interval '6 days'")
    async with sending():
        async with owner.transaction():
            await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", desk.tenant.id)
            await until(lambda: has(channel.to(X)))
            for number in range(3):
                await other.open()
                await other.take_over()
                await until(lambda: has(len(channel.to("https://example.com/other")) == number + 1))  # noqa: B023
                await until(lambda: _delivered(other, number + 1))  # noqa: B023

        # If waiting for the tenant took too long, the next probe asks for it again.
        async def disabled():
            await hurry(owner, 400)
            return await owner.fetchval("SELECT count(*) FROM events WHERE type = 'subscription.disabled'")

        await until(disabled)
        await until(lambda: _ended(desk))
    assert await owner.fetchval("SELECT count(*) FROM events WHERE type = 'subscription.disabled'") == 1


async def _delivered(desk, number):
    return (await desk.states()).count("delivered") == number


async def _ended(desk):
    return set(await desk.states()) == {"disabled"}


async def test_a_loop_that_fails_begins_again(desk, channel, sending, settled, monkeypatch):
    claim = Dispatcher._lease
    failed: list[int] = []

    async def failing(self):
        if len(failed) < 2:
            failed.append(1)
            raise ZeroDivisionError
        return await claim(self)

    monkeypatch.setattr(Dispatcher, "_lease", failing)
    await desk.subscribe()
    await desk.open()
    async with sending():
        await settled()
    assert (len(failed), len(channel.sent)) == (2, 1)


@pytest.mark.parametrize("answer", [Outcome("answered 410", 410, endpoint_gone=True), OK])
async def test_a_subscription_that_was_changed_meanwhile_is_not_disabled_for_its_old_target(
    desk, channel, sending, settled, owner, answer
):
    number, asked = await desk.subscribe(), asyncio.Event()

    async def late():
        await asked.wait()
        return answer

    channel.answers[X] = late
    await desk.open()
    async with sending():
        await desk.take_over()
        await until(lambda: has(channel.to(X)))
        change = subscription.ChangeSubscription(target="https://example.com/mended")
        await commands.change(desk.parts, subscription.DECIDER, desk.tenant.id, number, change, META)
        await desk.parts.projector.catch_up(desk.tenant.id, 0)
        asked.set()
        await settled()
        await desk.open()
        await settled()
        await hurry(owner, 10)
        await settled()
    # What the old target did not take goes to the new one.
    assert len(channel.to("https://example.com/mended")) == (2 if answer.endpoint_gone else 1)
    assert await desk.states() == ["delivered"] * 2
    assert await owner.fetchval("SELECT count(*) FROM events WHERE type = 'subscription.disabled'") == 0


async def test_a_channel_that_fails_by_a_defect_ends_nobodys_turn(desk, channel, sending, settled, owner):
    await desk.subscribe()

    async def defect():
        raise KeyError("a type of newer code")

    channel.answers[X] = defect
    await desk.open()
    async with sending():
        await settled()
        (row,) = await desk.rows()
        assert (row["state"], row["attempts_in_round"], row["error"]) == ("pending", 1, "the message could not be sent")
        channel.answers[X] = OK
        await hurry(owner, 400)
        await settled()
    assert await desk.states() == ["delivered"]


async def test_a_database_that_refuses_for_the_moment_makes_nothing_be_sent_again(
    desk, channel, sending, settled, monkeypatch
):
    record = results.record_results
    refused: list[int] = []

    async def refusing(*arguments):
        if len(refused) < 3:
            refused.append(1)
            raise asyncpg.QueryCanceledError("canceling statement due to statement timeout")
        return await record(*arguments)

    monkeypatch.setattr(results, "record_results", refusing)
    await desk.subscribe()
    await desk.open()
    async with sending(lease_seconds=1000.0):
        await settled()
    assert (len(refused), len(channel.sent)) == (3, 1)
    assert await desk.states() == ["delivered"]


async def test_few_sockets_are_enough_for_who_answers_well(desk, globex, channel, sending, settled):
    other = Desk(desk.parts, globex)
    await desk.subscribe()
    for _ in range(3):
        await desk.open()
    async with sending(max_concurrent_deliveries=4):
        await settled()  # it has shown that it answers well
        for each, target in ((desk, "https://example.com/hangs"), (other, "https://example.com/too")):
            await each.subscribe(target=target)
            channel.answers[target] = asyncio.Event()
        await other.open()
        await other.take_over()
        await until(lambda: has(channel.to("https://example.com/too")))
        for number in range(4, 7):
            await desk.open()
            await desk.take_over()
            await until(lambda: has(len(channel.to(X)) == number))  # noqa: B023
        assert channel.to("https://example.com/hangs")


async def test_a_tenant_whose_intents_cannot_be_taken_over_holds_up_no_other(
    desk, globex, channel, sending, monkeypatch
):
    take_over, other = enqueue.enqueue_intents, Desk(desk.parts, globex)

    async def failing(connection, tenant_ids, *more):
        if desk.tenant.id in tenant_ids:
            raise ZeroDivisionError
        return await take_over(connection, tenant_ids, *more)

    monkeypatch.setattr(enqueue, "enqueue_intents", failing)
    for each, target in ((desk, X), (other, "https://example.com/other")):
        await each.subscribe(target=target)
        await each.open()
        await each.parts.projector.catch_up(each.tenant.id, 0)
    async with sending():
        await until(lambda: has(channel.to("https://example.com/other")))
    assert channel.to(X) == []


async def test_very_many_endpoints_that_are_off_are_ended_some_at_a_time(desk, sending, channel, owner, monkeypatch):
    monkeypatch.setattr(recorder, "MAX_BATCH", 20)
    monkeypatch.setattr(results, "_DISABLE_BATCH", 40)
    record, sizes = results.record_results, []

    async def noting(connection, work, burst):
        sizes.append(len(work))
        return await record(connection, work, burst)

    monkeypatch.setattr(results, "record_results", noting)
    numbers = [await desk.subscribe(target=f"https://example.com/{number}") for number in range(100)]
    for _ in range(5):
        await desk.open()
    await desk.take_over()
    for number in numbers:
        command = subscription.ChangeSubscription(enabled=False)
        await commands.change(desk.parts, subscription.DECIDER, desk.tenant.id, number, command, META)
    await desk.parts.projector.catch_up(desk.tenant.id, 0)
    async with sending():
        await until(lambda: owner.fetchval("SELECT count(*) = 500 FROM deliveries WHERE state = 'disabled'"))
    assert max(sizes) <= 20
    assert channel.sent == []

"""Dispatchers: each channel has its own, and what came of messages is recorded whatever else happens."""

import asyncio

from opsentry.notifications import dispatcher
from opsentry.notifications.channel import Outcome
from opsentry.notifications.dispatcher import Dispatcher
from tests.notifications.desk import Desk
from tests.notifications.sending import BROKEN, Scripted, hurry
from tests.system.processes import until

X = "https://example.com/x"


async def has(*said):
    return all(said)


async def test_a_channel_that_hangs_holds_up_no_other(desk, channel, sending, settled):
    mail, hanging = Scripted("email", at_once=3), asyncio.Event()
    for number in range(40):
        await desk.subscribe(channel="email", target=f"kim{number}@example.com")
        mail.answers[f"kim{number}@example.com"] = hanging
    for number in range(8):
        await desk.subscribe(target=f"https://example.com/{number}")
    async with sending([mail, channel], sockets=8):
        await desk.open()
        await desk.parts.runner.catch_up(desk.tenant.id, 0)
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
        await desk.parts.runner.catch_up(desk.tenant.id, 0)
        await until(lambda: has(channel.sent))
    assert sorted(await desk.states()) == ["delivered", "waiting"]
    assert await owner.fetchval("SELECT count(*) FROM endpoints WHERE lease IS NOT NULL") == 0


async def test_what_is_under_way_ends_before_a_sender_stops(desk, channel, sending):
    hanging = asyncio.Event()
    await desk.subscribe()
    channel.answers["https://example.com/x"] = hanging
    await desk.open()
    async with sending() as sender:
        await desk.parts.runner.catch_up(desk.tenant.id, 0)
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
    assert {row["state"] for row in rows if row["subscription_id"] == hanging} == {"waiting"}


async def test_what_cannot_be_recorded_holds_up_nothing_else(desk, channel, sending, owner):
    await desk.subscribe(target="https://example.com/odd")
    await desk.subscribe()
    # Nothing that PostgreSQL takes for text.
    channel.answers["https://example.com/odd"] = Outcome("answered \0", 500)
    async with sending(sockets=2):
        for _ in range(5):
            await desk.open()
        await desk.take_over()
        await until(lambda: owner.fetchval("SELECT count(*) = 5 FROM deliveries WHERE state = 'delivered'"))
    odd = [row for row in await desk.rows() if row["state"] != "delivered"]
    assert [(row["state"], row["tried"]) for row in odd] == [("waiting", 0)] * 5


async def test_disabling_waits_for_its_tenant_and_nobody_waits_for_that(desk, globex, channel, sending, owner):
    other = Desk(desk.parts, globex)
    await desk.subscribe()
    await other.subscribe(target="https://example.com/other")
    channel.answers[X] = BROKEN
    await desk.open()
    await desk.take_over()
    await owner.execute("UPDATE endpoints SET failures = 12, failing_since = now() - interval '6 days'")
    async with sending():
        async with owner.transaction():
            await owner.execute("SELECT FROM heads WHERE tenant_id = $1 FOR UPDATE", desk.tenant.id)
            await until(lambda: has(channel.to(X)))
            for number in range(3):
                await other.open()
                await other.take_over()
                await until(lambda: has(len(channel.to("https://example.com/other")) == number + 1))  # noqa: B023
                await until(lambda: _delivered(other, number + 1))  # noqa: B023
        # If waiting for the tenant took too long, the next probe asks for it again.
        for _ in range(100):
            await hurry(owner, 400)
            if await owner.fetchval("SELECT count(*) FROM events WHERE type = 'subscription.disabled'"):
                break
            await asyncio.sleep(0.1)
        await until(lambda: _ended(desk))
    assert await owner.fetchval("SELECT count(*) FROM events WHERE type = 'subscription.disabled'") == 1


async def _delivered(desk, number):
    return (await desk.states()).count("delivered") == number


async def _ended(desk):
    return set(await desk.states()) == {"disabled"}


async def test_a_loop_that_fails_begins_again(desk, channel, sending, settled, monkeypatch):
    claim = Dispatcher._claim
    failed: list[int] = []

    async def failing(self):
        if len(failed) < 2:
            failed.append(1)
            raise ZeroDivisionError
        return await claim(self)

    monkeypatch.setattr(Dispatcher, "_claim", failing)
    await desk.subscribe()
    await desk.open()
    async with sending():
        await settled()
    assert (len(failed), len(channel.sent)) == (2, 1)

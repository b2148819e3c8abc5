"""Each channel has its own dispatcher. Results are recorded even if other work fails."""

import asyncio

import asyncpg
import pytest

from opsentry.domain import subscription
from opsentry.notifications.channel import Outcome
from opsentry.notifications.delivery import dispatcher, enqueue, recorder, results
from opsentry.notifications.delivery.dispatcher import Dispatcher
from tests import commands
from tests.conftest import META
from tests.notifications.driver import DeliveryDriver
from tests.notifications.scripted_channel import BROKEN, OK, ScriptedChannel, advance_time
from tests.waiting import until

X = "https://example.com/x"


async def has(*said):
    return all(said)


async def test_a_hanging_channel_delays_no_other_channel(driver, channel, sending, wait_until_idle):
    mail, hanging = ScriptedChannel("email", max_concurrency=3), asyncio.Event()
    for number in range(40):
        await driver.subscribe(channel="email", target=f"kim{number}@example.com")
        mail.outcomes[f"kim{number}@example.com"] = hanging
    for number in range(8):
        await driver.subscribe(target=f"https://example.com/{number}")
    async with sending([mail, channel], max_concurrent_deliveries=8):
        await driver.open_incident()
        await driver.parts.projector.catch_up(driver.tenant.id, 0)
        await until(lambda: has(len(mail.sent) == 3, len(channel.sent) == 8))
        hanging.set()
        await wait_until_idle()
    assert len(mail.sent) == 40
    # The full concurrency is used though no endpoint is proven: the shared relay answers, not the endpoints.
    assert mail.max_total == 3


async def test_a_dispatcher_leases_endpoints_of_its_own_channel_only(driver, channel, sending, wait_until_idle, owner):
    await driver.subscribe(channel="pager", target="kim")
    await driver.subscribe()
    await driver.open_incident()
    async with sending():
        await driver.parts.projector.catch_up(driver.tenant.id, 0)
        await until(lambda: has(channel.sent))
    assert sorted(await driver.states()) == ["delivered", "pending"]
    assert await owner.fetchval("SELECT count(*) FROM endpoints WHERE lease IS NOT NULL") == 0


async def test_stopping_waits_for_messages_in_flight(driver, channel, sending):
    hanging = asyncio.Event()
    await driver.subscribe()
    channel.outcomes["https://example.com/x"] = hanging
    await driver.open_incident()
    async with sending() as sender:
        await driver.parts.projector.catch_up(driver.tenant.id, 0)
        await until(lambda: asyncio.sleep(0, bool(channel.sent)))
        stopping = asyncio.create_task(sender.stop())
        hanging.set()
        await stopping
    assert await driver.states() == ["delivered"]


async def test_stopping_starts_nothing_and_records_results_though_an_endpoint_hangs(
    driver, channel, sending, owner, monkeypatch
):
    monkeypatch.setattr(dispatcher, "_STOP_SECONDS", 0.3)
    monkeypatch.setattr(dispatcher, "_RECORD_SECONDS", 10.0)
    hanging, answered = await driver.subscribe(target="https://example.com/hangs"), await driver.subscribe()
    channel.outcomes["https://example.com/hangs"] = asyncio.Event()
    channel.outcomes[X] = answer = asyncio.Event()
    for _ in range(20):
        await driver.open_incident()
    await driver.enqueue()
    async with sending() as sender:
        await until(lambda: has(channel.sent_to("https://example.com/hangs"), channel.sent_to(X)))
        async with owner.transaction():
            # This lock keeps results from being recorded.
            await owner.execute("SELECT FROM endpoints WHERE subscription_id = $1 FOR UPDATE", answered)
            stopping = asyncio.create_task(sender.stop())
            await asyncio.sleep(0)
            answer.set()
            await until(lambda: has(not channel.in_flight.total()))
            assert not stopping.done()
        await stopping
    assert len(channel.sent) == 2
    rows = await driver.rows()
    assert sum(row["state"] == "delivered" for row in rows) == 1
    assert {row["state"] for row in rows if row["subscription_id"] == hanging} == {"pending"}


async def test_a_result_that_cannot_be_recorded_delays_no_other(driver, channel, sending, owner):
    await driver.subscribe(target="https://example.com/odd")
    await driver.subscribe()
    # PostgreSQL rejects NUL in text.
    channel.outcomes["https://example.com/odd"] = Outcome("answered \0", 500)
    async with sending(max_concurrent_deliveries=2):
        for _ in range(5):
            await driver.open_incident()
        await driver.enqueue()
        await until(lambda: owner.fetchval("SELECT count(*) = 5 FROM deliveries WHERE state = 'delivered'"))
        await until(lambda: owner.fetchval("SELECT count(*) = 0 FROM endpoints WHERE lease IS NOT NULL"))
    # The message is repeated only after a backoff.
    sent = [message.id for message in channel.sent_to("https://example.com/odd")]
    assert len(sent) == len(set(sent))
    assert await owner.fetchval("SELECT max(available_at) > now() + interval '30 seconds' FROM endpoints")
    odd = [row for row in await driver.rows() if row["state"] != "delivered"]
    assert [(row["state"], row["attempts_total"]) for row in odd] == [("pending", 0)] * 5


async def test_disabling_waits_for_a_busy_tenant_without_delaying_others(driver, globex, channel, sending, owner):
    other = DeliveryDriver(driver.parts, globex)
    await driver.subscribe()
    await other.subscribe(target="https://example.com/other")
    channel.outcomes[X] = BROKEN
    await driver.open_incident()
    await driver.enqueue()
    await owner.execute("UPDATE endpoints SET consecutive_failures = 12, failing_since = now() - interval '6 days'")
    async with sending():
        async with owner.transaction():
            await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", driver.tenant.id)
            await until(lambda: has(channel.sent_to(X)))
            for number in range(3):
                await other.open_incident()
                await other.enqueue()
                await until(lambda: has(len(channel.sent_to("https://example.com/other")) == number + 1))  # noqa: B023
                await until(lambda: _delivered(other, number + 1))  # noqa: B023

        # If disabling timed out, the next probe triggers it again.
        async def disabled():
            await advance_time(owner, 400)
            return await owner.fetchval("SELECT count(*) FROM events WHERE type = 'subscription.disabled'")

        await until(disabled)
        await until(lambda: _ended(driver))
    assert await owner.fetchval("SELECT count(*) FROM events WHERE type = 'subscription.disabled'") == 1


async def _delivered(driver, number):
    return (await driver.states()).count("delivered") == number


async def _ended(driver):
    return set(await driver.states()) == {"disabled"}


async def test_a_loop_restarts_after_a_failure(driver, channel, sending, wait_until_idle, monkeypatch):
    claim = Dispatcher._lease
    failed: list[int] = []

    async def failing(self):
        if len(failed) < 2:
            failed.append(1)
            raise ZeroDivisionError
        return await claim(self)

    monkeypatch.setattr(Dispatcher, "_lease", failing)
    await driver.subscribe()
    await driver.open_incident()
    async with sending():
        await wait_until_idle()
    assert (len(failed), len(channel.sent)) == (2, 1)


@pytest.mark.parametrize("answer", [Outcome("answered 410", 410, endpoint_gone=True), OK])
async def test_a_subscription_with_a_new_target_is_not_disabled_for_its_old_one(
    driver, channel, sending, wait_until_idle, owner, answer
):
    number, asked = await driver.subscribe(), asyncio.Event()

    async def late():
        await asked.wait()
        return answer

    channel.outcomes[X] = late
    await driver.open_incident()
    async with sending():
        await driver.enqueue()
        await until(lambda: has(channel.sent_to(X)))
        change = subscription.ChangeSubscription(target="https://example.com/mended")
        await commands.change(driver.parts, subscription.DECIDER, driver.tenant.id, number, change, META)
        await driver.parts.projector.catch_up(driver.tenant.id, 0)
        asked.set()
        await wait_until_idle()
        await driver.open_incident()
        await wait_until_idle()
        await advance_time(owner, 10)
        await wait_until_idle()
    # The new target gets a message that the old one did not accept.
    assert len(channel.sent_to("https://example.com/mended")) == (2 if answer.endpoint_gone else 1)
    assert await driver.states() == ["delivered"] * 2
    assert await owner.fetchval("SELECT count(*) FROM events WHERE type = 'subscription.disabled'") == 0


async def test_a_defect_of_a_channel_is_a_failed_attempt(driver, channel, sending, wait_until_idle, owner):
    await driver.subscribe()

    async def defect():
        raise KeyError("a type of newer code")

    channel.outcomes[X] = defect
    await driver.open_incident()
    async with sending():
        await wait_until_idle()
        (row,) = await driver.rows()
        assert (row["state"], row["attempts_in_round"], row["error"]) == ("pending", 1, "the message could not be sent")
        channel.outcomes[X] = OK
        await advance_time(owner, 400)
        await wait_until_idle()
    assert await driver.states() == ["delivered"]


async def test_a_transient_database_failure_repeats_no_message(driver, channel, sending, wait_until_idle, monkeypatch):
    record = results.record_results
    refused: list[int] = []

    async def refusing(*arguments):
        if len(refused) < 3:
            refused.append(1)
            raise asyncpg.QueryCanceledError("canceling statement due to statement timeout")
        return await record(*arguments)

    monkeypatch.setattr(results, "record_results", refusing)
    await driver.subscribe()
    await driver.open_incident()
    async with sending(lease_seconds=1000.0):
        await wait_until_idle()
    assert (len(refused), len(channel.sent)) == (3, 1)
    assert await driver.states() == ["delivered"]


async def test_a_proven_endpoint_is_served_beside_hanging_ones_with_little_concurrency(
    driver, globex, channel, sending, wait_until_idle
):
    other = DeliveryDriver(driver.parts, globex)
    await driver.subscribe()
    for _ in range(3):
        await driver.open_incident()
    async with sending(max_concurrent_deliveries=4):
        await wait_until_idle()  # its concurrency is above 1 now
        for each, target in ((driver, "https://example.com/hangs"), (other, "https://example.com/too")):
            await each.subscribe(target=target)
            channel.outcomes[target] = asyncio.Event()
        await other.open_incident()
        await other.enqueue()
        await until(lambda: has(channel.sent_to("https://example.com/too")))
        for number in range(4, 7):
            await driver.open_incident()
            await driver.enqueue()
            await until(lambda: has(len(channel.sent_to(X)) == number))  # noqa: B023
        assert channel.sent_to("https://example.com/hangs")


async def test_a_tenant_whose_intents_cannot_be_enqueued_delays_no_other(driver, globex, channel, sending, monkeypatch):
    enqueue_intents, other = enqueue.enqueue_intents, DeliveryDriver(driver.parts, globex)

    async def failing(connection, tenant_ids, *more):
        if driver.tenant.id in tenant_ids:
            raise ZeroDivisionError
        return await enqueue_intents(connection, tenant_ids, *more)

    monkeypatch.setattr(enqueue, "enqueue_intents", failing)
    for each, target in ((driver, X), (other, "https://example.com/other")):
        await each.subscribe(target=target)
        await each.open_incident()
        await each.parts.projector.catch_up(each.tenant.id, 0)
    async with sending():
        await until(lambda: has(channel.sent_to("https://example.com/other")))
    assert channel.sent_to(X) == []


async def test_deliveries_of_many_disabled_endpoints_end_in_batches(driver, sending, channel, owner, monkeypatch):
    monkeypatch.setattr(recorder, "MAX_BATCH", 20)
    monkeypatch.setattr(results, "_DISABLE_BATCH", 40)
    record, sizes = results.record_results, []

    async def noting(connection, batch, coalesce_seconds):
        sizes.append(len(batch))
        return await record(connection, batch, coalesce_seconds)

    monkeypatch.setattr(results, "record_results", noting)
    numbers = [await driver.subscribe(target=f"https://example.com/{number}") for number in range(100)]
    for _ in range(5):
        await driver.open_incident()
    await driver.enqueue()
    for number in numbers:
        command = subscription.ChangeSubscription(enabled=False)
        await commands.change(driver.parts, subscription.DECIDER, driver.tenant.id, number, command, META)
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    async with sending():
        await until(lambda: owner.fetchval("SELECT count(*) = 500 FROM deliveries WHERE state = 'disabled'"))
    assert max(sizes) <= 20
    assert channel.sent == []

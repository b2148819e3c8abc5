"""The delivery service: retries, probes, final states and fairness, with a scripted channel."""

import asyncio

from opsentry.domain import subscription
from opsentry.domain.incident import PostUpdate, ResolveIncident
from opsentry.notifications.channel import Outcome
from tests import commands
from tests.conftest import META
from tests.notifications.driver import DeliveryDriver
from tests.notifications.scripted_channel import BROKEN, OK, advance_time
from tests.waiting import GENEROUS_SECONDS, until


async def test_changes_are_sent_in_order_with_the_state_of_their_time(driver, channel, sending, wait_until_idle):
    await driver.subscribe()
    async with sending():
        one = await driver.open_incident()
        await driver.change_incident(one, PostUpdate(message="a", status="identified"), ResolveIncident())
        await wait_until_idle()
    told = [(m.type, m.subject["status"], m.position) for m in channel.sent_to("https://example.com/x")]
    assert [what[1] for what in told] == ["investigating", "identified", "identified", "resolved"]
    assert (told[0][0], told[-1][0]) == ("incident.opened", "incident.resolved")
    assert [what[2] for what in told] == sorted(what[2] for what in told)
    assert await driver.states() == ["delivered"] * len(told)


async def test_a_failed_delivery_is_retried_by_the_schedule_and_then_exhausted(
    driver, channel, sending, wait_until_idle, owner
):
    await driver.subscribe()
    channel.outcomes["https://example.com/x"] = BROKEN
    await driver.open_incident()
    waits = []
    async with sending():
        for step in range(8):
            await wait_until_idle()
            (row,) = await driver.rows()
            assert (row["attempts_in_round"], row["error"], row["response_status"]) == (step + 1, "answered 500", 500)
            if row["state"] == "pending":
                waits.append(
                    await owner.fetchval("SELECT extract(epoch FROM next_attempt_at - now())::float8 FROM deliveries")
                )
                await advance_time(owner, 50_000)
    assert row["state"] == "exhausted"
    for wait, ladder in zip(waits, (5, 300, 1800, 7200, 18000, 36000, 36000), strict=True):
        assert ladder * 0.8 - 5 <= wait <= ladder * 1.2
    assert len({message.id for message in channel.sent_to("https://example.com/x")}) == 1
    assert [row["number"] for row in await owner.fetch("SELECT number FROM delivery_attempts ORDER BY 1")] == list(
        range(1, 9)
    )


async def test_retry_after_delays_the_whole_endpoint(driver, channel, sending, wait_until_idle, owner):
    await driver.subscribe()
    channel.outcomes["https://example.com/x"] = Outcome("answered 429", 429, retry_after=1000.0)
    for _ in range(3):
        await driver.open_incident()
    async with sending():
        await wait_until_idle()
    assert len(channel.sent) == 1
    wait = await owner.fetchval("SELECT extract(epoch FROM available_at - now())::float8 FROM endpoints")
    assert 990 < wait <= 1000


async def test_ten_consecutive_failures_leave_one_probe_at_a_time_until_a_success(
    driver, channel, sending, wait_until_idle, owner
):
    await driver.subscribe()
    channel.outcomes["https://example.com/x"] = BROKEN
    for _ in range(30):
        await driver.open_incident()
    async with sending():
        await wait_until_idle()
        while len(channel.sent) < 10:
            await advance_time(owner, 300)
            await wait_until_idle()
        await wait_until_idle()
        assert len(channel.sent) == 10
        for probe in range(1, 4):
            await advance_time(owner, 400)
            await wait_until_idle()
            assert len(channel.sent) == 10 + probe
        channel.outcomes["https://example.com/x"] = OK
        await advance_time(owner, 400)
        await wait_until_idle()
        await advance_time(owner, 100_000)
        await wait_until_idle()
    assert await driver.states() == ["delivered"] * 30


async def test_five_days_of_failures_disable_the_subscription_in_the_ledger(
    driver, channel, sending, wait_until_idle, owner
):
    number = await driver.subscribe()
    channel.outcomes["https://example.com/x"] = BROKEN
    for _ in range(12):
        await driver.open_incident()
    async with sending():
        await wait_until_idle()
        while len(channel.sent) < 10:
            await advance_time(owner, 300)
            await wait_until_idle()
        await advance_time(owner, 5 * 86400)
        await until(lambda: owner.fetchval("SELECT EXISTS (SELECT FROM events WHERE type = 'subscription.disabled')"))
        await wait_until_idle()
        await driver.open_incident()
        await wait_until_idle()
    assert set(await driver.states()) == {"disabled"}
    assert (
        await owner.fetchval("SELECT data FROM events WHERE type = 'subscription.disabled'")
        == '{"reason":"endpoint_failing"}'
    )
    assert number


async def test_an_endpoint_that_is_gone_disables_the_subscription_at_once(
    driver, channel, sending, wait_until_idle, owner
):
    await driver.subscribe()
    channel.outcomes["https://example.com/x"] = Outcome("answered 410", 410, endpoint_gone=True)
    for _ in range(3):
        await driver.open_incident()
    async with sending():
        await wait_until_idle()
        assert len(channel.sent) == 1
        assert set(await driver.states()) == {"disabled"}
    assert (
        await owner.fetchval("SELECT data FROM events WHERE type = 'subscription.disabled'")
        == '{"reason":"endpoint_gone"}'
    )


async def test_an_internal_failure_does_not_count_against_the_endpoint(
    driver, channel, sending, wait_until_idle, owner
):
    await driver.subscribe()
    channel.outcomes["https://example.com/x"] = Outcome("the mail relay is down", internal_failure=True)
    await driver.open_incident()
    async with sending():
        for _ in range(12):
            await wait_until_idle()
            await advance_time(owner, 100)
        await wait_until_idle()
        assert await owner.fetchval("SELECT consecutive_failures FROM endpoints") == 0
        (row,) = await driver.rows()
        assert (row["state"], row["attempts_in_round"], row["error"]) == ("pending", 0, "the mail relay is down")
        # Attempts record only the behaviour of the endpoint.
        assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 0
        channel.outcomes["https://example.com/x"] = OK
        await advance_time(owner, 100)
        await wait_until_idle()
    assert await driver.states() == ["delivered"]


async def test_concurrency_grows_with_successes_and_falls_to_one_with_a_failure(
    driver, channel, sending, wait_until_idle, owner
):
    await driver.subscribe()

    async def respond_late():
        # Longer than the start of eight attempts takes on a busy machine, so that all overlap.
        await asyncio.sleep(0.03)
        return OK

    channel.outcomes["https://example.com/x"] = respond_late
    for _ in range(200):
        await driver.open_incident()
    async with sending():
        await wait_until_idle()
        assert channel.max_in_flight["https://example.com/x"] == 8
        assert await owner.fetchval("SELECT concurrency FROM endpoints") == 8
        channel.outcomes["https://example.com/x"] = BROKEN
        await driver.open_incident()
        await wait_until_idle()
    assert await owner.fetchval("SELECT concurrency FROM endpoints") == 1


async def test_hanging_endpoints_leave_room_for_others(driver, channel, sending, wait_until_idle):
    hanging = asyncio.Event()
    for number in range(20):
        await driver.subscribe(target=f"https://example.com/hangs/{number}")
        channel.outcomes[f"https://example.com/hangs/{number}"] = hanging
    for number in range(20):
        await driver.subscribe(target=f"https://example.com/well/{number}")
    async with sending(max_concurrent_deliveries=100):
        await driver.open_incident()
        await driver.parts.projector.catch_up(driver.tenant.id, 0)
        async with asyncio.timeout(GENEROUS_SECONDS):
            for _ in range(3):
                await until(
                    lambda: asyncio.sleep(0, all(channel.sent_to(f"https://example.com/well/{n}") for n in range(20)))
                )
                await driver.open_incident()
        hanging.set()
        await wait_until_idle()


async def test_a_tenant_with_many_endpoints_leaves_room_for_another_tenant(driver, globex, channel, sending):
    other = DeliveryDriver(driver.parts, globex)
    hanging = asyncio.Event()
    for number in range(40):
        await driver.subscribe(target=f"https://example.com/hangs/{number}")
        channel.outcomes[f"https://example.com/hangs/{number}"] = hanging
    await other.subscribe(target="https://example.com/other")
    async with sending(max_concurrent_deliveries=32):
        await driver.open_incident()
        await driver.parts.projector.catch_up(driver.tenant.id, 0)
        await until(lambda: asyncio.sleep(0, len(channel.sent) >= 8))
        await other.open_incident()
        await other.parts.projector.catch_up(globex.id, 0)
        await until(lambda: asyncio.sleep(0, bool(channel.sent_to("https://example.com/other"))))
        hanging.set()


async def test_disabled_and_removed_subscriptions_get_nothing(driver, channel, sending, wait_until_idle):
    kept, gone = (
        await driver.subscribe(target="https://example.com/a"),
        await driver.subscribe(target="https://example.com/b"),
    )
    await driver.open_incident()
    await driver.enqueue()
    for number, command in (
        (kept, subscription.ChangeSubscription(enabled=False)),
        (gone, subscription.RemoveSubscription()),
    ):
        await commands.change(driver.parts, subscription.DECIDER, driver.tenant.id, number, command, META)
    await driver.parts.projector.catch_up(driver.tenant.id, 0)
    async with sending():
        await wait_until_idle()
    assert channel.sent == []
    assert await driver.states() == ["disabled", "disabled"]


async def test_a_secret_that_no_key_decrypts_delays_only_its_own_deliveries(
    driver, channel, sending, wait_until_idle, owner
):
    channel.signs_messages = True
    for number in range(5):
        await driver.subscribe(
            target=f"https://example.com/encrypted_secret/{number}",
            encrypted_secret="encrypted_secret with a key that is lost",
        )
    await driver.subscribe(target="https://example.com/open")
    for _ in range(20):
        await driver.open_incident()
    async with sending(max_concurrent_deliveries=4):
        await wait_until_idle()
    assert len(channel.sent) == 20
    rows = await owner.fetch(
        "SELECT DISTINCT state, attempts_in_round, error FROM deliveries"
        " WHERE state <> 'delivered' AND attempts_total = 0"
    )
    assert {(row["state"], row["attempts_in_round"]) for row in rows} == {("pending", 0)}
    assert any("OPSENTRY_ENCRYPTION_KEYS" in (row["error"] or "") for row in rows)

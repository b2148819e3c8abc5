"""The sender: retries, probes, ends, fairness; what it sends with is a channel that answers as it is told."""

import asyncio

from opsentry.domain import subscription
from opsentry.domain.incident import PostUpdate, ResolveIncident
from opsentry.notifications.channel import Outcome
from tests import commands
from tests.conftest import META
from tests.notifications.desk import Desk
from tests.notifications.sending import BROKEN, OK, hurry
from tests.waiting import until


async def test_what_happens_is_sent_in_order_with_its_state_of_then(desk, channel, sending, settled):
    await desk.subscribe()
    async with sending():
        one = await desk.open()
        await desk.tell(one, PostUpdate(message="a", status="identified"), ResolveIncident())
        await settled()
    told = [(m.type, m.subject["status"], m.position) for m in channel.to("https://example.com/x")]
    assert [what[1] for what in told] == ["investigating", "identified", "identified", "resolved"]
    assert (told[0][0], told[-1][0]) == ("incident.opened", "incident.resolved")
    assert [what[2] for what in told] == sorted(what[2] for what in told)
    assert await desk.states() == ["delivered"] * len(told)


async def test_a_failure_is_tried_again_after_the_steps_of_the_ladder_and_then_parked(
    desk, channel, sending, settled, owner
):
    await desk.subscribe()
    channel.answers["https://example.com/x"] = BROKEN
    await desk.open()
    waits = []
    async with sending():
        for step in range(8):
            await settled()
            (row,) = await desk.rows()
            assert (row["attempts_in_round"], row["error"], row["response_status"]) == (step + 1, "answered 500", 500)
            if row["state"] == "pending":
                waits.append(
                    await owner.fetchval("SELECT extract(epoch FROM next_attempt_at - now())::float8 FROM deliveries")
                )
                await hurry(owner, 50_000)
    assert row["state"] == "exhausted"
    for wait, ladder in zip(waits, (5, 300, 1800, 7200, 18000, 36000, 36000), strict=True):
        assert ladder * 0.8 - 5 <= wait <= ladder * 1.2
    assert len({message.id for message in channel.to("https://example.com/x")}) == 1
    assert [row["number"] for row in await owner.fetch("SELECT number FROM delivery_attempts ORDER BY 1")] == list(
        range(1, 9)
    )


async def test_retry_after_is_honoured_and_the_endpoint_left_alone(desk, channel, sending, settled, owner):
    await desk.subscribe()
    channel.answers["https://example.com/x"] = Outcome("answered 429", 429, retry_after=1000.0)
    for _ in range(3):
        await desk.open()
    async with sending():
        await settled()
    assert len(channel.sent) == 1
    wait = await owner.fetchval("SELECT extract(epoch FROM available_at - now())::float8 FROM endpoints")
    assert 990 < wait <= 1000


async def test_ten_failures_in_a_row_leave_one_probe_at_a_time_until_it_answers(desk, channel, sending, settled, owner):
    await desk.subscribe()
    channel.answers["https://example.com/x"] = BROKEN
    for _ in range(30):
        await desk.open()
    async with sending():
        await settled()
        while len(channel.sent) < 10:
            await hurry(owner, 300)
            await settled()
        await settled()
        assert len(channel.sent) == 10
        for probe in range(1, 4):
            await hurry(owner, 400)
            await settled()
            assert len(channel.sent) == 10 + probe
        channel.answers["https://example.com/x"] = OK
        await hurry(owner, 400)
        await settled()
        await hurry(owner, 100_000)
        await settled()
    assert await desk.states() == ["delivered"] * 30


async def test_five_days_of_failing_disable_and_the_ledger_says_so(desk, channel, sending, settled, owner):
    number = await desk.subscribe()
    channel.answers["https://example.com/x"] = BROKEN
    for _ in range(12):
        await desk.open()
    async with sending():
        await settled()
        while len(channel.sent) < 10:
            await hurry(owner, 300)
            await settled()
        await hurry(owner, 5 * 86400)
        await until(lambda: owner.fetchval("SELECT EXISTS (SELECT FROM events WHERE type = 'subscription.disabled')"))
        await settled()
        await desk.open()
        await settled()
    assert set(await desk.states()) == {"disabled"}
    assert (
        await owner.fetchval("SELECT data FROM events WHERE type = 'subscription.disabled'")
        == '{"reason":"endpoint_failing"}'
    )
    assert number


async def test_gone_disables_at_once(desk, channel, sending, settled, owner):
    await desk.subscribe()
    channel.answers["https://example.com/x"] = Outcome("answered 410", 410, endpoint_gone=True)
    for _ in range(3):
        await desk.open()
    async with sending():
        await settled()
        assert len(channel.sent) == 1
        assert set(await desk.states()) == {"disabled"}
    assert (
        await owner.fetchval("SELECT data FROM events WHERE type = 'subscription.disabled'")
        == '{"reason":"endpoint_gone"}'
    )


async def test_what_fails_for_a_reason_of_ours_says_nothing_of_the_endpoint(desk, channel, sending, settled, owner):
    await desk.subscribe()
    channel.answers["https://example.com/x"] = Outcome("the mail relay is down", internal_failure=True)
    await desk.open()
    async with sending():
        for _ in range(12):
            await settled()
            await hurry(owner, 100)
        await settled()
        assert await owner.fetchval("SELECT consecutive_failures FROM endpoints") == 0
        (row,) = await desk.rows()
        assert (row["state"], row["attempts_in_round"], row["error"]) == ("pending", 0, "the mail relay is down")
        # Attempts say what *they* did.
        assert await owner.fetchval("SELECT count(*) FROM delivery_attempts") == 0
        channel.answers["https://example.com/x"] = OK
        await hurry(owner, 100)
        await settled()
    assert await desk.states() == ["delivered"]


async def test_an_endpoint_is_trusted_with_more_as_it_answers_well_and_with_one_once_it_fails(
    desk, channel, sending, settled, owner
):
    await desk.subscribe()
    for _ in range(200):
        await desk.open()
    async with sending():
        await settled()
        assert channel.widest["https://example.com/x"] == 8
        assert await owner.fetchval("SELECT concurrency FROM endpoints") == 8
        channel.answers["https://example.com/x"] = BROKEN
        await desk.open()
        await settled()
    assert await owner.fetchval("SELECT concurrency FROM endpoints") == 1


async def test_endpoints_that_hang_leave_room_for_the_others(desk, channel, sending, settled):
    hanging = asyncio.Event()
    for number in range(20):
        await desk.subscribe(target=f"https://example.com/hangs/{number}")
        channel.answers[f"https://example.com/hangs/{number}"] = hanging
    for number in range(20):
        await desk.subscribe(target=f"https://example.com/well/{number}")
    async with sending(max_concurrent_deliveries=100):
        await desk.open()
        await desk.parts.projector.catch_up(desk.tenant.id, 0)
        async with asyncio.timeout(20):
            for _ in range(3):
                await until(
                    lambda: asyncio.sleep(0, all(channel.to(f"https://example.com/well/{n}") for n in range(20)))
                )
                await desk.open()
        hanging.set()
        await settled()


async def test_a_tenant_with_very_many_endpoints_leaves_room_for_another(desk, globex, channel, sending):
    other = Desk(desk.parts, globex)
    hanging = asyncio.Event()
    for number in range(40):
        await desk.subscribe(target=f"https://example.com/hangs/{number}")
        channel.answers[f"https://example.com/hangs/{number}"] = hanging
    await other.subscribe(target="https://example.com/other")
    async with sending(max_concurrent_deliveries=32):
        await desk.open()
        await desk.parts.projector.catch_up(desk.tenant.id, 0)
        await until(lambda: asyncio.sleep(0, len(channel.sent) >= 8))
        await other.open()
        await other.parts.projector.catch_up(globex.id, 0)
        await until(lambda: asyncio.sleep(0, bool(channel.to("https://example.com/other"))))
        hanging.set()


async def test_nothing_is_sent_to_who_was_disabled_or_removed(desk, channel, sending, settled):
    kept, gone = (
        await desk.subscribe(target="https://example.com/a"),
        await desk.subscribe(target="https://example.com/b"),
    )
    await desk.open()
    await desk.take_over()
    for number, command in (
        (kept, subscription.ChangeSubscription(enabled=False)),
        (gone, subscription.RemoveSubscription()),
    ):
        await commands.change(desk.parts, subscription.DECIDER, desk.tenant.id, number, command, META)
    await desk.parts.projector.catch_up(desk.tenant.id, 0)
    async with sending():
        await settled()
    assert channel.sent == []
    assert await desk.states() == ["disabled", "disabled"]


async def test_secrets_that_no_key_opens_hold_their_messages_back_and_nobody_elses(
    desk, channel, sending, settled, owner
):
    channel.signs_messages = True
    for number in range(5):
        await desk.subscribe(
            target=f"https://example.com/encrypted_secret/{number}",
            encrypted_secret="encrypted_secret with a key that is lost",
        )
    await desk.subscribe(target="https://example.com/open")
    for _ in range(20):
        await desk.open()
    async with sending(max_concurrent_deliveries=4):
        await settled()
    assert len(channel.sent) == 20
    rows = await owner.fetch(
        "SELECT DISTINCT state, attempts_in_round, error FROM deliveries"
        " WHERE state <> 'delivered' AND attempts_total = 0"
    )
    assert {(row["state"], row["attempts_in_round"]) for row in rows} == {("pending", 0)}
    assert any("OPSENTRY_ENCRYPTION_KEYS" in (row["error"] or "") for row in rows)

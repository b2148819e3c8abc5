"""A sender is killed many times at every point: all messages arrive in order, and few arrive twice."""

import asyncio
import random
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from ipaddress import ip_network

import pytest
from rich.console import Console
from rich.table import Table
from standardwebhooks import Webhook

from opsentry.bootstrap import core
from opsentry.domain import incident, subscription
from opsentry.domain.incident import OpenIncident, PostUpdate
from opsentry.domain.subscription import CreateSubscription
from opsentry.infrastructure.encryption import SecretBox, generate_key
from opsentry.notifications.messages.signing import new_secret
from tests import commands
from tests.conftest import META, make_tenant
from tests.system.processes import Running, environment
from tests.system.receivers import receivers
from tests.system.sending_process import POINTS
from tests.waiting import GENEROUS_SECONDS, until

LEASE = 1.0
# The limit of messages in flight. As many others may wait to be recorded.
MAX_CONCURRENCY = 12
# Pending deliveries that the last sender leased: they may be in flight.
IN_FLIGHT = """
SELECT d.intent_id FROM deliveries d JOIN endpoints e USING (tenant_id, subscription_id)
WHERE d.state = 'pending' AND d.last_position IS NOT NULL AND e.lease IS NOT NULL AND e.lease <> ALL($1)
"""
LEASES = "SELECT coalesce(array_agg(lease), '{}') FROM endpoints WHERE lease IS NOT NULL"
SESSIONS = """
SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sender'
"""
PENDING = "SELECT count(*) FROM deliveries WHERE state = 'pending'"
BACKLOG = "SELECT count(*) FROM outbox_backlog"


@asynccontextmanager
async def sender(settings, point="-", nth=0):
    env = environment(settings, OPSENTRY_DATABASE_URL=f"{settings.database_url}&application_name=sender")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.system.sending_process", str(LEASE), point, str(nth),
        env=env, stdout=PIPE, stderr=STDOUT,
    )  # fmt: skip
    run = Running(process)
    try:
        yield run
    finally:
        run.kill()
        await run.ended()


async def tell_all(parts, tenant, subscribers, key, url, incidents, updates):
    """Create subscriptions and events that give `subscribers` times `incidents` times 1 + `updates` intents."""
    secrets = {}
    for number in range(subscribers):
        secret = new_secret()
        command = CreateSubscription(
            channel="webhook", target=url(number), encrypted_secret=SecretBox([key]).encrypt(secret)
        )
        made = await commands.create(parts, subscription.DECIDER, tenant.id, command, META)
        secrets[number] = (made.stream_id, secret)
    for number in range(incidents):
        opened = await commands.create(parts, incident.DECIDER, tenant.id, OpenIncident(title=f"Down {number}"), META)
        for update in range(updates):
            more = PostUpdate(message=f"update {update}")
            await commands.change(parts, incident.DECIDER, tenant.id, opened.stream_id, more, META)
    await parts.projector.catch_up(tenant.id, 0)
    return secrets


async def kill_again_and_again(settings, owner, *, subscribers, incidents, updates, at_random, at_points):
    key = generate_key()
    settings = replace(
        settings,
        encryption_keys=(key,),
        webhook_allowed_networks=(ip_network("127.0.0.0/8"),),
        coalesce_seconds=0,
        max_concurrent_deliveries=MAX_CONCURRENCY,
    )
    # These points are passed less often: one transaction covers many messages.
    rounds = [
        (point, nth)
        for point in POINTS
        for nth in random.sample(range(1, 6 if point in {"taking", "recording"} else 30), at_points)
    ]
    rounds += [("-", 0)] * at_random
    random.shuffle(rounds)
    expected = subscribers * incidents * (1 + updates)
    step = expected // (len(rounds) + 2)
    kills: Counter[str] = Counter()
    in_flight, unrecorded = 0, 0
    async with core(settings) as parts, receivers() as there:
        tenant = await make_tenant(parts, "acme")
        secrets = await tell_all(parts, tenant, subscribers, key, there.url, incidents, updates)
        for point, nth in rounds:
            earlier = await owner.fetchval(LEASES)
            async with sender(settings, point, nth) as run:
                if point == "-":
                    enough = there.count + random.randint(1, max(2, step))
                    await until(partial(reached, there, enough, run))
                    run.kill()
                assert await run.ended() == -9, run.said
            await until(lambda: owner.fetchval(SESSIONS))
            await until(partial(is_quiet, there))
            left = {f"msg_{row['intent_id'].hex}" for row in await owner.fetch(IN_FLIGHT, earlier)}
            came = {arrival.id for one in there.arrived.values() for arrival in one}
            kills[point] += 1
            in_flight += len(left)
            unrecorded += len(left & came)
        left_over = await owner.fetchval(PENDING)
        assert left_over, "all was sent before the last kill"
        async with sender(settings):
            await until(lambda: all_sent(owner), seconds=5 * GENEROUS_SECONDS)
    states = await owner.fetch("SELECT state, count(*) FROM deliveries GROUP BY state")
    assert [tuple(row) for row in states] == [("delivered", expected)]
    distinct = 0
    for number, (subscription_id, secret) in secrets.items():
        arrivals = there.arrived[str(number)]
        firsts = list({arrival.id: arrival for arrival in reversed(arrivals)}.values())[::-1]
        distinct += len(firsts)
        last: dict[int, int] = {}
        for arrival in firsts:
            payload = arrival.payload
            about = payload["data"]["incident"]["id"]
            assert payload["position"] > last.get(about, 0), (subscription_id, about)
            last[about] = payload["position"]
        bodies: dict[str, bytes] = {}
        for arrival in arrivals:
            Webhook(secret).verify(arrival.body, arrival.headers)
            assert bodies.setdefault(arrival.id, arrival.body) == arrival.body
    assert distinct == expected
    repeats = there.count - expected
    assert repeats <= unrecorded <= in_flight
    assert repeats <= len(rounds) * 2 * MAX_CONCURRENCY
    return kills, {
        "messages": expected,
        "pending after the last kill": left_over,
        "arrived": there.count,
        "repeats": repeats,
        "in flight at the kills": in_flight,
        "of these, arrived and not recorded": unrecorded,
    }


async def is_quiet(there):
    return there.quiet()


async def reached(there, enough, run):
    return there.count >= enough or run.process.returncode is not None


async def all_sent(owner):
    # The backlog first: an intent that is enqueued in between is then found as a pending delivery.
    return not await owner.fetchval(BACKLOG) and not await owner.fetchval(PENDING)


def show(kills, figures):
    table = Table(title="a sender, killed", show_header=False)
    for name, value in {**{f"kills: {name}": value for name, value in kills.items()}, **figures}.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)


async def test_all_arrives_in_order_however_often_the_sender_is_killed(settings, owner):
    show(
        *await kill_again_and_again(settings, owner, subscribers=20, incidents=12, updates=4, at_random=4, at_points=1)
    )


@pytest.mark.faults
async def test_ten_thousand_messages_and_a_hundred_kills(settings, owner):
    show(
        *await kill_again_and_again(
            settings, owner, subscribers=50, incidents=40, updates=4, at_random=100, at_points=5
        )
    )

"""Sending: messages a second of one sender, and what endpoints that hang or fail cost the others."""

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import uvloop

from bench.figure import Figure
from bench.servers import ROOT, Servers, environment, process, running
from opsentry.bootstrap import Core, core
from opsentry.domain import incident, subscription
from opsentry.domain.incident import OpenIncident
from opsentry.domain.subscription import CreateSubscription
from opsentry.events.codec import Actor, Meta
from opsentry.events.command_handler import CommandOptions
from opsentry.identity import tenants
from opsentry.infrastructure.encryption import SecretBox, generate_key
from opsentry.notifications.messages.signing import new_secret
from opsentry.settings import Settings

META = Meta(Actor("operator"))
# An incident with a description is two events.
ENDPOINTS, INCIDENTS = 50, 100
BARE_CONNECTIONS = 64
# The load of the second measurement: each incident goes to every endpoint, good or bad.
LOAD_ENDPOINTS, BAD_ENDPOINTS = 100, 20
INCIDENTS_PER_SECOND, LOAD_SECONDS = 4, 20.0
ARRIVAL_SECONDS = 600.0
ROUNDS = 3


def measure(servers: Servers) -> Iterator[Figure]:
    """Yield the rate of one sender, and the delay of good endpoints beside bad ones."""
    note = f"{ENDPOINTS} endpoints, {2 * ENDPOINTS * INCIDENTS:,} messages"
    with process(["bench.receiver"]) as url:
        rates = [(_rate(servers, url), _bare(url)) for _ in range(ROUNDS)]
        rate, bare = sorted(rates, key=lambda pair: pair[0] / pair[1])[ROUNDS // 2]
        yield Figure("sending, one sender", "/s", rate, "goal", 1000, 1.0, note)
        yield Figure("sending, one sender", "/s", rate, "bare aiohttp client, same bodies", bare, 0.5)
        good = _p99(servers, url, bad=0)
        among_bad = _p99(servers, url, bad=BAD_ENDPOINTS)
    beside = f"p99 {good * 1000:.0f} ms alone, {among_bad * 1000:.0f} ms beside 10 that hang and 10 that answer 500"
    name = "80 endpoints beside 20 bad ones, 1.5 × of alone"
    yield Figure(name, "ms", good * 1500, "", among_bad * 1000, 1.0, beside)


def ask(url: str, what: str) -> Any:
    """Return the receiver's answer to `stats` or `clear`."""
    with urllib.request.urlopen(f"{url}/{what}") as answer:
        return json.loads(answer.read())


def _environment(servers: Servers, key: str) -> dict[str, str]:
    return {
        **environment(servers, "sending"),
        "OPSENTRY_ENCRYPTION_KEYS": key,
        "OPSENTRY_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8",
        "OPSENTRY_COALESCE_SECONDS": "0",
    }


def _rate(servers: Servers, url: str) -> float:
    """Return messages a second of our sender."""
    servers.database("sending")
    key = generate_key()
    env = _environment(servers, key)
    uvloop.run(_tell(env, [f"{url}/{number}" for number in range(ENDPOINTS)], INCIDENTS, 0.0))
    ask(url, "clear")
    with running(["opsentry", "worker"], env):
        came = until_came(url, 2 * ENDPOINTS * INCIDENTS)
    return rate_of(came)


def rate_of(came: Any) -> float:
    """Return messages a second, from the first arrival to the last."""
    moments = sorted(at for _, at, _ in came)
    return float(len(moments) / (moments[-1] - moments[0]))


def _bare(url: str) -> float:
    with urllib.request.urlopen(f"{url}/sample") as answer:
        body = answer.read()
    command = [sys.executable, "-m", "bench.poster", url, str(2 * ENDPOINTS * INCIDENTS), str(BARE_CONNECTIONS)]
    return float(subprocess.run(command, cwd=ROOT, input=body, check=True, capture_output=True).stdout)


def _p99(servers: Servers, url: str, *, bad: int) -> float:
    """Return the 99th percentile of seconds from recording to arrival at the endpoints that are well."""
    servers.database("sending")
    env = _environment(servers, generate_key())
    names = [f"{url}/{'hang' if number % 2 else 'bad'}{number}" for number in range(bad)]
    names += [f"{url}/well{number}" for number in range(LOAD_ENDPOINTS - BAD_ENDPOINTS)]
    events = int(INCIDENTS_PER_SECOND * LOAD_SECONDS)
    ask(url, "clear")
    with running(["opsentry", "worker"], env):
        uvloop.run(_tell(env, names, events, 1 / INCIDENTS_PER_SECOND))
        came = until_came(url, 2 * events * (LOAD_ENDPOINTS - BAD_ENDPOINTS), "/well")
    waits = sorted(at - recorded for path, at, recorded in came if path.startswith("/well"))
    return float(waits[len(waits) * 99 // 100])


def until_came(url: str, count: int, beginning: str = "/") -> Any:
    """Wait for `count` messages to paths that begin with `beginning`; return (path, arrival, recording) of each.

    Raises:
        TimeoutError: Fewer arrived within `ARRIVAL_SECONDS`.
    """
    end = time.monotonic() + ARRIVAL_SECONDS
    while time.monotonic() < end:
        came = [one for one in ask(url, "stats") if one[0].startswith(beginning)]
        if len(came) >= count:
            return came
        time.sleep(0.5)
    raise TimeoutError(f"{len(came)} of {count} messages arrived in {ARRIVAL_SECONDS:.0f} s")


async def _tell(env: dict[str, str], targets: list[str], incidents: int, pace: float) -> None:
    """Subscribe the targets and open incidents, `pace` seconds apart."""
    settings = replace(Settings.from_environment(env), log_level="error")
    async with core(settings) as parts:
        async with parts.database.connection(10) as connection:
            tenant_id = await tenants.create_tenant(connection, slug="acme", name="Acme", meta=META)
        for target in targets:
            encrypted_secret = SecretBox(settings.encryption_keys).encrypt(new_secret())
            command = CreateSubscription(channel="webhook", target=target, encrypted_secret=encrypted_secret)
            await parts.application.command_handler.create(
                subscription.DECIDER, tenant_id, command, CommandOptions(META)
            )
        await asyncio.gather(*(_open(parts, tenant_id, number, pace) for number in range(incidents)))


async def _open(parts: Core, tenant_id: int, number: int, pace: float) -> None:
    await asyncio.sleep(number * pace)
    command = OpenIncident(title=f"Deploy {number} failed", description="Health checks failing post-deploy")
    opened = await parts.application.command_handler.create(incident.DECIDER, tenant_id, command, CommandOptions(META))
    await parts.projector.catch_up(tenant_id, opened.position)

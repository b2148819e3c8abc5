"""Measure this checkout and another one in turn, in one run.

Both serve the same HTTP API and the same `opsentry projections rebuild`, so every measurement is made from outside.
Appends and verification have no command that both checkouts share: they are not compared.
"""

import asyncio
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from bench import sending
from bench.figure import Figure
from bench.http import BODY, CONNECTIONS, INCIDENTS
from bench.load import load
from bench.servers import ROOT, Servers, environment, opsentry, process, running
from opsentry.infrastructure.encryption import generate_key

# Many short rounds: other work on the machine then slows both sides of a round alike.
HTTP_ROUNDS, HTTP_ROUND_SECONDS = 15, 1.0
REBUILD_ROUNDS = 5
SENDING_ROUNDS = 3
CLIENTS = 64
# No figure may fall below this share of the other checkout's; the rest is noise.
GOAL = 0.95
# Load that fills the ledger before it is rebuilt.
REBUILD_LOAD_SECONDS = 20.0
SCOPES = ("read:status", "write:incidents", "write:subscriptions")


@dataclass(frozen=True)
class Side:
    """One of the two checkouts, with a tenant of its own in a database of its own."""

    servers: Servers
    root: Path
    settings: Mapping[str, str]
    database: str
    service_id: int
    headers: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return {**environment(self.servers, self.database), **self.settings}

    def serve(self, stack: ExitStack) -> str:
        """Start a server that runs as long as `stack`; return its URL."""
        return stack.enter_context(process(["opsentry", "serve"], self.environment, root=self.root))


def http(servers: Servers, *, other: Path, settings: Mapping[str, str]) -> Iterator[Figure]:
    """Yield requests a second of each kind of request."""
    sides = _sides(servers, other, settings)
    with ExitStack() as stack:
        urls = [side.serve(stack) for side in sides]
        for side, url in zip(sides, urls, strict=True):
            _declare(side, url, INCIDENTS)
        numbers = [_any_incident(side, url) for side, url in zip(sides, urls, strict=True)]

        def rate(number: int, method: str, path: str, clients: int, body: str) -> float:
            side = sides[number]
            target = path.format(incident=numbers[number], service=side.service_id)
            options = {"headers": side.headers, "body": body.replace("%d", str(side.service_id))}
            return load(urls[number], method, target, clients, HTTP_ROUND_SECONDS, **options)["rate"]

        for name, method, path, clients, body in (
            ("GET /health", "GET", "/health", CONNECTIONS, ""),
            ("GET /incidents?limit=50", "GET", "/api/v1/incidents?limit=50", CONNECTIONS, ""),
            ("GET /incidents/:id", "GET", "/api/v1/incidents/{incident}", CONNECTIONS, ""),
            ("GET /services", "GET", "/api/v1/services", CONNECTIONS, ""),
            ("GET /services/:id/uptime", "GET", "/api/v1/services/{service}/uptime", CONNECTIONS, ""),
            ("POST /incidents, 64 clients", "POST", "/api/v1/incidents", CLIENTS, BODY),
            (
                "POST /incidents/:id/updates, 1 client",
                "POST",
                "/api/v1/incidents/{incident}/updates",
                1,
                '{"message": "Still down"}',
            ),
        ):
            ours, theirs = _in_turn(lambda number: rate(number, method, path, clients, body), HTTP_ROUNDS)  # noqa: B023
            yield Figure(name, "/s", ours, _name(other), theirs, GOAL)


def rebuild(servers: Servers, *, other: Path, settings: Mapping[str, str]) -> Iterator[Figure]:
    """Yield events a second of a rebuild of all projections."""
    sides = _sides(servers, other, settings)
    for side in sides:
        with ExitStack() as stack:
            load(
                side.serve(stack),
                "POST",
                "/api/v1/incidents",
                CLIENTS,
                REBUILD_LOAD_SECONDS,
                headers=side.headers,
                body=BODY % side.service_id,
            )
    events = [asyncio.run(_events(side)) for side in sides]

    def rate(number: int) -> float:
        side = sides[number]
        began = time.perf_counter()
        opsentry(servers, side.database, "projections", "rebuild", "--all", root=side.root, **side.settings)
        return events[number] / (time.perf_counter() - began)

    ours, theirs = _in_turn(rate, REBUILD_ROUNDS)
    note = f"{events[0]:,} and {events[1]:,} events"
    yield Figure("rebuild of all projections, one tenant", "/s", ours, _name(other), theirs, GOAL, note)


def send(servers: Servers, *, other: Path, settings: Mapping[str, str]) -> Iterator[Figure]:
    """Yield messages a second of one sender, to webhooks that answer at once."""
    with process(["bench.receiver"]) as receiver:
        ours, theirs = _in_turn(
            lambda number: _send(servers, receiver, (ROOT, other)[number], settings if number else {}), SENDING_ROUNDS
        )
    note = f"{sending.ENDPOINTS} endpoints, {sending.INCIDENTS} incidents"
    yield Figure("sending, one sender", "/s", ours, _name(other), theirs, GOAL, note)


PARTS: dict[str, Callable[..., Iterator[Figure]]] = {"http": http, "rebuild": rebuild, "sending": send}


def _send(servers: Servers, receiver: str, root: Path, settings: Mapping[str, str]) -> float:
    more = {
        "OPSENTRY_ENCRYPTION_KEYS": generate_key(),
        "OPSENTRY_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.0/8",
        "OPSENTRY_COALESCE_SECONDS": "0",
        **settings,
    }
    side = _side(servers, root, more, "sending")
    sending.ask(receiver, "clear")
    with ExitStack() as stack:
        url = side.serve(stack)
        for number in range(sending.ENDPOINTS):
            _post(side, url, "/api/v1/subscriptions", {"channel": "webhook", "target": f"{receiver}/{number}"})
        for number in range(sending.INCIDENTS):
            _post(side, url, "/api/v1/incidents", {"title": f"Deploy {number} failed", "description": "Rolling back"})
    with running(["opsentry", "worker"], side.environment, root=root):
        return sending.rate_of(sending.until_came(receiver, 2 * sending.ENDPOINTS * sending.INCIDENTS))


def _in_turn(measure: Callable[[int], float], rounds: int) -> tuple[float, float]:
    """Measure side 0 and side 1 in turn, and return the pair of the round with the median ratio.

    The order changes every round, so that neither side always follows the other. The first round only warms up.
    """
    pairs = []
    for number in range(rounds + 1):
        order = (0, 1) if number % 2 else (1, 0)
        values = {side: measure(side) for side in order}
        pairs.append((values[0], values[1]))
    return sorted(pairs[1:], key=lambda pair: pair[0] / pair[1])[rounds // 2]


def _sides(servers: Servers, other: Path, settings: Mapping[str, str]) -> tuple[Side, Side]:
    return _side(servers, ROOT, {}, "ours"), _side(servers, other.resolve(), settings, "theirs")


def _side(servers: Servers, root: Path, settings: Mapping[str, str], database: str) -> Side:
    servers.database_of(root, database)

    def created(*arguments: str) -> Any:
        return opsentry(servers, database, *arguments, root=root, **settings)[0]

    created("tenant", "create", "acme")
    service_id = created("service", "create", "main-api", "--tenant", "acme")["service_id"]
    scopes = [word for scope in SCOPES for word in ("--scope", scope)]
    token = created("token", "create", "--tenant", "acme", "--name", "bench", *scopes)["token"]
    return Side(servers, root, settings, database, service_id, {"Authorization": f"Bearer {token}"})


def _declare(side: Side, url: str, count: int) -> None:
    for _ in range(count):
        _post(side, url, "/api/v1/incidents", json.loads(BODY % side.service_id))


def _post(side: Side, url: str, path: str, body: Any) -> None:
    headers = {**side.headers, "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        response.read()


def _get(side: Side, url: str, path: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url + path, headers=dict(side.headers))) as response:
        return json.loads(response.read())


def _any_incident(side: Side, url: str) -> int:
    return int(_get(side, url, "/api/v1/incidents?limit=1")["incidents"][0]["id"])


async def _events(side: Side) -> int:
    connection = await asyncpg.connect(side.servers.postgres.url(side.database))
    count: int = await connection.fetchval("SELECT count(*) FROM events")
    await connection.close()
    return count


def _name(other: Path) -> str:
    command = ["git", "-C", str(other), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    return commit or other.name

"""HTTP: the probe, a list and a command of a real server process, beside bare aiohttp and a bare append."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from bench import peers
from bench.figure import Figure
from bench.load import load
from bench.servers import Servers, environment, opsentry, process

ROUNDS = 4
SECONDS = 2.0
CONNECTIONS = 16
INCIDENTS = 200
BODY = (
    '{"title": "Deploy failed", "description": "Health checks failing post-deploy", "severity": "degraded",'
    ' "visibility": "public", "service_ids": [%d]}'
)


def measure(servers: Servers) -> Iterator[Figure]:
    """Yield requests a second of the probe, a list and a command."""
    servers.database("http")
    env = environment(servers, "http")
    tenant = opsentry(servers, "http", "tenant", "create", "acme")[0]["tenant_id"]
    service = opsentry(servers, "http", "service", "create", "main-api", "--tenant", "acme")[0]["service_id"]
    scopes = ("--scope", "read:status", "--scope", "write:incidents")
    token = opsentry(servers, "http", "token", "create", "--tenant", "acme", "--name", "bench", *scopes)[0]["token"]
    headers = {"Authorization": f"Bearer {token}"}
    body = BODY % service
    with ExitStack() as stack:
        ours = stack.enter_context(process(["opsentry", "serve"], env))
        bare = stack.enter_context(process(["bench.bare", env["OPSENTRY_DATABASE_URL"], str(tenant)]))
        made = 0
        while made < INCIDENTS:
            made += int(load(ours, "POST", "/api/v1/incidents", 1, 0.05, headers=headers, body=body)["rate"] * 0.05)

        probe = _beside(
            lambda: load(ours, "GET", "/health", CONNECTIONS, SECONDS)["rate"],
            lambda: load(bare, "GET", "/health", CONNECTIONS, SECONDS)["rate"],
        )
        yield Figure("GET /health", "/s", probe[0], "bare aiohttp handler", probe[1], 0.9)
        path = "/api/v1/incidents?limit=50"
        listing = _beside(
            lambda: load(ours, "GET", path, CONNECTIONS, SECONDS, headers=headers)["rate"],
            lambda: load(bare, "GET", "/incidents", CONNECTIONS, SECONDS)["rate"],
        )
        yield Figure("GET /incidents?limit=50", "/s", listing[0], "bare aiohttp + asyncpg, same SQL", listing[1], 0.6)
        posts = load(ours, "POST", "/api/v1/incidents", 64, 10.0, headers=headers, body=body)
    append, note = peers.emmett(servers, 64, 5.0)
    latency = f"p50 {posts['p50_ms']:.1f} ms, p99 {posts['p99_ms']:.1f} ms {note}"
    yield Figure("POST /incidents, 64 clients", "/s", posts["rate"], "Emmett's bare append", append, 1.0, latency)


def _beside(ours: Callable[[], float], peer: Callable[[], float]) -> tuple[float, float]:
    """Return the medians of short rounds in turn: a slow phase of the machine slows both. One round warms up."""
    rounds = [(ours(), peer()) for _ in range(ROUNDS + 1)][1:]
    return statistics.median(a for a, _ in rounds), statistics.median(b for _, b in rounds)


def history(servers: Servers, file: Path) -> Iterator[Figure]:
    """Yield the time to import real history beside its limit of 20 s. A second import must add nothing."""
    servers.database("history")
    opsentry(servers, "history", "tenant", "create", "page")
    began = time.perf_counter()
    first = opsentry(servers, "history", "import", "statuspage", str(file), "--tenant", "page")
    took = time.perf_counter() - began
    again = opsentry(servers, "history", "import", "statuspage", str(file), "--tenant", "page")
    note = f"{first['events']:,} events in {took:.2f} s; again: {again['events']} events"
    yield Figure("import of real history, at most 20 s", "s", 20.0, "measured", took, 1.0, note)

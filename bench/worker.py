"""Workers: how fast one catches up from a standing start, and what it costs when there is nothing to do."""

import asyncio
import time

import asyncpg
import psutil
import uvloop

from bench import history
from bench.figure import Figure
from bench.servers import Servers, environment, running

TENANTS, EVENTS = 200, 500
FEW, MANY = 10, 100_000
IDLE_SECONDS = 20.0
# Tenants that have a ledger of one event, all of it projected.
_IDLE = """
WITH made AS (
    INSERT INTO tenants (slug, name) SELECT 'idle-' || i, 'T' FROM generate_series(1, $1::int) i RETURNING tenant_id)
INSERT INTO checkpoints (tenant_id, projection, position)
SELECT tenant_id, name, 1 FROM made CROSS JOIN unnest($2::text[]) AS name
"""


def measure(servers: Servers) -> list[Figure]:
    rate = _standing_start(servers)
    few, many = _idle(servers, FEW), _idle(servers, MANY)
    note = f"{few:.2%} of a core with {FEW} tenants; worker and its database sessions"
    return [
        Figure("worker, from a standing start", "/s", rate, "", None, None, f"{TENANTS} tenants, {EVENTS} events each"),
        Figure(f"idle worker, {MANY:,} tenants, 1.5 × of {FEW}", "% of a core", 150 * few, "", 100 * many, 1.0, note),
    ]


def _standing_start(servers: Servers) -> float:
    owner = servers.database("standing")
    uvloop.run(history.fill(owner, TENANTS, EVENTS))
    with running(["opsentry", "worker"], environment(servers, "standing")):
        began = time.perf_counter()
        asyncio.run(_until(owner, "SELECT NOT EXISTS (SELECT FROM projection_backlog)"))
        return TENANTS * EVENTS / (time.perf_counter() - began)


def _idle(servers: Servers, tenants: int) -> float:
    """Return the share of a core that an idle worker takes, with what its sessions take in the database."""
    owner = servers.database("idle")
    asyncio.run(_make_idle(owner, tenants))
    with running(["opsentry", "worker"], environment(servers, "idle")) as worker:
        asyncio.run(_until(owner, "SELECT count(*) >= 6 FROM projections"))
        time.sleep(2.0)
        before, began = _seconds(worker, owner), time.perf_counter()
        time.sleep(IDLE_SECONDS)
        return (_seconds(worker, owner) - before) / (time.perf_counter() - began)


def _seconds(worker: int, owner: str) -> float:
    pids = [worker, *asyncio.run(_sessions(owner))]
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(t.user + t.system for t in times))


async def _make_idle(owner: str, tenants: int) -> None:
    names = ["services", "incidents", "maintenance", "subscriptions", "impact", "outbox"]
    connection = await asyncpg.connect(owner)
    await connection.execute(_IDLE, tenants, names)
    await connection.execute("UPDATE ledger_heads SET position = 1")
    await connection.execute("TRUNCATE projection_backlog")
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def _sessions(owner: str) -> list[int]:
    connection = await asyncpg.connect(owner)
    rows = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND usename = 'opsentry'"
    )
    await connection.close()
    return [row["pid"] for row in rows]


async def _until(owner: str, question: str) -> None:
    connection = await asyncpg.connect(owner)
    while not await connection.fetchval(question):  # noqa: ASYNC110 - another process has no event to wait for
        await asyncio.sleep(0.02)
    await connection.close()

"""Workers: the speed of catching up, and the CPU time of an idle one."""

import asyncio
import time
from collections.abc import Iterator

import asyncpg
import psutil
import uvloop

from bench import history
from bench.figure import Figure
from bench.servers import Servers, environment, running

TENANTS, EVENTS = 200, 500
FEW, MANY = 10, 100_000
IDLE_SECONDS = 20.0
# Tenants whose ledger has one event, which is projected.
_IDLE = """
WITH made AS (
    INSERT INTO tenants (slug, name) SELECT 'idle-' || i, 'T' FROM generate_series(1, $1::int) i RETURNING tenant_id)
INSERT INTO checkpoints (tenant_id, projection, position)
SELECT tenant_id, name, 1 FROM made CROSS JOIN unnest($2::text[]) AS name
"""


def measure(servers: Servers) -> Iterator[Figure]:
    """Yield the speed of catching up, and the CPU time of an idle worker with many tenants."""
    rate = _catch_up(servers)
    yield Figure("worker, catching up", "/s", rate, "", None, None, f"{TENANTS} tenants, {EVENTS} events each")
    few, many = _idle(servers, FEW), _idle(servers, MANY)
    note = f"{few:.2%} of a core with {FEW} tenants; worker and its database sessions"
    yield Figure(f"idle worker, {MANY:,} tenants, 1.5 × of {FEW}", "% of a core", 150 * few, "", 100 * many, 1.0, note)


def _catch_up(servers: Servers) -> float:
    owner = servers.database("catching_up")
    uvloop.run(history.fill(owner, TENANTS, EVENTS))
    with running(["opsentry", "worker"], environment(servers, "catching_up")):
        began = time.perf_counter()
        asyncio.run(_until(owner, "SELECT NOT EXISTS (SELECT FROM projection_backlog)"))
        return TENANTS * EVENTS / (time.perf_counter() - began)


def _idle(servers: Servers, tenants: int) -> float:
    """Return the share of a core that an idle worker and its database sessions take."""
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

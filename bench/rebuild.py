"""Rebuilds: speed beside a peer and beside a bare copy, memory, and the delay that other tenants notice."""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from bench import history, peers
from bench.figure import Figure
from bench.load import visible
from bench.servers import ROOT, Servers, environment, opsentry, process, running
from opsentry.bootstrap import projections
from opsentry.events import store
from opsentry.events.codec import encode, readable

TENANTS, EVENTS = 1_000, 1_000
LARGE = 1_000_000
OTHER = 300_000
PEER_EVENTS = 20_000
JOBS = 2
SECONDS = 15.0
CLIENTS = 4


def measure(servers: Servers) -> Iterator[Figure]:
    """Yield speed, memory, and the delay that other tenants notice."""
    yield from _speed(servers)
    yield from _memory(servers)
    yield from _noticed(servers)


# ------------------------------------------------------------------------------------------------ speed


def _speed(servers: Servers) -> list[Figure]:
    owner = servers.database("rebuild")
    uvloop.run(history.fill(owner, TENANTS, EVENTS))
    events = TENANTS * EVENTS
    first = _rebuild(servers, "rebuild", events)
    again = _rebuild(servers, "rebuild", events)
    note = f"rows replaced by the same; {first:,.0f}/s where there were none; {JOBS} jobs"
    limit = _limit(owner)
    with tempfile.TemporaryDirectory(prefix="opsentry-bench-") as folder:
        file = Path(folder) / "streams.json"
        streams = [stream for kind, stream in history.streams(PEER_EVENTS) if kind == "incident"]
        encoded = [[(event.TYPE, encode(event)) for event in stream] for stream in streams]
        file.write_text(json.dumps([[[t, readable(e.data, e.erasable)] for t, e in stream] for stream in encoded]))
        peer, said = peers.projection(servers, file)
    what = f"rebuild of all projections, {TENANTS:,} tenants"
    return [
        Figure(what, "/s", again, "goal", 50_000, 1.0, note),
        Figure(what, "/s", again, "pyeventsourcing, one table", peer, 5.0, said),
        Figure(what, "/s", again, "bare copy", limit, None, "reads the ledger, copies the same rows"),
    ]


def _rebuild(servers: Servers, database: str, events: int) -> float:
    began = time.perf_counter()
    opsentry(servers, database, "projections", "rebuild", "--all", "--jobs", str(JOBS))
    return events / (time.perf_counter() - began)


def _limit(owner: str) -> float:
    """Return events a second of a bare copy: read the ledger, write rows of the same sizes, with as many processes."""
    context = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    copiers = [context.Process(target=_copy, args=(owner, number)) for number in range(JOBS)]
    for copier in copiers:
        copier.start()
    for copier in copiers:
        copier.join()
    if any(copier.exitcode for copier in copiers):
        raise RuntimeError("a copier has failed")
    return TENANTS * EVENTS / (time.perf_counter() - began)


def _copy(owner: str, number: int) -> None:
    uvloop.run(_copy_share(owner, number))


async def _copy_share(owner: str, number: int) -> None:
    connection = await asyncpg.connect(owner)
    tables = [table for projection in projections() for table in projection.tables]
    like: dict[str, list[tuple[Any, ...]]] = {}
    columns: dict[str, tuple[str, ...]] = {}
    for table in tables:
        await connection.execute(f"CREATE TEMP TABLE bare_{table.name} (LIKE {table.name})")
        await connection.execute(
            f"CREATE TABLE IF NOT EXISTS bare_{number}_{table.name} (LIKE {table.name} INCLUDING ALL)"
        )
        rows = await connection.fetch(f"SELECT {', '.join(table.columns)} FROM {table.name} WHERE tenant_id = 1")
        columns[table.name] = ("tenant_id", *table.columns)
        like[table.name] = [tuple(row) for row in rows]
    for tenant_id in range(1 + number, TENANTS + 1, JOBS):
        for kind in ("service", "subscription", "maintenance", "incident"):
            await connection.fetch(store._BY_STREAM, tenant_id, kind, 0, EVENTS, EVENTS)  # noqa: SLF001 - the same reading
        async with connection.transaction():
            for table_name, copied in like.items():
                records = [(tenant_id, *row) for row in copied]
                await connection.copy_records_to_table(
                    f"bare_{number}_{table_name}", records=records, columns=columns[table_name]
                )
    await connection.close()


# ------------------------------------------------------------------------------------------------ memory


def _memory(servers: Servers) -> list[Figure]:
    uvloop.run(history.fill(servers.database("large"), 1, LARGE))
    began = time.perf_counter()
    command = [sys.executable, "-m", "opsentry", "projections", "rebuild", "--all", "--jobs", "1", "--json"]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=ROOT,
        env={**os.environ, **environment(servers, "large")},
        check=True,
        capture_output=True,
        text=True,
    )
    megabytes = int(done.stdout) / 1024
    note = f"one tenant of {LARGE:,} events, {time.perf_counter() - began:.0f} s"
    return [Figure("memory of a rebuild, at most 300 MB", "MB", 300, "it took", megabytes, 1.0, note)]


# ------------------------------------------------------------------------------------------------ what others notice


def _noticed(servers: Servers) -> list[Figure]:
    owner = servers.database("noticed")
    uvloop.run(history.fill(owner, 1, OTHER))
    opsentry(servers, "noticed", "tenant", "create", "live")
    scopes = ("--scope", "read:status", "--scope", "write:incidents")
    token = opsentry(servers, "noticed", "token", "create", "--tenant", "live", "--name", "b", *scopes)[0]["token"]
    env = environment(servers, "noticed")
    _rebuild(servers, "noticed", OTHER)
    raised = "UPDATE projections SET generation = generation + 1"
    with ExitStack() as stack:
        base = stack.enter_context(process(["opsentry", "serve"], env))
        stack.enter_context(running(["opsentry", "worker"], env))
        visible(base, token, CLIENTS, 3.0)
        alone = visible(base, token, CLIENTS, SECONDS)
        asyncio.run(_execute(owner, raised))
        beside = visible(base, token, CLIENTS, SECONDS)
        left = asyncio.run(_left(owner))
        stack.enter_context(running(["opsentry", "projections", "rebuild", "--all", "--jobs", "1"], env))
        command = visible(base, token, CLIENTS, SECONDS)
    if not left:
        raise RuntimeError("the rebuild ended before it was measured")
    wide = f"p99 alone {alone['p99_ms']:.1f} ms, p50 {alone['p50_ms']:.1f} ms"
    name = "append to visible, p99, 2 × of alone"
    return [
        Figure(name, "ms", 2 * alone["p99_ms"], "a worker rebuilds another tenant", beside["p99_ms"], 1.0, wide),
        Figure(name, "ms", 2 * alone["p99_ms"], "`rebuild --jobs 1` of another tenant", command["p99_ms"], 1.0, wide),
    ]


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(statement)
    await connection.close()


async def _left(url: str) -> int:
    connection = await asyncpg.connect(url)
    left: int = await connection.fetchval(
        "SELECT count(*) FROM checkpoints c JOIN projections p ON p.name = c.projection"
        " WHERE c.generation < p.generation"
    )
    await connection.close()
    return left

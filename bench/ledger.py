"""The ledger for auditors: verification, and as-of queries of long streams over HTTP."""

import asyncio
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import uvloop

from bench.figure import Figure
from bench.servers import DATABASE_TIMEOUT_SECONDS, Servers, environment, opsentry, process
from opsentry.domain.events import AnyEvent
from opsentry.domain.incident import IncidentOpened, IncidentSeverityChanged, IncidentUpdated
from opsentry.events import export, export_verification, verification
from opsentry.events.appender import Appender
from opsentry.events.codec import Actor, Meta
from opsentry.events.store import Append, Appended, NewEvent
from opsentry.infrastructure.postgres import Database

EVENTS = 200_000
SIZES = (10, 100, 1_000, 10_000)
ROUNDS = 30
META = Meta(Actor("token", 12), "5b1b8a8a8e1f00000001")


def measure(servers: Servers) -> Iterator[Figure]:
    """Yield the speed of verification, and the time to look back into long streams."""
    servers.database("ledger")
    tenant = opsentry(servers, "ledger", "tenant", "create", "acme")[0]["tenant_id"]
    other = opsentry(servers, "ledger", "tenant", "create", "long")[0]["tenant_id"]
    scopes = ("--scope", "read:status", "--scope", "read:audit")
    token = opsentry(servers, "ledger", "token", "create", "--tenant", "long", "--name", "b", *scopes)[0]["token"]
    env = environment(servers, "ledger")
    url = env["OPSENTRY_DATABASE_URL"]
    uvloop.run(_fill(url, tenant))
    streams = {size: uvloop.run(_stream(url, other, size)) for size in SIZES}
    yield from _verification(url, tenant)
    with process(["opsentry", "serve"], env) as base:
        for what, path in {
            "history": "/api/v1/incidents/{id}/events?limit=100&after={middle}",
            "as of the middle": "/api/v1/incidents/{id}?as_of={middle}",
            "as of the end": "/api/v1/incidents/{id}?as_of={end}",
        }.items():
            took = {
                size: _latency(base + path.format(id=number, middle=(first + last) // 2, end=last), token)
                for size, (number, first, last) in streams.items()
            }
            note = ", ".join(f"{size:,} events: {seconds * 1000:.2f} ms" for size, seconds in took.items())
            limit, took_long = 10_000 * took[100], 1000 * took[10_000]
            yield Figure(f"{what}, 10 × at 100 events", "ms", limit, "at 10,000 events", took_long, 1.0, note)


def _verification(url: str, tenant: int) -> list[Figure]:
    """Return events verified a second by one process, from the database and from an export."""

    async def exported(file: Path) -> None:
        database = Database(url, size=1, timeout_seconds=DATABASE_TIMEOUT_SECONDS)
        await database.open()
        async with database.connection(600) as connection:
            with file.open("wb") as lines:
                for after in range(0, EVENTS, 1000):
                    lines.write(await export.chunk(connection, tenant, after, after + 1000))
        await database.close()

    began = time.perf_counter()
    (verdict,) = uvloop.run(verification.verify(url, tenant_id=tenant, jobs=1))
    rate = verdict.events / (time.perf_counter() - began)
    with tempfile.TemporaryDirectory(prefix="opsentry-bench-") as folder:
        file = Path(folder) / "ledger.ndjson"
        asyncio.run(exported(file))
        began = time.perf_counter()
        from_file = export_verification.verify_export(file)
        file_rate = from_file.events / (time.perf_counter() - began)
    if verdict.violation or from_file.violation:
        raise RuntimeError("the ledger should be whole")
    note = f"{verdict.events:,} events"
    return [
        Figure("verify, one process", "/s", rate, "goal", 100_000, 1.0, note),
        Figure("verify --from-file, one process", "/s", file_rate, "goal", 100_000, 1.0, note),
    ]


async def _fill(url: str, tenant: int) -> None:
    """Write many incidents of three events each."""
    await _write(url, tenant, [_events(3) for _ in range(EVENTS // 3)])


async def _stream(url: str, tenant: int, size: int) -> tuple[int, int, int]:
    """Write one incident of `size` events; return its id, and its first and last position."""
    ((number, first, last),) = await _write(url, tenant, [_events(size)])
    return number, first, last


def _events(size: int) -> list[AnyEvent]:
    opened = IncidentOpened(
        title="Deploy failed", description="Rolling back.", severity="degraded", visibility="public"
    )
    events: list[AnyEvent] = [opened]
    for number in range(size - 1):
        if number % 2:
            severity = "critical" if number % 4 == 1 else "degraded"
            events.append(IncidentSeverityChanged(severity=severity, previous="degraded"))
        else:
            events.append(IncidentUpdated(message=f"Still looking into it, {number}.", status="investigating"))
    return events


async def _write(url: str, tenant: int, streams: list[list[AnyEvent]]) -> list[tuple[int, int, int]]:
    database = Database(url, size=4, timeout_seconds=DATABASE_TIMEOUT_SECONDS)
    await database.open()
    appender = Appender(database)

    async def one(events: list[AnyEvent]) -> tuple[int, int, int]:
        number = version = first = last = 0
        for begin in range(0, len(events), 200):
            new = [NewEvent(event, META) for event in events[begin : begin + 200]]
            append = Append(tenant_id=tenant, kind="incident", stream_id=number, expected_version=version, events=new)
            outcome = await appender.append(append)
            if not isinstance(outcome, Appended):
                raise TypeError(outcome)
            number, version, last = outcome.stream_id, outcome.version, outcome.position
            first = first or last - version + 1
        return number, first, last

    found = []
    for begin in range(0, len(streams), 1000):
        found += await asyncio.gather(*(one(events) for events in streams[begin : begin + 1000]))
    await database.close()
    return found


def _latency(url: str, token: str) -> float:
    """Return the median seconds of a response; the first five warm up."""
    took = []
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    for _ in range(ROUNDS):
        began = time.perf_counter()
        with urllib.request.urlopen(request) as response:
            response.read()
        took.append(time.perf_counter() - began)
    return statistics.median(took[5:])

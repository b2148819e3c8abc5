"""Reads of a tenant with a million incidents beside the same reads of one with ten thousand, over HTTP."""

import asyncio
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

import asyncpg
import uvloop

from bench.figure import Figure
from bench.load import load
from bench.servers import Servers, environment, opsentry, process
from opsentry.bootstrap import projections
from opsentry.domain import incident, service
from opsentry.domain.events import AnyEvent
from opsentry.domain.incident import (
    SEVERITIES,
    IncidentOpened,
    IncidentResolved,
    IncidentStatusChanged,
    IncidentUpdated,
)
from opsentry.domain.service import ServiceRegistered
from opsentry.events.codec import Actor, Meta, RecordedEvent
from opsentry.projections.engine.projection import apply

SMALL, LARGE = 10_000, 1_000_000
LIMIT = 1.5
SERVICES = 20
OPEN = 50
APART = timedelta(minutes=5)
ROUNDS = 5
SECONDS = 0.4
META = Meta(Actor("operator"))
REDACTABLE_FIELDS = (
    "Health checks of the new release are failing; we are rolling it back and will tell more within the hour."
)

# The lower bound of an offset: PostgreSQL reads the rows that it skips.
_BARE = """
SELECT incident_id FROM incidents WHERE tenant_id = $1 ORDER BY occurred_at DESC, incident_id DESC LIMIT 50 OFFSET $2
"""

# One path, or several in turn.
Paths: TypeAlias = str | Sequence[str]


def measure(servers: Servers) -> Iterator[Figure]:
    """Yield the time of each read of many incidents beside the same read of few."""
    newest = datetime.now(UTC).replace(second=0, microsecond=0) - APART
    with ExitStack() as stack:
        few, many = (Side(servers, stack, count, newest) for count in (SMALL, LARGE))
        for what, (small, large) in _reads(newest).items():
            rounds = [(few.times(small), many.times(large)) for _ in range(ROUNDS + 1)][1:]
            (p50, p50_many), (p99, p99_many) = (
                [statistics.median(took[key] for took in side) for side in zip(*rounds, strict=True)]
                for key in ("p50_ms", "p99_ms")
            )
            note = f"p50 {p50:.2f} and {p50_many:.2f} ms, p99 {p99:.2f} and {p99_many:.2f} ms"
            name = f"{what}, {LIMIT:g} × at {SMALL:,}"
            yield Figure(name, "ms", LIMIT * p50, f"at {LARGE:,}", p50_many, 1.0, note)
        half = f"/api/v1/incidents?offset={LARGE // 2}"
        pairs = [(many.times(half)["p50_ms"], 1000 * asyncio.run(many.bare(LARGE // 2))) for _ in range(ROUNDS)]
        deep, bare = (statistics.median(side) for side in zip(*pairs, strict=True))
        note = f"{LARGE:,} incidents applied in {many.filling:.0f} s"
        yield Figure(f"list, offset {LARGE // 2:,}", "ms", deep, "SELECT id … OFFSET alone", bare, None, note)


class Side:
    """Run a server on a database with `count` incidents."""

    def __init__(self, servers: Servers, stack: ExitStack, count: int, newest: datetime) -> None:
        name = f"scale_{count}"
        self._url = servers.database(name)
        self._tenant_id = opsentry(servers, name, "tenant", "create", "acme")[0]["tenant_id"]
        asked = ("--tenant", "acme", "--name", "bench", "--scope", "read:status")
        token = opsentry(servers, name, "token", "create", *asked)[0]["token"]
        self._headers = {"Authorization": f"Bearer {token}"}
        began = time.perf_counter()
        uvloop.run(_fill(self._url, self._tenant_id, count, newest))
        self.filling = time.perf_counter() - began
        self._base = stack.enter_context(process(["opsentry", "serve"], environment(servers, name)))

    def times(self, path: Paths) -> dict[str, float]:
        return load(self._base, "GET", path, 1, SECONDS, headers=self._headers)

    async def bare(self, offset: int) -> float:
        """Return the median seconds of a query for the ids of one page."""
        connection = await asyncpg.connect(self._url)
        took = []
        for _ in range(2 * ROUNDS):
            began = time.perf_counter()
            await connection.fetch(_BARE, self._tenant_id, offset)
            took.append(time.perf_counter() - began)
        await connection.close()
        return statistics.median(took[ROUNDS:])


def _reads(newest: datetime) -> dict[str, tuple[Paths, Paths]]:
    """Return the paths of each read, for few incidents and for many."""
    lists = {
        "list, first page": "",
        "list, limit=1 and the total": "?limit=1",
        "list, offset 5,000": "?offset=5000",
        "list, monitoring": "?status=monitoring",
        "list, resolved": "?status=resolved",
        "list, resolved, offset 5,000": "?status=resolved&offset=5000",
        "list, critical": "?severity=critical",
        "list, critical and monitoring": "?severity=critical&status=monitoring",
        "list, critical and resolved": "?severity=critical&status=resolved",
        "active": "/active",
    }
    reads: dict[str, tuple[Paths, Paths]] = {}
    for what, query in lists.items():
        reads[what] = (f"/api/v1/incidents{query}",) * 2
    chance = random.Random(1)
    few, many = ([f"/api/v1/incidents/{chance.randint(1, count)}" for _ in range(1000)] for count in (SMALL, LARGE))
    reads["detail"] = (few, many)
    of_each = [f"/api/v1/services/{number}/uptime" for number in range(1, SERVICES + 1)]
    reads["uptime of 24 h, 7 and 30 days"] = (of_each, of_each)
    # The oldest month but a day of the one, and one from the middle of the other's years.
    begins = (newest - SMALL * APART + timedelta(days=1), newest - LARGE * APART / 2)
    windows = (
        f"?from={begin:%Y-%m-%dT%H:%M:%SZ}&to={begin + timedelta(days=30):%Y-%m-%dT%H:%M:%SZ}" for begin in begins
    )
    few, many = ([path + window for path in of_each] for window in windows)
    reads["uptime of 30 days in the past"] = (few, many)
    return reads


# ---------------------------------------------------------------------------------------------- the generator


async def _fill(url: str, tenant_id: int, count: int, newest: datetime) -> None:
    """Let the projections write rows of services and incidents. The ledger skips their events, to save time."""
    connections = [await asyncpg.connect(url) for _ in range(2)]
    owner = connections[0]
    for connection in connections:
        await connection.execute("SET synchronous_commit = off")
    by_name = {projection.name: projection for projection in projections()}
    position = await owner.fetchval("SELECT position FROM ledger_heads WHERE tenant_id = $1", tenant_id)
    began = newest - (count + 1) * APART
    services = [
        RecordedEvent(tenant_id, position + number, service.KIND, number, 1, _service(number), began, began, META)
        for number in range(1, SERVICES + 1)
    ]
    await apply(owner, by_name["services"], tenant_id, services)
    position += SERVICES
    for first in range(1, count + 1, 2000):
        events: list[RecordedEvent] = []
        for number in range(first, min(first + 2000, count + 1)):
            age = count - number
            for version, (event, after) in enumerate(_incident(age), 1):
                position += 1
                moment = newest - age * APART + timedelta(minutes=after)
                events.append(
                    RecordedEvent(tenant_id, position, incident.KIND, number, version, event, moment, moment, META)
                )
        await asyncio.gather(
            apply(connections[0], by_name["incidents"], tenant_id, events),
            apply(connections[1], by_name["impact"], tenant_id, events),
        )
    await owner.execute("UPDATE ledger_heads SET position = $2 WHERE tenant_id = $1", tenant_id, position)
    await owner.execute(
        "INSERT INTO checkpoints (tenant_id, projection, position) SELECT $1, unnest($2::text[]), $3"
        " ON CONFLICT (tenant_id, projection) DO UPDATE SET position = excluded.position",
        tenant_id,
        list(by_name),
        position,
    )
    await owner.execute("VACUUM ANALYZE")
    await owner.execute("CHECKPOINT")
    for connection in connections:
        await connection.close()


def _service(number: int) -> ServiceRegistered:
    return ServiceRegistered(slug=f"service-{number}", name=f"Service {number}", visibility="public")


def _incident(age: int) -> Iterator[tuple[AnyEvent, int]]:
    """Yield the events of the incident that is the `age`-th newest, with the minutes after its beginning.

    They do not depend on the number of incidents: the newest are the same in every database.
    """
    yield (
        IncidentOpened(
            title="Deploy failed",
            description=REDACTABLE_FIELDS,
            severity=SEVERITIES[age % len(SEVERITIES)],
            visibility="public",
            service_ids=(age // len(SEVERITIES) % SERVICES + 1,),
        ),
        0,
    )
    yield IncidentUpdated(message=REDACTABLE_FIELDS, status="investigating"), 0
    if age % 4 or age >= 4 * OPEN:
        yield IncidentResolved(root_cause="An expired certificate."), 20
    elif status := ("", "identified", "monitoring")[age // 4 % 3]:
        yield IncidentStatusChanged(status=status), 5

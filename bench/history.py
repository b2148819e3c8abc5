"""Ledgers to measure on: tenants with services, subscriptions, windows and incidents, appended as commands append."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import asyncpg

from bench.servers import DATABASE_TIMEOUT_SECONDS
from opsentry.domain.events import AnyEvent
from opsentry.domain.incident import (
    IncidentOpened,
    IncidentResolved,
    IncidentSeverityChanged,
    IncidentStatusChanged,
    IncidentUpdated,
)
from opsentry.domain.maintenance import MaintenanceCompleted, MaintenanceScheduled, MaintenanceStarted
from opsentry.domain.service import ServiceRegistered
from opsentry.domain.subscription import SubscriptionCreated
from opsentry.events import store
from opsentry.events.codec import Actor, Meta
from opsentry.events.store import Append, NewEvent
from opsentry.infrastructure.postgres import Database

META = Meta(Actor("token", 12), "5b1b8a8a8e1f00000001")
SERVICES = 5
SUBSCRIPTION = SubscriptionCreated(
    channel="webhook",
    target="https://example.org/hook",
    audience="public",
    min_severity="informational",
    service_ids=(1,),
    notify_incidents=True,
    notify_maintenance=True,
)
_BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
_WRITERS = 3
_BATCH = 200


def streams(events: int) -> Iterator[tuple[str, Sequence[AnyEvent]]]:
    """Yield a tenant's streams, `events` events in all: incidents of six events, and one window for 49 of them."""
    for number in range(SERVICES):
        yield "service", [ServiceRegistered(slug=f"service-{number}", name=f"Service {number}", visibility="public")]
    yield "subscription", [SUBSCRIPTION]
    left = events - SERVICES - 1
    for number in itertools.count():
        if number % 50 == 49:
            window: list[AnyEvent] = [
                MaintenanceScheduled(
                    title="Move to new hardware",
                    scheduled_start=_BEGIN + timedelta(hours=number),
                    scheduled_end=_BEGIN + timedelta(hours=number + 1),
                    visibility="public",
                    service_ids=(number % SERVICES + 1,),
                    suppress_alerts=number % 100 == 99,
                ),
                MaintenanceStarted(),
                MaintenanceCompleted(),
            ]
            stream = "maintenance", window
        else:
            stream = "incident", _incident(number)
        if left <= len(stream[1]):
            yield stream[0], stream[1][:left]
            return
        yield stream
        left -= len(stream[1])


def _incident(number: int) -> list[AnyEvent]:
    return [
        IncidentOpened(
            title=f"Deploy {number} failed",
            description="Health checks failing post-deploy, rolling back.",
            severity=("degraded", "partial_outage", "major_outage")[number % 3],
            visibility="public",
            service_ids=(number % SERVICES + 1,),
        ),
        IncidentUpdated(message="Health checks failing post-deploy, rolling back.", status="investigating"),
        IncidentStatusChanged(status="identified"),
        IncidentUpdated(message="A migration held a lock; the old version serves again.", status="identified"),
        IncidentSeverityChanged(severity="informational", previous="degraded"),
        IncidentResolved(root_cause="A migration held a lock."),
    ]


async def fill(url: str, tenants: int, events: int) -> None:
    """Create `tenants` tenants and append `events` events to each."""
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(
        "INSERT INTO tenants (slug, name) SELECT 't' || i, 'T' FROM generate_series(1, $1::int) i RETURNING tenant_id",
        tenants,
    )
    await connection.close()
    database = Database(url, size=_WRITERS, timeout_seconds=DATABASE_TIMEOUT_SECONDS)
    await database.open()
    waiting = [row["tenant_id"] for row in rows]

    async def write() -> None:
        while waiting:
            await _fill_one(database, waiting.pop(), events)

    await asyncio.gather(*(write() for _ in range(_WRITERS)))
    await database.close()


async def _fill_one(database: Database, tenant_id: int, events: int) -> None:
    waiting = streams(events)
    while batch := list(itertools.islice(waiting, _BATCH)):
        appends = [
            Append(
                tenant_id=tenant_id,
                kind=kind,
                stream_id=0,
                expected_version=0,
                events=[NewEvent(event, META) for event in stream],
            )
            for kind, stream in batch
        ]
        async with database.connection(60) as connection:
            outcomes = await store.append_events(connection, appends, wait=True)
        if not all(isinstance(outcome, store.Appended) for outcome in outcomes):
            raise RuntimeError(f"not appended: {outcomes}")

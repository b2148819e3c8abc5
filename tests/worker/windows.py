"""Schedule maintenance windows for tests of the worker, and read their events."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from opsentry.bootstrap import Core
from opsentry.domain import maintenance
from opsentry.domain.maintenance import ScheduleMaintenance
from tests import commands
from tests.conftest import META
from tests.waiting import until

DONE = ["maintenance.scheduled", "maintenance.started", "maintenance.completed"]


async def schedule(parts: Core, tenant_id: int, begins_in: float, lasts: float = 1, **fields: Any) -> int:
    """Schedule a window; times are in seconds from now."""
    start = datetime.now(UTC) + timedelta(seconds=begins_in)
    command = ScheduleMaintenance(
        title="Upgrade", scheduled_start=start, scheduled_end=start + timedelta(seconds=lasts), **fields
    )
    executed = await commands.create(parts, maintenance.DECIDER, tenant_id, command, META)
    await parts.projector.catch_up(tenant_id, executed.position)
    return executed.stream_id


async def story(owner: Any, maintenance_id: int, tenant_id: int | None = None) -> list[str]:
    """Return the types of a window's events; `tenant_id` tells it from another tenant's window with the same id."""
    rows = await owner.fetch(
        "SELECT type FROM events WHERE stream_kind = 'maintenance' AND stream_id = $1"
        " AND ($2::bigint IS NULL OR tenant_id = $2) ORDER BY version",
        maintenance_id,
        tenant_id,
    )
    return [row["type"] for row in rows]


async def completed(owner: Any, count: int) -> None:
    """Return when `count` windows are completed."""
    query = "SELECT count(*) >= $1 FROM events WHERE type = 'maintenance.completed'"
    await until(lambda: owner.fetchval(query, count))


async def types(owner: Any) -> Counter[str]:
    rows = await owner.fetch("SELECT type FROM events WHERE stream_kind = 'maintenance'")
    return Counter(row["type"] for row in rows)


async def lateness(owner: Any) -> list[float]:
    """Return the seconds between the scheduled and the actual start or end of each window."""
    rows = await owner.fetch(
        "SELECT e.occurred_at, (s.data::json ->> CASE e.type WHEN 'maintenance.started' THEN 'scheduled_start'"
        " ELSE 'scheduled_end' END)::timestamptz AS due FROM events e JOIN events s USING (tenant_id, stream_id)"
        " WHERE e.type IN ('maintenance.started', 'maintenance.completed') AND s.type = 'maintenance.scheduled'"
        " AND s.stream_kind = e.stream_kind"
    )
    return [(row["occurred_at"] - row["due"]).total_seconds() for row in rows]

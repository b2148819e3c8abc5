"""The projection `maintenance`: maintenance windows, as `/maintenance…` serves them and the scheduler moves them."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg
import msgspec

from opsentry.domain import maintenance
from opsentry.domain.maintenance import MaintenanceReminded, MaintenanceRescheduled, MaintenanceScheduled
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection, fetch_one
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import (
    Replay,
    Streams,
    Table,
    WriterRows,
    by_stream,
    continued,
    replay_streams,
)
from opsentry.projections.maintenance_view import MaintenanceFilter, MaintenanceView, decode_view, evolve_view
from opsentry.projections.page_request import PageRequest
from opsentry.projections.timeline import (
    ENTRY,
    JOIN_AUTHORS,
    TimelineTable,
    entry_rows,
    etag_of,
    response,
)

# Selects the stored rows of these windows.
_LOAD = (
    "SELECT maintenance_id, version, announced_at, reminder_pending_since, body FROM maintenance"
    " WHERE tenant_id = $1 AND maintenance_id = ANY($2)"
)

_RESPONSE = response("m")
_NEWEST_FIRST = "announced_at DESC, maintenance_id DESC"
_NEXT_FIRST = "scheduled_start, maintenance_id"

# Selects a page of windows, the last announced first. $2: a status, or NULL for any.
_SELECT_PAGE = f"""
WITH page AS (
    SELECT * FROM maintenance WHERE tenant_id = $1 AND ($2::text IS NULL OR status = $2)
    ORDER BY {_NEWEST_FIRST} LIMIT $3 OFFSET $4)
SELECT fresh.*,
    (SELECT count(*) FROM maintenance WHERE tenant_id = $1 AND ($2::text IS NULL OR status = $2)) AS total,
    convert_to((SELECT string_agg({_RESPONSE}, ',' ORDER BY {_NEWEST_FIRST}) FROM page m), 'UTF8') AS items
FROM {freshness("maintenance", "services")}
"""

# Selects the windows that start in the future, the next one first.
_SELECT_UPCOMING = f"""
SELECT fresh.*, convert_to((
    SELECT string_agg({_RESPONSE}, ',' ORDER BY {_NEXT_FIRST}) FROM maintenance m
    WHERE m.tenant_id = $1 AND m.status = 'scheduled' AND m.scheduled_start > now()), 'UTF8') AS items
FROM {freshness("maintenance", "services")}
"""

# Selects the window $2 with its timeline.
_SELECT_ONE = f"""
SELECT fresh.*, {etag_of("m")} AS etag, convert_to(
    left({_RESPONSE}, -1) || ',"updates":[' || (
        SELECT coalesce(string_agg({ENTRY}, ',' ORDER BY u.version), '')
        FROM maintenance_updates u {JOIN_AUTHORS}
        WHERE u.tenant_id = m.tenant_id AND u.maintenance_id = m.maintenance_id) || ']}}', 'UTF8') AS body
FROM {freshness("maintenance", "services")}
LEFT JOIN maintenance m ON m.tenant_id = $1 AND m.maintenance_id = $2
"""

# The rows of a halted projection are stale. If the scheduler moved them again and again, other tenants would wait.
_IS_NOT_HALTED = """
NOT EXISTS (
    SELECT FROM checkpoints c
    WHERE c.tenant_id = m.tenant_id AND c.projection = 'maintenance' AND c.halted_at IS NOT NULL)
"""

# Selects $2 windows of all tenants that the scheduler must start or complete within $1 seconds, the first due first.
_SELECT_DUE = f"""
SELECT tenant_id, maintenance_id, status, transition_due_at,
    greatest(0, extract(epoch FROM transition_due_at - clock_timestamp()))::float8 AS seconds
FROM maintenance m WHERE transition_due_at <= clock_timestamp() + $1 * interval '1 second' AND {_IS_NOT_HALTED}
ORDER BY transition_due_at LIMIT $2
"""

# Selects $2 windows of all tenants that start within $1 seconds and have a pending reminder, the next one first. A
# window whose start was announced later than that needs no reminder: the announcement is one.
_SELECT_TO_REMIND = f"""
SELECT tenant_id, maintenance_id FROM maintenance m
WHERE reminder_pending_since < scheduled_start - $1 * interval '1 second' AND scheduled_start > clock_timestamp()
    AND scheduled_start <= clock_timestamp() + $1 * interval '1 second' AND {_IS_NOT_HALTED}
ORDER BY scheduled_start LIMIT $2
"""

WINDOWS = Table(
    "maintenance",
    (
        "maintenance_id",
        "version",
        "status",
        "visibility",
        "service_ids",
        "announced_at",
        "scheduled_start",
        "transition_due_at",
        "reminder_pending_since",
        "body",
    ),
    keys=1,
    of_streams={maintenance.KIND: "maintenance_id BETWEEN $2 AND $3"},
)
_TIMELINE = TimelineTable("maintenance_updates", "maintenance_id", maintenance.KIND)


class MaintenanceWindows:
    """The projection `maintenance`."""

    name = "maintenance"
    version = 1
    writer = "write_maintenance"
    kinds = (maintenance.KIND,)
    tables = (WINDOWS, _TIMELINE.table)

    async def prepare(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> WriterRows:
        """Return a row for each window, and its new and its redacted timeline entries."""
        streams = by_stream(events)
        stored, announced = {}, {}
        if ids := continued(streams):
            rows = await connection.fetch(_LOAD, tenant_id, ids)
            stored = {
                row["maintenance_id"]: (
                    row["version"],
                    _ProjectedWindow(decode_view(row["body"]), row["reminder_pending_since"]),
                )
                for row in rows
            }
            announced = {row["maintenance_id"]: row["announced_at"] for row in rows}
        entries = await _TIMELINE.changes(connection, tenant_id, events)
        return [_rows(streams, stored, announced), *entries]

    def replayer(self) -> Replay:
        """Return a function that computes the rows of whole streams."""
        return lambda _kind, streams: {
            WINDOWS.name: _rows(streams, {}, {}),
            _TIMELINE.table.name: [row for stream in streams.values() for row in entry_rows(stream)],
        }


class _ProjectedWindow(NamedTuple):
    """The contents of a row: the view, and since when a reminder of the start is pending, if one is."""

    view: MaintenanceView
    reminder_pending_since: datetime | None


def _evolve(window: _ProjectedWindow | None, recorded: RecordedEvent) -> _ProjectedWindow:
    view = evolve_view(None if window is None else window.view, recorded)
    pending_since = None if window is None else window.reminder_pending_since
    if isinstance(recorded.event, MaintenanceScheduled | MaintenanceRescheduled):
        pending_since = recorded.recorded_at
    if view.status != "scheduled" or isinstance(recorded.event, MaintenanceReminded):
        pending_since = None
    return _ProjectedWindow(view, pending_since)


def _rows(
    streams: Streams, stored: Mapping[int, tuple[int, _ProjectedWindow]], announced: Mapping[int, datetime]
) -> list[tuple[Any, ...]]:
    return [
        (
            view.id,
            version,
            view.status,
            view.visibility,
            view.service_ids,
            announced[view.id] if view.id in announced else streams[view.id][0].occurred_at,
            view.scheduled_start,
            view.state().due_at,
            reminder_pending_since,
            msgspec.json.encode(view).decode(),
        )
        for (view, reminder_pending_since), version in replay_streams(streams, stored, _evolve)
    ]


async def select_windows(
    connection: Connection, tenant_id: int, filter_: MaintenanceFilter, page: PageRequest
) -> asyncpg.Record:
    """Return `total` and `items` (the inside of a JSON array) of the tenant's windows, the last announced first."""
    return await fetch_one(connection, _SELECT_PAGE, tenant_id, *filter_, *page)


async def select_upcoming_windows(connection: Connection, tenant_id: int) -> asyncpg.Record:
    """Return `items` (the inside of a JSON array) of all scheduled windows in the future, the next one first."""
    return await fetch_one(connection, _SELECT_UPCOMING, tenant_id)


async def select_window(connection: Connection, tenant_id: int, maintenance_id: int) -> asyncpg.Record:
    """Return `body` and `etag` of a window with its timeline; NULL if it does not exist."""
    return await fetch_one(connection, _SELECT_ONE, tenant_id, maintenance_id)


async def select_due_windows(connection: Connection, within: float, limit: int) -> list[asyncpg.Record]:
    """Return windows of all tenants that must be started or completed within `within` seconds, the first due first.

    `seconds` is the time until then by the database's clock. The query spans tenants: one scheduler serves all.
    """
    return list(await connection.fetch(_SELECT_DUE, within, limit))


async def select_windows_to_remind(connection: Connection, lead: float, limit: int) -> list[asyncpg.Record]:
    """Return windows of all tenants that start within `lead` seconds and need a reminder, the next one first.

    A window that was announced within this time needs none. The query spans tenants: one scheduler serves all.
    """
    return list(await connection.fetch(_SELECT_TO_REMIND, lead, limit))

"""Maintenance windows: serves `/maintenance…` and tells the scheduler what is due."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast

import asyncpg
import msgspec

from opsentry.domain import maintenance
from opsentry.domain.maintenance import (
    Maintenance,
    MaintenanceCancelled,
    MaintenanceCompleted,
    MaintenanceEvent,
    MaintenanceRedacted,
    MaintenanceReminded,
    MaintenanceRescheduled,
    MaintenanceScheduled,
    MaintenanceStarted,
    MaintenanceUpdated,
)
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import Replay, Streams, Table, by_stream, continued, replay_streams
from opsentry.projections.page_request import PageRequest
from opsentry.projections.timeline import (
    ENTRY,
    JOIN_AUTHORS,
    TimelineEntry,
    author_name,
    etag_of,
    id_array,
    redacted,
    update_rows,
)

# The rows that this batch goes on from.
_LOAD = (
    "SELECT maintenance_id, version, announced_at, remind_since, body FROM maintenance"
    " WHERE tenant_id = $1 AND maintenance_id = ANY($2)"
)

# One row for each window, whatever the number of its events in the batch.
_STORE = """
INSERT INTO maintenance
    (tenant_id, maintenance_id, version, status, visibility, service_ids, announced_at, scheduled_start, due_at,
    remind_since, body)
SELECT $1, id, version, status, visibility, service_ids::bigint[], announced_at, scheduled_start, due_at, remind_since,
    body
FROM unnest($2::bigint[], $3::int[], $4::text[], $5::text[], $6::text[], $7::timestamptz[], $8::timestamptz[],
            $9::timestamptz[], $10::timestamptz[], $11::text[])
    AS row (id, version, status, visibility, service_ids, announced_at, scheduled_start, due_at, remind_since, body)
ON CONFLICT (tenant_id, maintenance_id) DO UPDATE SET
    version = excluded.version, status = excluded.status, visibility = excluded.visibility,
    service_ids = excluded.service_ids, scheduled_start = excluded.scheduled_start, due_at = excluded.due_at,
    remind_since = excluded.remind_since, body = excluded.body
WHERE maintenance.version < excluded.version
"""

# Timeline entries are written once.
_STORE_UPDATES = """
INSERT INTO maintenance_updates (tenant_id, maintenance_id, version, actor_kind, actor_id, body)
SELECT $1, * FROM unnest($2::bigint[], $3::int[], $4::text[], $5::bigint[], $6::text[])
ON CONFLICT DO NOTHING
"""

# Entries whose words were erased; see the same in incidents.
_LOAD_UPDATES = """
SELECT u.maintenance_id, u.version, u.body FROM unnest($2::bigint[], $3::int[]) AS wanted (id, version)
CROSS JOIN LATERAL (
    SELECT * FROM maintenance_updates
    WHERE tenant_id = $1 AND maintenance_id = wanted.id AND version = wanted.version LIMIT 1) AS u
"""
_REWRITE_UPDATES = """
UPDATE maintenance_updates u SET body = row.body
FROM unnest($2::bigint[], $3::int[], $4::text[]) AS row (maintenance_id, version, body)
WHERE u.tenant_id = $1 AND u.maintenance_id = row.maintenance_id AND u.version = row.version
"""

# The answer with its links put in; see the same in incidents.
_ANSWER = """
CASE WHEN m.service_ids = '{}' THEN m.body ELSE replace(m.body, '"services":[]', '"services":[' || coalesce(
    (SELECT string_agg(s.ref, ',' ORDER BY s.service_id) FROM services s
     WHERE s.tenant_id = m.tenant_id AND s.service_id = ANY(m.service_ids)), '') || ']') END
"""

_UPDATES = f"""
(SELECT coalesce(string_agg({ENTRY}, ',' ORDER BY u.version), '')
 FROM maintenance_updates u {JOIN_AUTHORS}
 WHERE u.tenant_id = m.tenant_id AND u.maintenance_id = m.maintenance_id)
"""

_NEWEST = "announced_at DESC, maintenance_id DESC"
_NEXT = "scheduled_start, maintenance_id"

# A page of windows, the last announced first. $2 status: NULL for any.
_LIST = f"""
WITH page AS (
    SELECT * FROM maintenance WHERE tenant_id = $1 AND ($2::text IS NULL OR status = $2)
    ORDER BY {_NEWEST} LIMIT $3 OFFSET $4)
SELECT fresh.*,
    (SELECT count(*) FROM maintenance WHERE tenant_id = $1 AND ($2::text IS NULL OR status = $2)) AS total,
    convert_to((SELECT string_agg({_ANSWER}, ',' ORDER BY {_NEWEST}) FROM page m), 'UTF8') AS items
FROM {freshness("maintenance", "services")}
"""

# Windows still to come, the next one first.
_UPCOMING = f"""
SELECT fresh.*, convert_to((
    SELECT string_agg({_ANSWER}, ',' ORDER BY {_NEXT}) FROM maintenance m
    WHERE m.tenant_id = $1 AND m.status = 'scheduled' AND m.scheduled_start > now()), 'UTF8') AS items
FROM {freshness("maintenance", "services")}
"""

# One window with its timeline.
_ONE = f"""
SELECT fresh.*, {etag_of("m")} AS etag, convert_to(
    left({_ANSWER}, -1) || ',"updates":[' || {_UPDATES} || ']}}', 'UTF8') AS body
FROM {freshness("maintenance", "services")}
LEFT JOIN maintenance m ON m.tenant_id = $1 AND m.maintenance_id = $2
"""

# What the scheduler has to move on, of all tenants, within the next $1 seconds; the first due first. Rows of a halted
# projection are old and stay so: moving them again and again would take the others' turns.
_DUE = """
SELECT tenant_id, maintenance_id, status, due_at,
    greatest(0, extract(epoch FROM due_at - clock_timestamp()))::float8 AS seconds
FROM maintenance m WHERE due_at <= clock_timestamp() + $1 * interval '1 second' AND NOT EXISTS (
    SELECT FROM checkpoints c
    WHERE c.tenant_id = m.tenant_id AND c.projection = 'maintenance' AND c.halted_at IS NOT NULL)
ORDER BY due_at LIMIT $2
"""


# What the scheduler has to remind people of, of all tenants: windows that begin within $1 seconds, and whose hour was
# told before that. Who has heard of it only since needs no reminder at once.
_TO_REMIND = """
SELECT tenant_id, maintenance_id FROM maintenance m
WHERE remind_since < scheduled_start - $1 * interval '1 second' AND scheduled_start > clock_timestamp()
    AND scheduled_start <= clock_timestamp() + $1 * interval '1 second' AND NOT EXISTS (
        SELECT FROM checkpoints c
        WHERE c.tenant_id = m.tenant_id AND c.projection = 'maintenance' AND c.halted_at IS NOT NULL)
ORDER BY scheduled_start LIMIT $2
"""


class MaintenanceView(msgspec.Struct, kw_only=True):
    """A window as the API lists it; `services` is filled in when reading."""

    id: int
    title: str
    description: str | None
    status: str
    visibility: str
    services: Sequence[msgspec.Raw] = ()
    service_ids: tuple[int, ...]
    scheduled_start: datetime
    scheduled_end: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    cancelled_at: datetime | None = None
    exclude_from_sla: bool
    suppress_alerts: bool
    auto_start: bool
    auto_complete: bool
    created_at: datetime
    updated_at: datetime

    def state(self) -> Maintenance:
        """Return the domain's state that this shows."""
        return Maintenance(
            title=self.title,
            description=self.description,
            status=self.status,
            visibility=self.visibility,
            service_ids=self.service_ids,
            scheduled_start=self.scheduled_start,
            scheduled_end=self.scheduled_end,
            exclude_from_sla=self.exclude_from_sla,
            suppress_alerts=self.suppress_alerts,
            auto_start=self.auto_start,
            auto_complete=self.auto_complete,
        )


class MaintenanceDetail(MaintenanceView, kw_only=True):
    """A window with its timeline, oldest entry first."""

    updates: Sequence[TimelineEntry]


class MaintenanceFilter(NamedTuple):
    """The maintenance windows that a list shows.

    Attributes:
        status: One of `maintenance.STATUSES`; `None` admits all.
    """

    status: str | None = None

    def matches(self, view: MaintenanceView) -> bool:
        """Return whether the list shows this window."""
        return self.status in {None, view.status}


_decode = msgspec.json.Decoder(MaintenanceView).decode


class _Moments(NamedTuple):
    started_at: datetime | None = None
    completed_at: datetime | None = None
    cancelled_at: datetime | None = None


def evolve_view(view: MaintenanceView | None, recorded: RecordedEvent) -> MaintenanceView:
    """Fold one event into the answer; started_at, completed_at and cancelled_at are the world's time.

    A reminder changes nothing of it.
    """
    event = cast("MaintenanceEvent", recorded.event)
    after = maintenance.evolve(None if view is None else view.state(), event)
    moment = recorded.occurred_at
    before = _Moments() if view is None else _Moments(view.started_at, view.completed_at, view.cancelled_at)
    return MaintenanceView(
        id=recorded.stream_id,
        title=after.title,
        description=after.description,
        status=after.status,
        visibility=after.visibility,
        service_ids=after.service_ids,
        scheduled_start=after.scheduled_start,
        scheduled_end=after.scheduled_end,
        started_at=moment if isinstance(event, MaintenanceStarted) else before.started_at,
        completed_at=moment if isinstance(event, MaintenanceCompleted) else before.completed_at,
        cancelled_at=moment if isinstance(event, MaintenanceCancelled) else before.cancelled_at,
        exclude_from_sla=after.exclude_from_sla,
        suppress_alerts=after.suppress_alerts,
        auto_start=after.auto_start,
        auto_complete=after.auto_complete,
        created_at=recorded.recorded_at if view is None else view.created_at,
        updated_at=view.updated_at
        if view is not None and isinstance(event, MaintenanceReminded)
        else recorded.recorded_at,
    )


def render(history: Sequence[RecordedEvent], refs: Mapping[int, msgspec.Raw], token_names: Mapping[int, str]) -> bytes:
    """Return the window with its timeline, as its events leave it; see the same in incidents."""
    ((view, _),) = replay_streams(by_stream(history), {}, evolve_view)
    view.services = [refs[service_id] for service_id in view.service_ids if service_id in refs]
    updates = [
        TimelineEntry.of(recorded, recorded.event, author_name(recorded.meta.actor, token_names))
        for recorded in history
        if isinstance(recorded.event, MaintenanceUpdated)
    ]
    return msgspec.json.encode(MaintenanceDetail(**msgspec.structs.asdict(view), updates=updates))


_IDS = {maintenance.KIND: "maintenance_id BETWEEN $2 AND $3"}
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
        "due_at",
        "remind_since",
        "body",
    ),
    keys=1,
    of_streams=_IDS,
)
UPDATES = Table(
    "maintenance_updates", ("maintenance_id", "version", "actor_kind", "actor_id", "body"), keys=2, of_streams=_IDS
)


class MaintenanceWindows:
    """The projection `maintenance`."""

    name = "maintenance"
    version = 2
    kinds = (maintenance.KIND,)
    tables = (WINDOWS, UPDATES)

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Write one row for each window touched, and its new timeline entries."""
        streams = by_stream(events)
        stored, announced = {}, {}
        if ids := continued(streams):
            rows = await connection.fetch(_LOAD, tenant_id, ids)
            stored = {
                row["maintenance_id"]: (row["version"], _Window(_decode(row["body"]), row["remind_since"]))
                for row in rows
            }
            announced = {row["maintenance_id"]: row["announced_at"] for row in rows}
        columns = list(zip(*_rows(streams, stored, announced), strict=True))
        columns[4] = tuple(map(id_array, columns[4]))
        await connection.execute(_STORE, tenant_id, *columns)
        if updates := update_rows(events):
            await connection.execute(_STORE_UPDATES, tenant_id, *zip(*updates, strict=True))
        if gone := [
            (e.stream_id, v) for e in events if isinstance(e.event, MaintenanceRedacted) for v in e.event.versions
        ]:
            rows = await connection.fetch(_LOAD_UPDATES, tenant_id, *zip(*gone, strict=True))
            if rewritten := [(row["maintenance_id"], row["version"], redacted(row["body"])) for row in rows]:
                await connection.execute(_REWRITE_UPDATES, tenant_id, *zip(*rewritten, strict=True))

    def replayer(self) -> Replay:
        """Return a function that gives the rows of whole streams."""
        return lambda _kind, streams: {
            WINDOWS.name: _rows(streams, {}, {}),
            UPDATES.name: [row for stream in streams.values() for row in update_rows(stream)],
        }


class _Window(NamedTuple):
    """What a row holds: the answer, and since when people know the hour that they are to be reminded of, if any."""

    view: MaintenanceView
    remind_since: datetime | None


def _evolve(window: _Window | None, recorded: RecordedEvent) -> _Window:
    view = evolve_view(None if window is None else window.view, recorded)
    remind_since = None if window is None else window.remind_since
    if isinstance(recorded.event, MaintenanceScheduled | MaintenanceRescheduled):
        remind_since = recorded.recorded_at
    if view.status != "scheduled" or isinstance(recorded.event, MaintenanceReminded):
        remind_since = None
    return _Window(view, remind_since)


def _rows(
    streams: Streams, stored: Mapping[int, tuple[int, _Window]], announced: Mapping[int, datetime]
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
            remind_since,
            msgspec.json.encode(view).decode(),
        )
        for (view, remind_since), version in replay_streams(streams, stored, _evolve)
    ]


async def select_windows(
    connection: Connection, tenant_id: int, filter_: MaintenanceFilter, page: PageRequest
) -> asyncpg.Record:
    """Return `total` and `items` (the inside of a JSON array) of the tenant's windows, the last announced first."""
    return await connection.fetchrow(_LIST, tenant_id, *filter_, *page)


async def select_upcoming_windows(connection: Connection, tenant_id: int) -> asyncpg.Record:
    """Return `items` of all scheduled windows in the future, the next one first."""
    return await connection.fetchrow(_UPCOMING, tenant_id)


async def select_window(connection: Connection, tenant_id: int, maintenance_id: int) -> asyncpg.Record:
    """Return `body` and `etag` of one window; NULL if there is none."""
    return await connection.fetchrow(_ONE, tenant_id, maintenance_id)


async def select_due_windows(connection: Connection, within: float, limit: int) -> list[asyncpg.Record]:
    """Return windows of all tenants that must be started or completed within `within` seconds, by database time.

    The one query that spans tenants here: the scheduler serves them all.
    """
    return list(await connection.fetch(_DUE, within, limit))


async def select_windows_to_remind(connection: Connection, lead: float, limit: int) -> list[asyncpg.Record]:
    """Return windows of all tenants that people must be reminded of, `lead` seconds before they begin or less.

    Those whose hour was told later than that are left out, as are those that should have begun by now.
    """
    return list(await connection.fetch(_TO_REMIND, lead, limit))

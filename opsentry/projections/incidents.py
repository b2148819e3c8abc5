"""The projection `incidents`: incidents with their timelines, as `/incidents…` serves them."""

from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg
import msgspec

from opsentry.domain import incident
from opsentry.domain.incident import IncidentRedacted
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection, fetch_one
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import Replay, Rows, Streams, Table, by_stream, continued, replay_streams
from opsentry.projections.incident_snapshots import (
    SNAPSHOT_EVERY_VERSIONS,
    SNAPSHOTS,
    Snapshot,
    snapshot_rows,
    store_snapshots,
)
from opsentry.projections.incident_view import IncidentFilter, ProjectedIncident, decode_view, evolve
from opsentry.projections.page_request import PageRequest
from opsentry.projections.timeline import (
    ENTRY,
    JOIN_AUTHORS,
    TimelineTable,
    entry_rows,
    etag_of,
    id_array,
    response,
)

# Selects the stored rows of these incidents. LIMIT makes it one index lookup for each. Without it, a connection that
# planned the query while the table was small would keep scanning the table until the next statistics.
_LOAD = """
SELECT i.incident_id, i.version, i.body FROM unnest($2::bigint[]) AS wanted (id) CROSS JOIN LATERAL (
    SELECT incident_id, version, body FROM incidents WHERE tenant_id = $1 AND incident_id = wanted.id LIMIT 1) AS i
"""

# Writes one row for each incident, unless a newer version is stored, and adjusts the counts.
# - All parts of the statement see the rows from before it. So the second branch of `moves` subtracts the old rows.
# - The checkpoint's lock keeps other writers from counting meanwhile.
# - The condition on version always holds. It lets the planner expect one row, so that a connection keeps one plan that
#   goes by the keys. Otherwise it would plan each batch again, and scan the counts of all tenants.
_STORE = """
WITH stored AS (
    INSERT INTO incidents
        (tenant_id, incident_id, version, status, severity, visibility, service_ids, occurred_at, body)
    SELECT $1, id, version, status, severity, visibility, service_ids::bigint[], occurred_at, body
    FROM unnest($2::bigint[], $3::int[], $4::text[], $5::text[], $6::text[], $7::text[], $8::timestamptz[], $9::text[])
        AS row (id, version, status, severity, visibility, service_ids, occurred_at, body)
    WHERE version BETWEEN 1 AND 2147483647
    ON CONFLICT (tenant_id, incident_id) DO UPDATE SET
        version = excluded.version, status = excluded.status, severity = excluded.severity,
        visibility = excluded.visibility, service_ids = excluded.service_ids, body = excluded.body
    WHERE incidents.version < excluded.version
    RETURNING incident_id, status, severity),
changes AS (
    SELECT status, severity, sum(change) AS change FROM (
        SELECT status, severity, 1 AS change FROM stored
        UNION ALL
        SELECT i.status, i.severity, -1 FROM stored CROSS JOIN LATERAL (
            SELECT status, severity FROM incidents
            WHERE tenant_id = $1 AND incident_id = stored.incident_id LIMIT 1) AS i) AS moves
    GROUP BY status, severity HAVING sum(change) <> 0)
MERGE INTO incident_counts c USING changes ON c.tenant_id = $1
    AND c.status = changes.status AND c.severity = changes.severity
WHEN MATCHED AND c.incidents + change = 0 THEN DELETE
WHEN MATCHED THEN UPDATE SET incidents = c.incidents + change
WHEN NOT MATCHED THEN INSERT VALUES ($1, changes.status, changes.severity, change)
"""

_RESPONSE = response("i")
_ORDER = "occurred_at DESC, incident_id DESC"

# Selects the incidents that are not resolved, newest first.
_SELECT_ACTIVE = f"""
SELECT fresh.*, convert_to((
    SELECT string_agg({_RESPONSE}, ',' ORDER BY {_ORDER}) FROM incidents i
    WHERE i.tenant_id = $1 AND i.status <> 'resolved'), 'UTF8') AS items
FROM {freshness("incidents", "services")}
"""

# Selects the incident $2 with its timeline.
_SELECT_ONE = f"""
SELECT fresh.*, {etag_of("i")} AS etag, convert_to(
    left({_RESPONSE}, -1) || ',"updates":[' || (
        SELECT coalesce(string_agg({ENTRY}, ',' ORDER BY u.version), '')
        FROM incident_updates u {JOIN_AUTHORS}
        WHERE u.tenant_id = $1 AND u.incident_id = $2 AND u.version <= i.version) || ']}}', 'UTF8') AS body
FROM {freshness("incidents", "services")}
LEFT JOIN incidents i ON i.tenant_id = $1 AND i.incident_id = $2
"""


def _page_query(filters: Sequence[str], condition: str = "") -> str:
    """Return SQL that selects a page of incidents, newest first; `filters` are columns that equal $4 and $5.

    The ids of the page come from one index alone, so that an offset skips index entries and never rows with bodies.
    """
    where = (
        "tenant_id = $1" + "".join(f" AND {column} = ${number}" for number, column in enumerate(filters, 4)) + condition
    )
    return f"""
        WITH page AS (
            SELECT incident_id AS id FROM incidents WHERE {where} ORDER BY {_ORDER} LIMIT $2 OFFSET $3)
        SELECT fresh.*,
            (SELECT coalesce(sum(incidents), 0)::bigint FROM incident_counts WHERE {where}) AS total,
            convert_to((
                SELECT string_agg({_RESPONSE}, ',' ORDER BY {_ORDER}) FROM page CROSS JOIN LATERAL (
                    SELECT * FROM incidents WHERE tenant_id = $1 AND incident_id = page.id LIMIT 1) AS i),
                'UTF8') AS items
        FROM {freshness("incidents", "services")}
    """


# One query for each set of filters, so that each has its own plan: `status = $4 OR $4 IS NULL` would share a bad one.
# Only a condition that excludes `resolved` can use the partial index of the other statuses. So `resolved` has its own.
_PAGES: dict[tuple[str, ...], str] = {
    (): _page_query(()),
    ("severity",): _page_query(("severity",)),
    ("status",): _page_query(("status",), " AND status <> 'resolved'"),
    ("status", "severity"): _page_query(("status", "severity"), " AND status <> 'resolved'"),
}
_PAGES_OF_RESOLVED: dict[tuple[str, ...], str] = {
    filters: _page_query(filters, " AND status = 'resolved'") for filters in ((), ("severity",))
}

INCIDENTS = Table(
    "incidents",
    ("incident_id", "version", "status", "severity", "visibility", "service_ids", "occurred_at", "body"),
    keys=1,
    of_streams={incident.KIND: "incident_id BETWEEN $2 AND $3"},
)
COUNTS = Table(
    "incident_counts",
    ("status", "severity", "incidents"),
    keys=2,
    summary="SELECT status, severity, count(*) FROM incidents WHERE tenant_id = $1 GROUP BY status, severity",
)
_TIMELINE = TimelineTable("incident_updates", "incident_id", incident.KIND)


class Incidents:
    """The projection `incidents`."""

    name = "incidents"
    version = 1
    kinds = (incident.KIND,)
    tables = (INCIDENTS, COUNTS, _TIMELINE.table, SNAPSHOTS)

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Write a row for each incident, and its new timeline entries and snapshots."""
        streams = by_stream(events)
        stored = {}
        if ids := continued(streams):
            rows = await connection.fetch(_LOAD, tenant_id, ids)
            stored = {
                row["incident_id"]: (row["version"], ProjectedIncident.of(decode_view(row["body"]))) for row in rows
            }
        changed, snapshots = _rows(streams, stored)
        columns = list(zip(*changed, strict=True))
        columns[5] = tuple(map(id_array, columns[5]))
        await connection.execute(_STORE, tenant_id, *columns)
        await _TIMELINE.store(connection, tenant_id, events)
        redacted = [(e.stream_id, v) for e in events if isinstance(e.event, IncidentRedacted) for v in e.event.versions]
        await _TIMELINE.redact(connection, tenant_id, redacted)
        await store_snapshots(connection, tenant_id, snapshots, events)

    def replayer(self) -> Replay:
        """Return a function that computes the rows of whole streams."""
        return lambda _kind, streams: _replay(streams)


def _rows(
    streams: Streams, stored: Mapping[int, tuple[int, ProjectedIncident]]
) -> tuple[list[tuple[Any, ...]], list[Snapshot]]:
    """Return the rows of `incidents`, and the snapshots on the way."""
    snapshots: list[Snapshot] = []

    def take_snapshot(projected: ProjectedIncident, version: int) -> None:
        if version % SNAPSHOT_EVERY_VERSIONS == 0:
            snapshots.append(Snapshot(projected.id, version, _encode(projected)))

    rows = [
        (
            projected.id,
            version,
            projected.state.status,
            projected.state.severity,
            projected.state.visibility,
            projected.state.service_ids,
            projected.occurred_at,
            _encode(projected),
        )
        for projected, version in replay_streams(streams, stored, evolve, take_snapshot)
    ]
    return rows, snapshots


def _encode(projected: ProjectedIncident) -> str:
    return msgspec.json.encode(projected.view()).decode()


def _replay(streams: Streams) -> Rows:
    changed, snapshots = _rows(streams, {})
    updates = {stream_id: entry_rows(stream) for stream_id, stream in streams.items()}
    return {
        INCIDENTS.name: changed,
        _TIMELINE.table.name: [row for rows in updates.values() for row in rows],
        SNAPSHOTS.name: snapshot_rows(snapshots, streams, updates),
    }


async def select_incidents(
    connection: Connection, tenant_id: int, filter_: IncidentFilter, page: PageRequest
) -> asyncpg.Record:
    """Return `total` and `items` (the inside of a JSON array) of the tenant's incidents, newest first."""
    queries, fields = _PAGES, filter_._asdict()
    if filter_.status == "resolved":
        queries, fields = _PAGES_OF_RESOLVED, {"severity": filter_.severity}
    given = {column: value for column, value in fields.items() if value is not None}
    return await fetch_one(connection, queries[tuple(given)], tenant_id, *page, *given.values())


async def select_active_incidents(connection: Connection, tenant_id: int) -> asyncpg.Record:
    """Return `items` (the inside of a JSON array) of all incidents that are not resolved, newest first."""
    return await fetch_one(connection, _SELECT_ACTIVE, tenant_id)


async def select_incident(connection: Connection, tenant_id: int, incident_id: int) -> asyncpg.Record:
    """Return `body` and `etag` of an incident with its timeline; NULL if it does not exist."""
    return await fetch_one(connection, _SELECT_ONE, tenant_id, incident_id)

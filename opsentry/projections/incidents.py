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
from opsentry.projections.engine.projection import (
    Replay,
    Rows,
    Streams,
    Table,
    WriterRows,
    by_stream,
    continued,
    replay_streams,
)
from opsentry.projections.incident_snapshots import (
    SNAPSHOT_EVERY_VERSIONS,
    SNAPSHOTS,
    Snapshot,
    load_recent_entries,
    snapshot_rows,
)
from opsentry.projections.incident_view import IncidentFilter, ProjectedIncident, decode_view, evolve
from opsentry.projections.page_request import PageRequest
from opsentry.projections.timeline import (
    ENTRY,
    JOIN_AUTHORS,
    TimelineTable,
    entry_rows,
    etag_of,
    response,
)

# Selects the stored rows of these incidents. LIMIT makes it one index lookup for each. Without it, a connection that
# planned the query while the table was small would keep scanning the table until the next statistics.
_LOAD = """
SELECT i.incident_id, i.version, i.body FROM unnest($2::bigint[]) AS wanted (id) CROSS JOIN LATERAL (
    SELECT incident_id, version, body FROM incidents WHERE tenant_id = $1 AND incident_id = wanted.id LIMIT 1) AS i
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
    writer = "write_incidents"
    kinds = (incident.KIND,)
    tables = (INCIDENTS, COUNTS, _TIMELINE.table, SNAPSHOTS)

    async def prepare(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> WriterRows:
        """Return a row for each incident, its new and its redacted timeline entries, redactions, and snapshots."""
        streams = by_stream(events)
        stored = {}
        if ids := continued(streams):
            rows = await connection.fetch(_LOAD, tenant_id, ids)
            stored = {
                row["incident_id"]: (row["version"], ProjectedIncident.of(decode_view(row["body"]))) for row in rows
            }
        changed, snapshots = _rows(streams, stored)
        entries, redacted = await _TIMELINE.changes(connection, tenant_id, events)
        redactions = [(e.stream_id, e.version) for e in events if isinstance(e.event, IncidentRedacted)]
        recent = await load_recent_entries(connection, tenant_id, snapshots, streams)
        redacted_bodies = {row[:2]: row for row in redacted}
        for incident_id, of_incident in recent.items():
            recent[incident_id] = [redacted_bodies.get(row[:2], row) for row in of_incident]
            recent[incident_id] += [row for row in entries if row[0] == incident_id]
        return changed, entries, redacted, redactions, snapshot_rows(snapshots, streams, recent)

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

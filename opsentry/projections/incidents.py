"""Incidents with their timelines: serves `/incidents…`."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby
from operator import itemgetter
from typing import Any

import asyncpg
import msgspec

from opsentry.domain import incident
from opsentry.domain.incident import IncidentRedacted
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import Replay, Rows, Streams, Table, by_stream, continued, replay_streams
from opsentry.projections.incident_view import IncidentFilter, Shown, decode_view, evolve
from opsentry.projections.page_request import PageRequest
from opsentry.projections.timeline import (
    ENTRY,
    JOIN_AUTHORS,
    MARKED,
    etag_of,
    id_array,
    marked,
    redacted,
    update_rows,
)

# The rows that this batch goes on from. LIMIT keeps them from being joined by a scan of the table, which a connection
# that planned this while the table was small would go on doing until its statistics are next taken.
_LOAD = """
SELECT i.incident_id, i.version, i.body FROM unnest($2::bigint[]) AS wanted (id) CROSS JOIN LATERAL (
    SELECT incident_id, version, body FROM incidents WHERE tenant_id = $1 AND incident_id = wanted.id LIMIT 1) AS i
"""

# One row for each incident, whatever the number of its events in the batch; and the totals, moved by the rows that were
# in fact written and what those were before, which every part of a statement still sees. The checkpoint's lock keeps
# others from counting meanwhile. The condition on version holds always, and lets the planner expect a single row: so a
# connection keeps one plan, by the keys, where it would plan anew for each batch, and scan the totals of all tenants.
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

# Timeline entries are written once.
_STORE_UPDATES = """
INSERT INTO incident_updates (tenant_id, incident_id, version, actor_kind, actor_id, body)
SELECT $1, * FROM unnest($2::bigint[], $3::int[], $4::text[], $5::bigint[], $6::text[])
ON CONFLICT DO NOTHING
"""

# Entries whose words were erased.
_LOAD_UPDATES = """
SELECT u.incident_id, u.version, u.body FROM unnest($2::bigint[], $3::int[]) AS wanted (id, version)
CROSS JOIN LATERAL (
    SELECT * FROM incident_updates
    WHERE tenant_id = $1 AND incident_id = wanted.id AND version = wanted.version LIMIT 1) AS u
"""
_REWRITE_UPDATES = """
UPDATE incident_updates u SET body = row.body
FROM unnest($2::bigint[], $3::int[], $4::text[]) AS row (incident_id, version, body)
WHERE u.tenant_id = $1 AND u.incident_id = row.incident_id AND u.version = row.version
"""

# How often the state of an incident is kept.
SNAPSHOT_EVERY = 100

_STORE_SNAPSHOTS = f"""
INSERT INTO incident_snapshots (tenant_id, incident_id, version, body, updates, token_ids)
SELECT $1, row.id, row.version, row.body, coalesce(u.entries, ''), coalesce(u.token_ids, '{{}}')
FROM unnest($2::bigint[], $3::int[], $4::text[]) AS row (id, version, body)
CROSS JOIN LATERAL (
    SELECT string_agg({MARKED}, ',' ORDER BY u.version) AS entries,
        array_agg(DISTINCT u.actor_id) FILTER (WHERE u.actor_kind = 'token' AND u.actor_id IS NOT NULL) AS token_ids
    FROM incident_updates u WHERE u.tenant_id = $1 AND u.incident_id = row.id
        AND u.version > row.version - {SNAPSHOT_EVERY} AND u.version <= row.version) AS u
ON CONFLICT DO NOTHING
"""

# States from before an erasure still hold the words; looking back goes without them.
_DROP_SNAPSHOTS = """
DELETE FROM incident_snapshots s USING unnest($2::bigint[], $3::int[]) AS row (incident_id, version)
WHERE s.tenant_id = $1 AND s.incident_id = row.incident_id AND s.version < row.version
"""

# The answer with its links put in. Inside of a JSON string every quote is escaped, so the marker is found only where
# the encoder wrote it.
_ANSWER = """
CASE WHEN i.service_ids = '{}' THEN i.body ELSE replace(i.body, '"services":[]', '"services":[' || coalesce(
    (SELECT string_agg(s.ref, ',' ORDER BY s.service_id) FROM services s
     WHERE s.tenant_id = i.tenant_id AND s.service_id = ANY(i.service_ids)), '') || ']') END
"""

# The timeline of the incident $2 up to a version, as one JSON array's inside.
_UPDATES = f"""
(SELECT coalesce(string_agg({ENTRY}, ',' ORDER BY u.version), '')
 FROM incident_updates u {JOIN_AUTHORS}
 WHERE u.tenant_id = $1 AND u.incident_id = $2 AND u.version <= i.version)
"""

_ORDER = "occurred_at DESC, incident_id DESC"

# The incidents that are not resolved, as one JSON array's inside.
_ACTIVE = f"""
SELECT fresh.*, convert_to((
    SELECT string_agg({_ANSWER}, ',' ORDER BY {_ORDER}) FROM incidents i
    WHERE i.tenant_id = $1 AND i.status <> 'resolved'), 'UTF8') AS items
FROM {freshness("incidents", "services")}
"""

# One incident with its timeline.
_ONE = f"""
SELECT fresh.*, {etag_of("i")} AS etag, convert_to(
    left({_ANSWER}, -1) || ',"updates":[' || {_UPDATES} || ']}}', 'UTF8') AS body
FROM {freshness("incidents", "services")}
LEFT JOIN incidents i ON i.tenant_id = $1 AND i.incident_id = $2
"""


# What an incident was at position $3: the version it had, and the state kept last before it.
_AS_OF = f"""
SELECT fresh.*, i.version, s.version AS snapshot_version, s.body AS snapshot
FROM {freshness("incidents")}
CROSS JOIN (SELECT version_at($1, 'incident', $2, $3) AS version) AS i
LEFT JOIN LATERAL (
    SELECT version, body FROM incident_snapshots
    WHERE tenant_id = $1 AND incident_id = $2 AND version <= i.version ORDER BY version DESC LIMIT 1) AS s ON true
"""

_KEPT = "FROM incident_snapshots WHERE tenant_id = $1 AND incident_id = $2 AND version <= $3"
_WRITTEN = f"""
SELECT u.version, {MARKED} AS entries,
    CASE WHEN u.actor_kind = 'token' AND u.actor_id IS NOT NULL THEN ARRAY[u.actor_id] ELSE '{{}}' END AS token_ids
FROM incident_updates u WHERE u.tenant_id = $1 AND u.incident_id = $2
"""

# The timeline up to version $3, in order: what snapshots hold of it, and entries from before the first and after the
# last of them.
_TIMELINE = f"""
SELECT version, updates AS entries, token_ids {_KEPT} AND updates <> ''
UNION ALL
{_WRITTEN} AND u.version <= (SELECT coalesce(min(version) - {SNAPSHOT_EVERY}, 0) {_KEPT})
UNION ALL
{_WRITTEN} AND u.version > (SELECT coalesce(max(version), 0) {_KEPT}) AND u.version <= $3
ORDER BY version
"""


def _list_query(filters: Sequence[str], also: str = "") -> str:
    """Return the query of a page, newest first, as a JSON array's inside; `filters` are columns compared to $4, $5.

    The page's ids come first, from an index alone: what an offset skips are its entries, never rows with their bodies.
    """
    where = "tenant_id = $1" + "".join(f" AND {column} = ${number}" for number, column in enumerate(filters, 4)) + also
    return f"""
        WITH page AS (
            SELECT incident_id AS id FROM incidents WHERE {where} ORDER BY {_ORDER} LIMIT $2 OFFSET $3)
        SELECT fresh.*,
            (SELECT coalesce(sum(incidents), 0)::bigint FROM incident_counts WHERE {where}) AS total,
            convert_to((
                SELECT string_agg({_ANSWER}, ',' ORDER BY {_ORDER}) FROM page CROSS JOIN LATERAL (
                    SELECT * FROM incidents WHERE tenant_id = $1 AND incident_id = page.id LIMIT 1) AS i),
                'UTF8') AS items
        FROM {freshness("incidents", "services")}
    """


# Written out for each set of filters, so that each has its own plan: `status = $4 OR $4 IS NULL` would share a bad one.
# Only what says that it matches none of the resolved can go by the index of the others, so these stand apart.
_LISTS: dict[tuple[str, ...], str] = {
    (): _list_query(()),
    ("severity",): _list_query(("severity",)),
    ("status",): _list_query(("status",), " AND status <> 'resolved'"),
    ("status", "severity"): _list_query(("status", "severity"), " AND status <> 'resolved'"),
}
_LISTS_RESOLVED: dict[tuple[str, ...], str] = {
    filters: _list_query(filters, " AND status = 'resolved'") for filters in ((), ("severity",))
}


async def select_incident_as_of(
    connection: Connection, tenant_id: int, incident_id: int, position: int
) -> asyncpg.Record:
    """Return an incident's `version` at `position` (0: none) and its newest snapshot up to there."""
    return await connection.fetchrow(_AS_OF, tenant_id, incident_id, position)


async def select_timeline(
    connection: Connection, tenant_id: int, incident_id: int, version: int
) -> tuple[bytes, AbstractSet[int]]:
    """Return the timeline up to `version` as a JSON array's inside, and the tokens to be named there."""
    rows = await connection.fetch(_TIMELINE, tenant_id, incident_id, version)
    token_ids = {token_id for row in rows for token_id in row["token_ids"]}
    return ",".join([row["entries"] for row in rows]).encode(), token_ids


_IDS = {incident.KIND: "incident_id BETWEEN $2 AND $3"}
INCIDENTS = Table(
    "incidents",
    ("incident_id", "version", "status", "severity", "visibility", "service_ids", "occurred_at", "body"),
    keys=1,
    of_streams=_IDS,
)
COUNTS = Table(
    "incident_counts",
    ("status", "severity", "incidents"),
    keys=2,
    summary="SELECT status, severity, count(*) FROM incidents WHERE tenant_id = $1 GROUP BY status, severity",
)
UPDATES = Table(
    "incident_updates", ("incident_id", "version", "actor_kind", "actor_id", "body"), keys=2, of_streams=_IDS
)
SNAPSHOTS = Table(
    "incident_snapshots", ("incident_id", "version", "body", "updates", "token_ids"), keys=2, of_streams=_IDS
)


class Incidents:
    """The projection `incidents`."""

    name = "incidents"
    version = 1
    kinds = (incident.KIND,)
    tables = (INCIDENTS, COUNTS, UPDATES, SNAPSHOTS)

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Write one row for each incident touched, and its new timeline entries."""
        streams = by_stream(events)
        stored = {}
        if ids := continued(streams):
            rows = await connection.fetch(_LOAD, tenant_id, ids)
            stored = {row["incident_id"]: (row["version"], Shown.of(decode_view(row["body"]))) for row in rows}
        changed, snapshots = _rows(streams, stored)
        columns = list(zip(*changed, strict=True))
        columns[5] = tuple(map(id_array, columns[5]))
        await connection.execute(_STORE, tenant_id, *columns)
        if updates := update_rows(events):
            await connection.execute(_STORE_UPDATES, tenant_id, *zip(*updates, strict=True))
        if erased := [(e, e.event) for e in events if isinstance(e.event, IncidentRedacted)]:
            last = {e.stream_id: e.version for e, _ in erased}
            snapshots = [kept for kept in snapshots if kept[1] > last.get(kept[0], 0)]
            await connection.execute(_DROP_SNAPSHOTS, tenant_id, list(last), list(last.values()))
            gone = [(e.stream_id, version) for e, event in erased for version in event.versions]
            rows = await connection.fetch(_LOAD_UPDATES, tenant_id, *zip(*gone, strict=True))
            if rewritten := [(row["incident_id"], row["version"], redacted(row["body"])) for row in rows]:
                await connection.execute(_REWRITE_UPDATES, tenant_id, *zip(*rewritten, strict=True))
        if snapshots:
            await connection.execute(_STORE_SNAPSHOTS, tenant_id, *zip(*snapshots, strict=True))

    def replayer(self) -> Replay:
        """Return a function that gives the rows of whole streams."""
        return lambda _kind, streams: _replay(streams)


def _rows(
    streams: Streams, stored: Mapping[int, tuple[int, Shown]]
) -> tuple[list[tuple[Any, ...]], list[tuple[int, int, str]]]:
    """Return the rows of `incidents`, and the id, version and body of states to be kept."""
    kept: list[tuple[int, int, str]] = []

    def keep(shown: Shown, version: int) -> None:
        if version % SNAPSHOT_EVERY == 0:
            kept.append((shown.id, version, msgspec.json.encode(shown.view()).decode()))

    rows = [
        (
            shown.id,
            version,
            shown.state.status,
            shown.state.severity,
            shown.state.visibility,
            shown.state.service_ids,
            shown.occurred_at,
            msgspec.json.encode(shown.view()).decode(),
        )
        for shown, version in replay_streams(streams, stored, evolve, keep)
    ]
    return rows, kept


def _replay(streams: Streams) -> Rows:
    changed, kept = _rows(streams, {})
    updates = {stream_id: update_rows(stream) for stream_id, stream in streams.items()}
    snapshots: list[tuple[Any, ...]] = []
    for stream_id, states in groupby(kept, key=itemgetter(0)):
        erased = max((e.version for e in streams[stream_id] if isinstance(e.event, IncidentRedacted)), default=0)
        hundreds: dict[int, list[tuple[Any, ...]]] = {}
        for row in updates[stream_id]:
            hundreds.setdefault((row[1] - 1) // SNAPSHOT_EVERY, []).append(row)
        for _, version, body in states:
            if version > erased:
                recent = hundreds.get((version - 1) // SNAPSHOT_EVERY, [])
                entries = ",".join(marked(text, actor_kind, actor_id) for _, _, actor_kind, actor_id, text in recent)
                tokens = sorted({row[3] for row in recent if row[2] == "token" and row[3] is not None})
                snapshots.append((stream_id, version, body, entries, tokens))
    return {
        INCIDENTS.name: changed,
        UPDATES.name: [row for rows in updates.values() for row in rows],
        SNAPSHOTS.name: snapshots,
    }


async def select_incidents(
    connection: Connection, tenant_id: int, filter_: IncidentFilter, page: PageRequest
) -> asyncpg.Record:
    """Return `total` and `items` (the inside of a JSON array) of the tenant's incidents, newest first."""
    lists, filters = _LISTS, filter_._asdict()
    if filter_.status == "resolved":
        lists, filters = _LISTS_RESOLVED, {"severity": filter_.severity}
    chosen = {column: value for column, value in filters.items() if value is not None}
    return await connection.fetchrow(lists[tuple(chosen)], tenant_id, *page, *chosen.values())


async def select_active_incidents(connection: Connection, tenant_id: int) -> asyncpg.Record:
    """Return `items` of all incidents that are not resolved, newest first."""
    return await connection.fetchrow(_ACTIVE, tenant_id)


async def select_incident(connection: Connection, tenant_id: int, incident_id: int) -> asyncpg.Record:
    """Return `body` and `etag` of one incident; NULL if there is none."""
    return await connection.fetchrow(_ONE, tenant_id, incident_id)

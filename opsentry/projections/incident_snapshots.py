"""Snapshots of incidents: each hundredth state, so that an as-of query of a long incident stays fast."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import asyncpg

from opsentry.domain import incident
from opsentry.domain.incident import IncidentRedacted
from opsentry.infrastructure.postgres import Connection, fetch_one
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import Streams, Table
from opsentry.projections.timeline import ENTRY_WITH_PLACEHOLDER, with_placeholder

SNAPSHOT_EVERY_VERSIONS = 100

SNAPSHOTS = Table(
    "incident_snapshots",
    ("incident_id", "version", "body", "updates", "token_ids"),
    keys=2,
    of_streams={incident.KIND: "incident_id BETWEEN $2 AND $3"},
)

# Selects the timeline entries of the incidents $2 before version $3 of each, back to the snapshot before it.
_SELECT_RECENT = f"""
SELECT u.incident_id, u.version, u.actor_kind, u.actor_id, u.body
FROM unnest($2::bigint[], $3::int[]) AS wanted (id, version) CROSS JOIN LATERAL (
    SELECT * FROM incident_updates
    WHERE tenant_id = $1 AND incident_id = wanted.id AND version < wanted.version
        AND version > wanted.version - {SNAPSHOT_EVERY_VERSIONS} ORDER BY version) AS u
"""

# Selects the version that an incident had at position $3, and the last snapshot before it.
_SELECT_AS_OF = f"""
SELECT fresh.*, i.version, s.version AS snapshot_version, s.body AS snapshot
FROM {freshness("incidents")}
CROSS JOIN (SELECT version_at($1, 'incident', $2, $3) AS version) AS i
LEFT JOIN LATERAL (
    SELECT version, body FROM incident_snapshots
    WHERE tenant_id = $1 AND incident_id = $2 AND version <= i.version ORDER BY version DESC LIMIT 1) AS s ON true
"""

_FROM_SNAPSHOTS = "FROM incident_snapshots WHERE tenant_id = $1 AND incident_id = $2 AND version <= $3"
_SELECT_ENTRIES = f"""
SELECT u.version, {ENTRY_WITH_PLACEHOLDER} AS entries,
    CASE WHEN u.actor_kind = 'token' AND u.actor_id IS NOT NULL THEN ARRAY[u.actor_id] ELSE '{{}}' END AS token_ids
FROM incident_updates u WHERE u.tenant_id = $1 AND u.incident_id = $2
"""

# Selects the timeline up to version $3 in order: from the snapshots, and the entries before the first and after the
# last snapshot.
_SELECT_TIMELINE = f"""
SELECT version, updates AS entries, token_ids {_FROM_SNAPSHOTS} AND updates <> ''
UNION ALL
{_SELECT_ENTRIES}
    AND u.version <= (SELECT coalesce(min(version) - {SNAPSHOT_EVERY_VERSIONS}, 0) {_FROM_SNAPSHOTS})
UNION ALL
{_SELECT_ENTRIES} AND u.version > (SELECT coalesce(max(version), 0) {_FROM_SNAPSHOTS}) AND u.version <= $3
ORDER BY version
"""


class Snapshot(NamedTuple):
    """The state of an incident at a version, as JSON."""

    incident_id: int
    version: int
    body: str


async def load_recent_entries(
    connection: Connection, tenant_id: int, snapshots: Sequence[Snapshot], streams: Streams
) -> dict[int, list[tuple[Any, ...]]]:
    """Return the stored timeline entries of `snapshots` that come before `streams`, by incident."""
    first = {each.incident_id: streams[each.incident_id][0].version for each in snapshots}
    entries: dict[int, list[tuple[Any, ...]]] = {incident_id: [] for incident_id in first}
    if first:
        for row in await connection.fetch(_SELECT_RECENT, tenant_id, list(first), list(first.values())):
            entries[row["incident_id"]].append(tuple(row))
    return entries


def snapshot_rows(
    snapshots: Sequence[Snapshot], streams: Streams, updates: Mapping[int, Sequence[tuple[Any, ...]]]
) -> list[tuple[Any, ...]]:
    """Return the rows of `snapshots`, without those that a later redaction outdates.

    Args:
        snapshots: The snapshots, stream by stream.
        streams: The events of these streams that lead to them.
        updates: The rows of their timeline entries back to the snapshot before, by stream id.
    """
    rows: list[tuple[Any, ...]] = []
    for incident_id, of_incident in groupby(snapshots, key=itemgetter(0)):
        redacted_at = max((e.version for e in streams[incident_id] if isinstance(e.event, IncidentRedacted)), default=0)
        by_hundred: dict[int, list[tuple[Any, ...]]] = {}
        for row in updates[incident_id]:
            by_hundred.setdefault((row[1] - 1) // SNAPSHOT_EVERY_VERSIONS, []).append(row)
        for _, version, body in of_incident:
            if version > redacted_at:
                recent = by_hundred.get((version - 1) // SNAPSHOT_EVERY_VERSIONS, [])
                entries = ",".join(with_placeholder(text, kind, actor_id) for _, _, kind, actor_id, text in recent)
                token_ids = sorted({row[3] for row in recent if row[2] == "token" and row[3] is not None})
                rows.append((incident_id, version, body, entries, token_ids))
    return rows


async def select_incident_as_of(
    connection: Connection, tenant_id: int, incident_id: int, position: int
) -> asyncpg.Record:
    """Return an incident's `version` at `position`, 0 if it did not exist, and its last snapshot up to there."""
    return await fetch_one(connection, _SELECT_AS_OF, tenant_id, incident_id, position)


async def select_timeline(
    connection: Connection, tenant_id: int, incident_id: int, version: int
) -> tuple[bytes, AbstractSet[int]]:
    """Return the timeline up to `version` as the inside of a JSON array, and the tokens with placeholders in it."""
    rows = await connection.fetch(_SELECT_TIMELINE, tenant_id, incident_id, version)
    token_ids = {token_id for row in rows for token_id in row["token_ids"]}
    return ",".join([row["entries"] for row in rows]).encode(), token_ids

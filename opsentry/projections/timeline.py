"""Timeline entries of incidents and maintenance windows, and the parts of their responses that both share."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from opsentry.domain.decider import REDACTED
from opsentry.domain.incident import IncidentRedacted, IncidentUpdated
from opsentry.domain.maintenance import MaintenanceRedacted, MaintenanceUpdated
from opsentry.events.codec import Actor, RecordedEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Table


class TimelineEntry(msgspec.Struct, kw_only=True, gc=False):
    """A timeline entry as the API renders it; `id` is the position of its event."""

    id: int
    status: str
    message: str
    is_public: bool
    author: str | None
    created_at: datetime

    @classmethod
    def of(
        cls, recorded: RecordedEvent, event: IncidentUpdated | MaintenanceUpdated, author: str | None
    ) -> "TimelineEntry":
        """Return the entry that `event`, recorded as `recorded`, adds."""
        return cls(
            id=recorded.position,
            status=event.status,
            message=event.message,
            is_public=event.is_public,
            author=author,
            created_at=recorded.occurred_at,
        )


def entries_of(history: Iterable[RecordedEvent], token_names: Mapping[int, str]) -> list[TimelineEntry]:
    """Return the timeline that `history` leaves, with authors.

    Args:
        history: The events of a stream, in order.
        token_names: The names of the API tokens that may have written entries, by id.
    """
    return [
        TimelineEntry.of(recorded, recorded.event, author_name(recorded.meta.actor, token_names))
        for recorded in history
        if isinstance(recorded.event, IncidentUpdated | MaintenanceUpdated)
    ]


def author_name(actor: Actor, token_names: Mapping[int, str]) -> str:
    """Return the author that an entry shows: the name of the API token, else the kind of actor."""
    if actor.kind == "token" and actor.id is not None:
        return token_names.get(actor.id, actor.kind)
    return actor.kind


# ----------------------------------------------------------------------------------------------------- tables


class TimelineTable:
    """The table of one read model's timeline entries, stored with `author` null: a read fills in the author.

    Args:
        name: The name of the table.
        id_column: The column with the stream id.
        kind: The kind of the streams.
    """

    def __init__(self, name: str, id_column: str, kind: str) -> None:
        self.table = Table(
            name,
            (id_column, "version", "actor_kind", "actor_id", "body"),
            keys=2,
            of_streams={kind: f"{id_column} BETWEEN $2 AND $3"},
        )
        # Selects the entries with these stream ids and versions. LIMIT makes it one index lookup for each; see
        # `incidents`.
        self._select = f"""
SELECT u.{id_column}, u.version, u.actor_kind, u.actor_id, u.body
FROM unnest($2::bigint[], $3::int[]) AS wanted (id, version)
CROSS JOIN LATERAL (
    SELECT * FROM {name}
    WHERE tenant_id = $1 AND {id_column} = wanted.id AND version = wanted.version LIMIT 1) AS u
"""

    async def changes(
        self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]
    ) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """Return the rows of the entries that `events` add, and those of stored entries that they redact."""
        rows = entry_rows(events)
        redacted = {
            (recorded.stream_id, version)
            for recorded in events
            if isinstance(recorded.event, IncidentRedacted | MaintenanceRedacted)
            for version in recorded.event.versions
        }
        if not redacted:
            return rows, []
        stored = await connection.fetch(self._select, tenant_id, *zip(*sorted(redacted), strict=True))
        added = [(*row[:4], _redact(row[4])) if row[:2] in redacted else row for row in rows]
        return added, [(*row[:4], _redact(row[4])) for row in map(tuple, stored)]


def entry_rows(events: Iterable[RecordedEvent]) -> list[tuple[Any, ...]]:
    """Return a `TimelineTable` row for each timeline entry among `events`."""
    return [
        (
            recorded.stream_id,
            recorded.version,
            recorded.meta.actor.kind,
            recorded.meta.actor.id,
            msgspec.json.encode(TimelineEntry.of(recorded, recorded.event, None)).decode(),
        )
        for recorded in events
        if isinstance(recorded.event, IncidentUpdated | MaintenanceUpdated)
    ]


def _redact(body: str) -> str:
    entry = msgspec.json.decode(body, type=TimelineEntry)
    entry.message = REDACTED
    return msgspec.json.encode(entry).decode()


# ------------------------------------------------------------------------------------------ SQL for responses

# An entry `u` with its author, and the join for that. Tokens are few and entries many: OFFSET keeps the planner from
# converting a token's name to JSON once for each entry.
ENTRY = """replace(u.body, '"author":null', '"author":' || coalesce(t.author, to_json(u.actor_kind)::text))"""
JOIN_AUTHORS = """
LEFT JOIN (SELECT token_id, to_json(name)::text AS author FROM api_tokens WHERE tenant_id = $1 OFFSET 0) AS t
    ON u.actor_kind = 'token' AND t.token_id = u.actor_id
"""

# An entry `u` in which a placeholder stands for the name of a token. The placeholder begins with octet 1, which JSON
# itself never contains.
ENTRY_WITH_PLACEHOLDER = """replace(u.body, '"author":null', '"author":"' || CASE
    WHEN u.actor_kind = 'token' AND u.actor_id IS NOT NULL THEN chr(1) || u.actor_id ELSE u.actor_kind END || '"')"""


def response(row: str) -> str:
    """Return SQL for the response about `row`: its body with service links.

    Inside a JSON string every quote is escaped, so the search text occurs only where the encoder wrote it.
    """
    return f"""
CASE WHEN {row}.service_ids = '{{}}' THEN {row}.body
ELSE replace({row}.body, '"services":[]', '"services":[' || coalesce(
    (SELECT string_agg(s.link, ',' ORDER BY s.service_id) FROM services s
     WHERE s.tenant_id = {row}.tenant_id AND s.service_id = ANY({row}.service_ids)), '') || ']') END
"""


def etag_of(row: str) -> str:
    """Return SQL for the entity tag of the response about `row`; see `etag`."""
    return f"""{row}.version || coalesce((SELECT '-' || nullif(sum(s.version - 1), 0) FROM services s
        WHERE s.tenant_id = {row}.tenant_id AND s.service_id = ANY({row}.service_ids)), '')"""


def etag(version: int, service_versions: Iterable[int]) -> str:
    """Return the entity tag of a response: the stream's version, and the number of changes of its linked services."""
    changes = sum(service_version - 1 for service_version in service_versions)
    return f"{version}-{changes}" if changes else str(version)


def with_placeholder(body: str, actor_kind: str, actor_id: int | None) -> str:
    """Return the stored entry `body` as `ENTRY_WITH_PLACEHOLDER` renders it."""
    author = f"\x01{actor_id}" if actor_kind == "token" and actor_id is not None else actor_kind
    return body.replace('"author":null', f'"author":"{author}"')


def fill_placeholders(entries: bytes, token_ids: Iterable[int], token_names: Mapping[int, str]) -> bytes:
    """Return `entries` with the names of these tokens in place of their placeholders."""
    for token_id in token_ids:
        name = author_name(Actor("token", token_id), token_names)
        entries = entries.replace(b'"\x01%d"' % token_id, msgspec.json.encode(name))
    return entries

"""Timeline entries, as incidents and maintenance windows both have them."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from opsentry.domain.decider import REDACTED
from opsentry.domain.incident import IncidentUpdated
from opsentry.domain.maintenance import MaintenanceUpdated
from opsentry.events.codec import Actor, RecordedEvent

# An entry `u` with who wrote it, and what to join for that. ApiTokens are few beside the entries that they wrote:
# OFFSET
# keeps their names from being made JSON of once for each entry.
ENTRY = """replace(u.body, '"author":null', '"author":' || coalesce(t.author, to_json(u.actor_kind)::text))"""
JOIN_AUTHORS = """
LEFT JOIN (SELECT token_id, to_json(name)::text AS author FROM api_tokens WHERE tenant_id = $1 OFFSET 0) AS t
    ON u.actor_kind = 'token' AND t.token_id = u.actor_id
"""


def etag_of(row: str) -> str:
    """Return SQL for the entity tag of the answer about `row`: its version, and how often linked services changed."""
    return f"""{row}.version || coalesce((SELECT '-' || nullif(sum(s.version - 1), 0) FROM services s
        WHERE s.tenant_id = {row}.tenant_id AND s.service_id = ANY({row}.service_ids)), '')"""


def etag(version: int, service_versions: Iterable[int]) -> str:
    """Return the same from the versions of the stream and of the services that its answer links."""
    changes = sum(linked - 1 for linked in service_versions)
    return f"{version}-{changes}" if changes else str(version)


# An entry `u` in which a token stands for its name, to be named later: octet 1 never stands in JSON itself.
MARKED = """replace(u.body, '"author":null', '"author":"' || CASE WHEN u.actor_kind = 'token' AND u.actor_id IS NOT NULL
    THEN chr(1) || u.actor_id ELSE u.actor_kind END || '"')"""


def marked(body: str, actor_kind: str, actor_id: int | None) -> str:
    """Return the stored entry `body` as `MARKED` gives it."""
    author = f"\x01{actor_id}" if actor_kind == "token" and actor_id is not None else actor_kind
    return body.replace('"author":null', f'"author":"{author}"')


def name_authors(updates: bytes, token_ids: Iterable[int], token_names: Mapping[int, str]) -> bytes:
    """Return entries in which the tokens with these ids were `MARKED`, with their names."""
    for token_id in token_ids:
        name = author_name(Actor("token", token_id), token_names)
        updates = updates.replace(b'"\x01%d"' % token_id, msgspec.json.encode(name))
    return updates


class TimelineEntry(msgspec.Struct, kw_only=True, gc=False):
    """A timeline entry as the API answers it. `id` is its position in the tenant's ledger."""

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
        """Return the entry that `event`, recorded as `recorded`, makes."""
        return cls(
            id=recorded.position,
            status=event.status,
            message=event.message,
            is_public=event.is_public,
            author=author,
            created_at=recorded.occurred_at,
        )


def author_name(actor: Actor, token_names: Mapping[int, str]) -> str:
    """Return whom an entry names as its author: the token's name, or what kind of actor it was."""
    if actor.kind == "token" and actor.id is not None:
        return token_names.get(actor.id, actor.kind)
    return actor.kind


def update_rows(events: Iterable[RecordedEvent]) -> list[tuple[Any, ...]]:
    """Return the stream id, version, actor's kind and id, and body of each timeline entry among `events`."""
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


def redacted(body: str) -> str:
    """Return a stored entry without its words."""
    entry = msgspec.json.decode(body, type=TimelineEntry)
    entry.message = REDACTED
    return msgspec.json.encode(entry).decode()


def id_array(ids: Iterable[int]) -> str:
    """Return `ids` as PostgreSQL writes an array; the driver has no arrays of arrays of different lengths."""
    return "{" + ",".join(map(str, ids)) + "}"

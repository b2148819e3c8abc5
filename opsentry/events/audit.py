"""Read a ledger for auditors: entries with their hashes, ledger heads, and the rows to verify."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import asyncpg
import msgspec

from opsentry.events.codec import Meta, UnknownEvent, decode_meta, readable
from opsentry.events.hash_chain import Link
from opsentry.infrastructure.postgres import Connection, fetch_one

# Events with their previous hashes. LIMIT 1 makes the planner find each previous event by the primary key.
_ENTRIES = """
SELECT e.*, coalesce(p.hash, decode(repeat('00', 32), 'hex')) AS previous_hash
FROM (SELECT * FROM events WHERE {where} ORDER BY {order} LIMIT $3) AS e
LEFT JOIN LATERAL (SELECT hash FROM events WHERE tenant_id = e.tenant_id AND position = e.position - 1 LIMIT 1)
AS p ON true
ORDER BY e.{order}
"""

# The ledger after a position, all types or one. $4 bounds the search for a rare type.
_LEDGER = _ENTRIES.format(
    where="tenant_id = $1 AND position > $2 AND position <= $4 AND ($5::text IS NULL OR type = $5)", order="position"
)

# One stream after a position.
_STREAM = _ENTRIES.format(
    where="tenant_id = $1 AND stream_kind = $4 AND stream_id = $5 AND version > version_at($1, $4, $5, $2)",
    order="version",
)

_HEAD = "SELECT position, hash, recorded_at FROM ledger_heads WHERE tenant_id = $1"

# The ends of all ledgers or of one, according to the head and according to the events.
_HEADS = """
SELECT h.tenant_id, t.slug, h.position, h.hash, coalesce(e.position, 0) AS last
FROM ledger_heads h JOIN tenants t USING (tenant_id)
LEFT JOIN LATERAL (SELECT position FROM events WHERE tenant_id = h.tenant_id ORDER BY position DESC LIMIT 1) AS
e ON true
WHERE $1::bigint IS NULL OR h.tenant_id = $1 ORDER BY h.tenant_id
"""

_REDACTIONS = "SELECT stream_kind, stream_id, data FROM events WHERE tenant_id = $1 AND type LIKE '%.redacted'"

_MOMENT = "CASE WHEN isfinite({0}) THEN (extract(epoch FROM {0}) * 1000000)::bigint END AS {0}"

# The columns are in the order of `Link`.
_LINKS = (
    "SELECT tenant_id, position, stream_kind, stream_id, version, type, schema_version,"
    f" {_MOMENT.format('occurred_at')},"
    f" {_MOMENT.format('recorded_at')}, data, meta, erasable, salt, erasable_digest, hash"
    " FROM events WHERE tenant_id = $1 AND position > $2 AND position <= $3 ORDER BY position"
)

_TOKENS = "SELECT token_id, prefix, name FROM api_tokens WHERE tenant_id = $1 AND token_id = ANY($2)"

_HASH_AT = "SELECT hash FROM events WHERE tenant_id = $1 AND position = $2"

# One page of a type searches at most this many events.
SEARCH_WINDOW_EVENTS = 50_000


class EntryActor(msgspec.Struct, frozen=True, omit_defaults=True):
    """Identify the actor of an entry: its kind and, for a token, id, public prefix and name."""

    kind: str
    id: int | None = None
    prefix: str | None = None
    name: str | None = None


class Entry(msgspec.Struct, frozen=True):
    """Describe an event for an auditor. `data` joins facts and text; erased text reads `[redacted]`."""

    position: int
    stream_kind: str
    stream_id: int
    version: int
    type: str
    schema_version: int
    data: dict[str, Any]
    actor: EntryActor
    request_id: str | None
    occurred_at: datetime
    recorded_at: datetime
    hash: str
    previous_hash: str


class LedgerHead(msgspec.Struct, frozen=True):
    """Describe the end of a ledger. Kept elsewhere as an anchor, it proves that nothing was truncated.

    `position` is 0 for an empty ledger.
    """

    position: int
    hash: str
    recorded_at: datetime | None


async def read_ledger_page(
    connection: Connection, tenant_id: int, *, after: int, limit: int, type_: str | None
) -> tuple[list[Entry], int | None]:
    """Return at most `limit` entries after position `after`, and the position to continue after (`None`: the end).

    With a type, a page can be short or empty without being the last one, because it searches 50,000 events at most.
    """
    last: int = (await fetch_one(connection, _HEAD, tenant_id))["position"]
    reached = min(after + SEARCH_WINDOW_EVENTS, last)
    rows = await connection.fetch(_LEDGER, tenant_id, after, limit, reached, type_)
    entries = await _entries(connection, tenant_id, rows)
    if len(entries) == limit:
        reached = entries[-1].position
    return entries, reached if reached < last else None


async def read_stream_page(
    connection: Connection, tenant_id: int, kind: str, stream_id: int, *, after: int, limit: int
) -> tuple[list[Entry], int | None]:
    """Return at most `limit` entries of one stream after position `after`, and the position to continue after."""
    rows = await connection.fetch(_STREAM, tenant_id, after, limit + 1, kind, stream_id)
    entries = await _entries(connection, tenant_id, rows[:limit])
    return entries, entries[-1].position if len(rows) > limit else None


async def read_ledger_head(connection: Connection, tenant_id: int) -> LedgerHead:
    """Return the end of the tenant's ledger."""
    row = await fetch_one(connection, _HEAD, tenant_id)
    return LedgerHead(row["position"], row["hash"].hex(), row["recorded_at"] if row["position"] else None)


async def read_ledger_heads(connection: Connection, tenant_id: int | None = None) -> Sequence[asyncpg.Record]:
    """Return `tenant_id`, `slug`, `position` and `hash` of ledger heads, and `last`, the position of the last event."""
    return list(await connection.fetch(_HEADS, tenant_id))


async def read_redactions(connection: Connection, tenant_id: int) -> Sequence[asyncpg.Record]:
    """Return `stream_kind`, `stream_id` and `data` of the redaction events."""
    return list(await connection.fetch(_REDACTIONS, tenant_id))


async def read_hash_links(connection: Connection, tenant_id: int, after: int, until: int) -> list[Link]:
    """Return the rows to verify, after position `after` and up to `until`."""
    # The driver's rows unpack like tuples. Converting them would take a third more time.
    return cast("list[Link]", await connection.fetch(_LINKS, tenant_id, after, until))


async def read_hash(connection: Connection, tenant_id: int, position: int) -> bytes | None:
    """Return the hash of the event at `position`, `None` if there is none."""
    return cast("bytes | None", await connection.fetchval(_HASH_AT, tenant_id, position))


async def position_at(connection: Connection, tenant_id: int, moment: datetime) -> int | None:
    """Return the last position recorded at `moment` or before, `None` for a moment in the database's future."""
    return cast(
        "int | None",
        await connection.fetchval(
            "SELECT CASE WHEN $2 <= clock_timestamp() THEN position_at($1, $2) END", tenant_id, moment
        ),
    )


async def _entries(connection: Connection, tenant_id: int, rows: Sequence[asyncpg.Record]) -> list[Entry]:
    metas = [decode_meta(row["meta"]) for row in rows]
    token_ids = {meta.actor.id for meta in metas if meta.actor.kind == "token"}
    tokens = {}
    if token_ids:
        found = await connection.fetch(_TOKENS, tenant_id, list(token_ids))
        tokens = {row["token_id"]: row for row in found}
    return [_entry(row, meta, tokens) for row, meta in zip(rows, metas, strict=True)]


def _entry(row: asyncpg.Record, meta: Meta, tokens: Mapping[int | None, asyncpg.Record]) -> Entry:
    try:
        data = readable(row["data"], row["erasable"])
    except msgspec.MsgspecError as error:
        raise UnknownEvent(f"event {row['position']} cannot be decoded: {error}") from error
    actor = EntryActor(meta.actor.kind, meta.actor.id)
    if meta.actor.kind == "token" and (token := tokens.get(meta.actor.id)) is not None:
        actor = EntryActor(actor.kind, actor.id, token["prefix"], token["name"])
    return Entry(
        position=row["position"],
        stream_kind=row["stream_kind"],
        stream_id=row["stream_id"],
        version=row["version"],
        type=row["type"],
        schema_version=row["schema_version"],
        data=data,
        actor=actor,
        request_id=meta.request_id,
        occurred_at=row["occurred_at"],
        recorded_at=row["recorded_at"],
        hash=row["hash"].hex(),
        previous_hash=row["previous_hash"].hex(),
    )

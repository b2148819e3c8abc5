"""The ledger as auditors read it: entries with their hashes, where it ends, and the rows that prove it."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import asyncpg
import msgspec

from opsentry.events.codec import Meta, UnknownEvent, decode_meta, readable
from opsentry.events.hash_chain import Link
from opsentry.infrastructure.postgres import Connection, fetch_one

# Events with the previous hash of each. LIMIT makes PostgreSQL look up each previous event by its key.
_ENTRIES = """
SELECT e.*, coalesce(p.hash, decode(repeat('00', 32), 'hex')) AS previous_hash
FROM (SELECT * FROM events WHERE {where} ORDER BY {order} LIMIT $3) AS e
LEFT JOIN LATERAL (SELECT hash FROM events WHERE tenant_id = e.tenant_id AND position = e.position - 1 LIMIT 1)
AS p ON true
ORDER BY e.{order}
"""

# The ledger after a position, of one type or of any; not further than $4, so that a rare type is looked for in steps.
_LEDGER = _ENTRIES.format(
    where="tenant_id = $1 AND position > $2 AND position <= $4 AND ($5::text IS NULL OR type = $5)", order="position"
)

# One stream after a position.
_STREAM = _ENTRIES.format(
    where="tenant_id = $1 AND stream_kind = $4 AND stream_id = $5 AND version > version_at($1, $4, $5, $2)",
    order="version",
)

_HEAD = "SELECT position, hash, recorded_at FROM ledger_heads WHERE tenant_id = $1"

# Where all ledgers end, or that of one tenant: by the head, and by the events.
_HEADS = """
SELECT h.tenant_id, t.slug, h.position, h.hash, coalesce(e.position, 0) AS last
FROM ledger_heads h JOIN tenants t USING (tenant_id)
LEFT JOIN LATERAL (SELECT position FROM events WHERE tenant_id = h.tenant_id ORDER BY position DESC LIMIT 1) AS
e ON true
WHERE $1::bigint IS NULL OR h.tenant_id = $1 ORDER BY h.tenant_id
"""

# The records of what was erased.
_REDACTIONS = "SELECT stream_kind, stream_id, data FROM events WHERE tenant_id = $1 AND type LIKE '%.redacted'"

_MOMENT = "CASE WHEN isfinite({0}) THEN (extract(epoch FROM {0}) * 1000000)::bigint END AS {0}"

# Rows as they are verified, in the order of `Link`.
_LINKS = (
    "SELECT tenant_id, position, stream_kind, stream_id, version, type, schema_version,"
    f" {_MOMENT.format('occurred_at')},"
    f" {_MOMENT.format('recorded_at')}, data, meta, erasable, salt, erasable_digest, hash"
    " FROM events WHERE tenant_id = $1 AND position > $2 AND position <= $3 ORDER BY position"
)

# Which tokens the actors of entries are.
_TOKENS = "SELECT token_id, prefix, name FROM api_tokens WHERE tenant_id = $1 AND token_id = ANY($2)"

_HASH_AT = "SELECT hash FROM events WHERE tenant_id = $1 AND position = $2"

# How far the ledger is searched for one page of a type.
WINDOW = 50_000


class EntryActor(msgspec.Struct, frozen=True, omit_defaults=True):
    """EntryActor did it: the kind of actor, and a token's id, public prefix and name."""

    kind: str
    id: int | None = None
    prefix: str | None = None
    name: str | None = None


class Entry(msgspec.Struct, frozen=True):
    """An event as an auditor sees it. `data` has facts and erasable together; erased erasable read `[redacted]`."""

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
    """The end of a ledger. Stored elsewhere as an anchor, it proves that nothing was truncated. `position` 0: empty."""

    position: int
    hash: str
    recorded_at: datetime | None


async def read_ledger_page(
    connection: Connection, tenant_id: int, *, after: int, limit: int, type_: str | None
) -> tuple[list[Entry], int | None]:
    """Return at most `limit` entries of the tenant after `after`, and from where to go on (`None`: that was all).

    A page may be short, or empty, and yet not the last: a type is looked for among 50,000 events at a time.
    """
    last: int = (await fetch_one(connection, _HEAD, tenant_id))["position"]
    reached = min(after + WINDOW, last)
    rows = await connection.fetch(_LEDGER, tenant_id, after, limit, reached, type_)
    entries = await _entries(connection, tenant_id, rows)
    if len(entries) == limit:
        reached = entries[-1].position
    return entries, reached if reached < last else None


async def read_stream_page(
    connection: Connection, tenant_id: int, kind: str, stream_id: int, *, after: int, limit: int
) -> tuple[list[Entry], int | None]:
    """Return at most `limit` entries of one stream after position `after`, and from where to go on."""
    rows = await connection.fetch(_STREAM, tenant_id, after, limit + 1, kind, stream_id)
    entries = await _entries(connection, tenant_id, rows[:limit])
    return entries, entries[-1].position if len(rows) > limit else None


async def read_ledger_head(connection: Connection, tenant_id: int) -> LedgerHead:
    """Return where the tenant's ledger ends."""
    row = await fetch_one(connection, _HEAD, tenant_id)
    return LedgerHead(row["position"], row["hash"].hex(), row["recorded_at"] if row["position"] else None)


async def read_ledger_heads(connection: Connection, tenant_id: int | None = None) -> Sequence[asyncpg.Record]:
    """Return `tenant_id`, `slug`, `position`, `hash` and the `last` event of where ledgers end, one tenant's or all."""
    return list(await connection.fetch(_HEADS, tenant_id))


async def read_redactions(connection: Connection, tenant_id: int) -> Sequence[asyncpg.Record]:
    """Return `stream_kind`, `stream_id` and `data` of the events that erased erasable."""
    return list(await connection.fetch(_REDACTIONS, tenant_id))


async def read_hash_links(connection: Connection, tenant_id: int, after: int, until: int) -> list[Link]:
    """Return the rows after position `after`, up to `until`, as they are verified."""
    # Rows of the driver can be taken apart like the tuples they stand for, and making those would cost a third more.
    return cast("list[Link]", await connection.fetch(_LINKS, tenant_id, after, until))


async def read_hash(connection: Connection, tenant_id: int, position: int) -> bytes | None:
    """Return the hash of the event `position`, `None` if there is none."""
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
        raise UnknownEvent(f"event {row['position']} is not what was written: {error}") from error
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

"""The event log: the only module whose SQL writes `events`, `ledger_heads`, `reservations` and `idempotency_keys`."""

import os
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias

import asyncpg
import msgspec

from opsentry.domain.events import AnyEvent
from opsentry.events.codec import (
    Meta,
    RecordedEvent,
    UnknownEvent,
    decode,
    decode_meta,
    encode,
    encode_meta,
    to_microseconds,
)
from opsentry.infrastructure.postgres import Connection

# Appends a batch of commands in one round trip; see the function's comment in the migrations.
_APPEND = "SELECT * FROM append_events($1, $2)"

_COLUMNS = (
    "tenant_id, position, stream_kind, stream_id, version, type, schema_version, occurred_at,"
    " recorded_at, data, meta, erasable"
)

# One stream, the versions after one and up to another.
_STREAM = (
    f"SELECT {_COLUMNS} FROM events WHERE tenant_id = $1 AND stream_kind = $2 AND stream_id = $3"
    " AND version > $4 AND version <= $5 ORDER BY version"
)

# Some streams as they were at a position.
_STREAMS_UNTIL = (
    f"SELECT {_COLUMNS} FROM events WHERE tenant_id = $1 AND stream_kind = $2 AND stream_id ="
    " ANY($3) AND position <= $4"
    " ORDER BY stream_id, version"
)

# A tenant's ledger after a position: since position is dense and in commit order, this never skips an event.
_AFTER = f"SELECT {_COLUMNS} FROM events WHERE tenant_id = $1 AND position > $2 ORDER BY position LIMIT $3"

# The same up to another position, of some kinds of streams.
_BETWEEN = (
    f"SELECT {_COLUMNS} FROM events WHERE tenant_id = $1 AND position > $2 AND position <= $3 AND stream_kind = ANY($4)"
    " ORDER BY position"
)

# Streams of a kind one after the other, as they were at a position.
_BY_STREAM = (
    f"SELECT {_COLUMNS} FROM events WHERE tenant_id = $1 AND stream_kind = $2 AND stream_id > $3 AND position <= $4"
    " ORDER BY stream_id, version LIMIT $5"
)

# Where the ledger ends.
_HEAD = "SELECT position FROM ledger_heads WHERE tenant_id = $1"

# The command that used an idempotency key.
_KEY = "SELECT fingerprint, stream_id, version, position FROM idempotency_keys WHERE tenant_id = $1 AND key = $2"

# Keys of all tenants that were kept long enough, some at a time so that no lock is held for long.
_PRUNE = """
DELETE FROM idempotency_keys WHERE (tenant_id, key) IN (
    SELECT tenant_id, key FROM idempotency_keys WHERE recorded_at < clock_timestamp() - $1 * interval '1 second'
    ORDER BY recorded_at LIMIT $2)
"""

# Which stream holds each name.
_CLAIMS = "SELECT name, stream_id FROM reservations WHERE tenant_id = $1 AND name = ANY($2)"


class NewEvent(msgspec.Struct, frozen=True):
    """An event to append. Without `occurred_at` it occurs when it is recorded."""

    event: AnyEvent
    meta: Meta
    occurred_at: datetime | None = None


class IdempotencyKey(msgspec.Struct, frozen=True):
    """An idempotency key: the digest of caller and key, and the fingerprint of the request.

    Both are SHA-256 digests.
    """

    digest: bytes
    fingerprint: bytes


class Append(msgspec.Struct, frozen=True, kw_only=True):
    """A command to the log: append these events to one stream, all or none.

    Attributes:
        stream_id: 0 asks for a new id.
        expected_version: The version that the stream must have; 0: it must not exist.
        events: May be empty where there is a key, so that a command that changed nothing is not one that does later.
        key: Appends once, however often it is sent.
        claim: A name that no other stream of the tenant may hold, taken together with the append.
    """

    tenant_id: int
    kind: str
    stream_id: int
    expected_version: int
    events: Sequence[NewEvent]
    reservation: str | None = None
    key: IdempotencyKey | None = None


class Appended(msgspec.Struct, frozen=True):
    """The events are durable. `version` and `position` are the last one's, `recorded_at` is the first one's."""

    stream_id: int
    version: int
    position: int
    recorded_at: datetime

    def record(self, command: Append) -> list[RecordedEvent]:
        """Return the command's events as they stand in the log."""
        count = len(command.events)
        recorded = []
        for i, new in enumerate(command.events):
            moment = self.recorded_at + timedelta(microseconds=i)
            recorded.append(
                RecordedEvent(
                    tenant_id=command.tenant_id,
                    position=self.position - count + 1 + i,
                    kind=command.kind,
                    stream_id=self.stream_id,
                    version=self.version - count + 1 + i,
                    event=new.event,
                    occurred_at=moment if new.occurred_at is None else new.occurred_at,
                    recorded_at=moment,
                    meta=new.meta,
                )
            )
        return recorded


class Replayed(msgspec.Struct, frozen=True):
    """Nothing was appended: the same command was, under the same key. `version` and `position` are from then."""

    stream_id: int
    version: int
    position: int


class KeyReused(msgspec.Struct, frozen=True):
    """Nothing was appended: the key stands for another command."""


class VersionConflict(msgspec.Struct, frozen=True):
    """Nothing was appended: the stream has another version than was expected."""

    actual_version: int


class Reserved(msgspec.Struct, frozen=True):
    """Nothing was appended: the name belongs to the stream `stream_id`."""

    stream_id: int


class HeadBusy(msgspec.Struct, frozen=True):
    """Nothing was appended: another appender holds the tenant's head."""


class UnknownTenant(msgspec.Struct, frozen=True):
    """Nothing was appended: there is no such tenant."""


Outcome: TypeAlias = Appended | Replayed | KeyReused | VersionConflict | Reserved | HeadBusy | UnknownTenant


async def append_events(connection: Connection, commands: Sequence[Append], *, wait: bool) -> list[Outcome]:
    """Append `commands`, sorted by tenant, in one round trip; return each one's own outcome.

    Outside of a transaction the batch is committed when this returns. With `wait`, a head that another appender
    holds is waited for (at most the second that the function's own lock_timeout allows); without, its commands are
    answered `HeadBusy`. Only a batch of a single tenant may wait: two waiting batches could wait for each other.
    """
    rows = await connection.fetch(_APPEND, [_command(command) for command in commands], wait)
    return [_outcome(*row) for row in rows]


def _command(command: Append) -> tuple[Any, ...]:
    key = command.key
    return (
        command.tenant_id,
        command.kind,
        command.stream_id,
        command.expected_version,
        [_event(new) for new in command.events],
        command.reservation,
        None if key is None else key.digest,
        None if key is None else key.fingerprint,
    )


def _event(new: NewEvent) -> tuple[Any, ...]:
    type_, schema_version, data, erasable = encode(new.event)
    salt = None if erasable is None else os.urandom(16)
    occurred_at = None if new.occurred_at is None else to_microseconds(new.occurred_at)
    return type_, schema_version, occurred_at, data, encode_meta(new.meta), erasable, salt


def _outcome(word: str, stream_id: int, version: int, position: int, recorded_at: datetime) -> Outcome:
    match word:
        case "appended":
            return Appended(stream_id, version, position, recorded_at)
        case "replayed":
            return Replayed(stream_id, version, position)
        case "key_reused":
            return KeyReused()
        case "conflict":
            return VersionConflict(version)
        case "reserved":
            return Reserved(stream_id)
        case "busy":
            return HeadBusy()
        case _:
            return UnknownTenant()


async def read_stream(
    connection: Connection, tenant_id: int, kind: str, stream_id: int, after: int = 0, until: int = 2**31 - 1
) -> list[RecordedEvent]:
    """Return the events of one stream with versions above `after`, up to `until`; empty if there is no such stream."""
    return [recorded(row) for row in await connection.fetch(_STREAM, tenant_id, kind, stream_id, after, until)]


async def read_streams(
    connection: Connection, tenant_id: int, kind: str, stream_ids: Iterable[int], position: int
) -> list[RecordedEvent]:
    """Return the events of some streams as they were at position `position`, stream by stream."""
    rows = await connection.fetch(_STREAMS_UNTIL, tenant_id, kind, list(stream_ids), position)
    return [recorded(row) for row in rows]


async def read_after(connection: Connection, tenant_id: int, position: int, limit: int) -> list[RecordedEvent]:
    """Return at most `limit` events of the tenant after position `position`, in order."""
    return [recorded(row) for row in await connection.fetch(_AFTER, tenant_id, position, limit)]


async def read_between(
    connection: Connection, tenant_id: int, after: int, until: int, kinds: Iterable[str]
) -> list[RecordedEvent]:
    """Return the tenant's events of these stream kinds after position `after`, up to `until`, in order."""
    return [recorded(row) for row in await connection.fetch(_BETWEEN, tenant_id, after, until, list(kinds))]


async def read_by_stream(
    connection: Connection, tenant_id: int, kind: str, until: int, size: int
) -> AsyncIterator[dict[int, list[RecordedEvent]]]:
    """Yield all streams of a kind as they were at position `until`, by id in its order, some whole ones at a time.

    Each chunk has about `size` events, or one longer stream.

    Raises:
        UnknownEvent: See `recorded`.
    """
    after, limit = 0, size
    while True:
        rows = await connection.fetch(_BY_STREAM, tenant_id, kind, after, until, limit)
        whole = len(rows) < limit
        if not whole:
            # The last stream may go on: it is left to the next turn, unless there is nothing else in this one.
            last = rows[-1]["stream_id"]
            if rows[0]["stream_id"] == last:
                limit *= 4
                continue
            rows = [row for row in rows if row["stream_id"] != last]
        streams: dict[int, list[RecordedEvent]] = {}
        for row in rows:
            streams.setdefault(row["stream_id"], []).append(recorded(row))
        if streams:
            yield streams
        if whole:
            return
        after, limit = rows[-1]["stream_id"], size


async def read_head_position(connection: Connection, tenant_id: int) -> int:
    """Return the position of the tenant's last event, 0 if it has none."""
    position = await connection.fetchval(_HEAD, tenant_id)
    return 0 if position is None else int(position)


async def find_idempotency_key(
    connection: Connection, tenant_id: int, key: IdempotencyKey
) -> Replayed | KeyReused | None:
    """Return what was done under `key`, `None` if nothing was."""
    row = await connection.fetchrow(_KEY, tenant_id, key.digest)
    if row is None:
        return None
    if row["fingerprint"] != key.fingerprint:
        return KeyReused()
    return Replayed(row["stream_id"], row["version"], row["position"])


async def prune_idempotency_keys(connection: Connection, kept_seconds: int, limit: int) -> int:
    """Forget at most `limit` keys, of all tenants, that are older than `kept_seconds`; return how many."""
    done: str = await connection.execute(_PRUNE, kept_seconds, limit)
    return int(done.rsplit(maxsplit=1)[-1])


async def find_reservations(connection: Connection, tenant_id: int, names: Sequence[str]) -> dict[str, int]:
    """Return the stream ids that hold those of `names` that are taken."""
    return {row["name"]: row["stream_id"] for row in await connection.fetch(_CLAIMS, tenant_id, names)}


def recorded(row: asyncpg.Record) -> RecordedEvent:
    """Return the event that a row of `events` holds.

    Raises:
        UnknownEvent: This version of Opsentry cannot read it.
    """
    # By place: an event is read more often than anything else here, and looking up names takes a third of that.
    tenant_id, position, kind, stream_id, version, type_, schema, occurred_at, recorded_at, data, meta, erasable = row
    try:
        return RecordedEvent(
            tenant_id,
            position,
            kind,
            stream_id,
            version,
            decode(type_, schema, data, erasable),
            occurred_at,
            recorded_at,
            decode_meta(meta),
        )
    except UnknownEvent as error:
        error.kind, error.position = kind, position
        raise

"""Damage ledgers behind the back of the application, in every way that verification must find."""

from contextlib import asynccontextmanager

from opsentry.domain import incident
from opsentry.events.store import Append, NewEvent
from opsentry.events.verification import verify
from tests.conftest import META
from tests.events.ledger import ODD_TEXTS, append, note, rows

COLUMNS = (
    "tenant_id", "position", "stream_kind", "stream_id", "version", "type", "schema_version", "occurred_at",
    "recorded_at",
    "data", "meta", "erasable", "salt", "erasable_digest", "hash",
)  # fmt: skip


async def filled(connection, tenant_id, size, *, start=1):
    """Append `size` events in streams of three, some of them without erasable text."""
    for number in range(start, start + size // 3 + 1):
        count = min(3, size - 3 * (number - start))
        if count > 0:
            await append(
                connection,
                Append(
                    tenant_id=tenant_id,
                    kind="incident",
                    stream_id=number,
                    expected_version=0,
                    events=[
                        note(ODD_TEXTS[(number + i) % len(ODD_TEXTS)] or "-")
                        if i < 2
                        else NewEvent(incident.IncidentReopened(), META)
                        for i in range(count)
                    ],
                ),
            )


async def damage_of(settings, tenant_id, *anchors):
    (verdict,) = await verify(settings.database_url, tenant_id=tenant_id, anchors=anchors, jobs=1)
    return verdict.violation


@asynccontextmanager
async def undone(connection, tenant_id):
    """A connection of a superuser without triggers, in a transaction that is rolled back at the end."""
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("ALTER TABLE events DISABLE TRIGGER ALL")
    kept = await rows(connection, tenant_id)
    head = await connection.fetchrow("SELECT position, hash FROM ledger_heads WHERE tenant_id = $1", tenant_id)
    try:
        yield
    finally:
        await connection.execute("DELETE FROM events WHERE tenant_id = $1", tenant_id)
        await restore(connection, kept)
        await connection.execute(
            "UPDATE ledger_heads SET position = $2, hash = $3 WHERE tenant_id = $1", tenant_id, *head
        )


async def restore(connection, kept):
    values = ", ".join(f"${i}" for i in range(1, len(COLUMNS) + 1))
    await connection.executemany(f"INSERT INTO events VALUES ({values})", [tuple(row) for row in kept])


async def unconstrained(connection):
    await connection.execute("ALTER TABLE events DROP CONSTRAINT events_pkey")
    await connection.execute("ALTER TABLE events DROP CONSTRAINT events_stream_version")
    await connection.execute("CREATE INDEX ON events (tenant_id, position)")
    await connection.execute("CREATE INDEX ON events (tenant_id, stream_kind, stream_id, version)")


# Each function damages a ledger of `last` events at position n, and returns the first faulty position.


async def change(connection, tenant_id, n, last, chance):
    column = chance.choice([c for c in COLUMNS if c not in {"tenant_id", "position"}])
    new = {
        "stream_kind": "'service'",
        "stream_id": "stream_id + 1000",
        "version": "version + 1000",
        "type": "type || 'x'",
        "schema_version": "schema_version + 1",
        "occurred_at": "occurred_at + interval '1 microsecond'",
        "recorded_at": "recorded_at - interval '1 microsecond'",
        "data": "data || ' '",
        "meta": "meta || ' '",
        "erasable": "coalesce(erasable, '') || 'x'",
        "salt": "set_byte(coalesce(salt, '\\x00'), 0, (get_byte(coalesce(salt, '\\x00'), 0) + 1) % 256)",
        "erasable_digest": "sha256(coalesce(erasable_digest, ''))",
        "hash": "set_byte(hash, 5, (get_byte(hash, 5) + 1) % 256)",
    }[column]
    await connection.execute(f"UPDATE events SET {column} = {new} WHERE tenant_id = $1 AND position = $2", tenant_id, n)
    return n


async def rewrite(connection, tenant_id, n, last, chance):
    sql = (
        "UPDATE events SET data = replace(data, 'monitoring', 'identified') || ' ' WHERE tenant_id = $1"
        " AND position = $2"
    )
    await connection.execute(sql, tenant_id, n)
    return n


async def take_out(connection, tenant_id, n, last, chance):
    await connection.execute("DELETE FROM events WHERE tenant_id = $1 AND position = $2", tenant_id, n)
    return n


async def take_out_and_number_anew(connection, tenant_id, n, last, chance):
    await take_out(connection, tenant_id, n, last, chance)
    for position in range(n + 1, last + 1):
        await connection.execute(
            "UPDATE events SET position = position - 1 WHERE tenant_id = $1 AND position = $2", tenant_id, position
        )
    await connection.execute("UPDATE ledger_heads SET position = position - 1 WHERE tenant_id = $1", tenant_id)
    return n


async def swap(connection, tenant_id, n, last, chance):
    other = chance.choice([position for position in range(1, last + 1) if position != n])
    sql = (
        "UPDATE events SET position = CASE position WHEN $2 THEN $3 ELSE $2 END WHERE tenant_id = $1"
        " AND position IN ($2, $3)"
    )
    await connection.execute(sql, tenant_id, n, other)
    return min(n, other)


async def cut_off(connection, tenant_id, n, last, chance):
    await connection.execute("DELETE FROM events WHERE tenant_id = $1 AND position >= $2", tenant_id, n)
    return n


async def double(connection, tenant_id, n, last, chance):
    await connection.execute(
        "INSERT INTO events SELECT * FROM events WHERE tenant_id = $1 AND position = $2", tenant_id, n
    )
    return n


async def put_in_a_copy(connection, tenant_id, n, last, chance):
    await connection.execute(
        "UPDATE events SET position = position + 1 WHERE tenant_id = $1 AND position > $2", tenant_id, n
    )
    copied = ", ".join("position + 1" if column == "position" else column for column in COLUMNS)
    await connection.execute(
        f"INSERT INTO events ({', '.join(COLUMNS)}) SELECT {copied} FROM events WHERE tenant_id = $1 AND position = $2",
        tenant_id,
        n,
    )
    await connection.execute("UPDATE ledger_heads SET position = position + 1 WHERE tenant_id = $1", tenant_id)
    return n + 1


async def erase_unrecorded(connection, tenant_id, n, last, chance):
    position = await connection.fetchval(
        "UPDATE events SET erasable = NULL, salt = NULL WHERE tenant_id = $1 AND position = ("
        " SELECT min(position) FROM events WHERE tenant_id = $1 AND position >= $2 AND erasable IS NOT"
        " NULL) RETURNING position",
        tenant_id,
        n,
    )
    return int(position)


KINDS = {
    change: {"changed"},
    rewrite: {"changed"},
    take_out: {"missing", "truncated"},
    # Only the head still shows that there was a last event.
    take_out_and_number_anew: {"missing", "changed"},
    swap: {"reordered"},
    cut_off: {"truncated"},
    double: {"duplicated"},
    put_in_a_copy: {"duplicated"},
    erase_unrecorded: {"erased"},
}

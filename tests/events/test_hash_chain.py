from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from opsentry.domain import incident
from opsentry.domain.incident import IncidentReopened, OpenIncident
from opsentry.events import store
from opsentry.events.hash_chain import GENESIS
from tests import commands
from tests.events.ledger import META, ODD_TEXTS, append, first_broken, notes, rows

TAMPERING = [
    "stream_kind = 'service'",
    "stream_id = stream_id + 1000",
    "version = version + 1000",
    "type = 'incident.reopened'",
    "schema_version = schema_version + 1",
    "occurred_at = occurred_at + interval '1 microsecond'",
    "recorded_at = recorded_at - interval '1 microsecond'",
    "data = data || ' '",
    "meta = replace(meta, 'operator', 'token')",
    "erasable = replace(erasable, 'm', 'M')",
    "erasable = NULL",
    "salt = NULL",
    "salt = ''",
    "erasable_digest = sha256('')",
    "erasable_digest = NULL",
    "hash = sha256('')",
    "erasable_digest = NULL, erasable = NULL",
    "erasable_digest = NULL, erasable = NULL, salt = NULL",
    "erasable = '{}', salt = '', erasable_digest = sha256('{}')",
]


@asynccontextmanager
async def undone(connection: Any) -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    yield
    await transaction.rollback()


@pytest.fixture
async def ledger(owner, tenant):
    for number, text in enumerate(ODD_TEXTS, 1):
        await append(owner, notes(tenant, text, "message", stream=number))
    await append(owner, notes(tenant, "message", stream=1, expected=2))
    return tenant


async def test_the_chain_recomputes_from_the_stored_columns(owner, ledger):
    stored = await rows(owner, ledger)
    assert len(stored) == 11
    assert first_broken(stored) is None
    assert (await owner.fetchval("SELECT hash FROM ledger_heads WHERE tenant_id = $1", ledger)) == stored[-1]["hash"]


async def test_the_chain_can_be_checked_in_parts(owner, ledger):
    stored = await rows(owner, ledger)
    for cut in range(1, 11):
        assert first_broken(stored[cut:], stored[cut - 1]["hash"], cut) is None
        assert first_broken(stored[cut:], GENESIS, cut) == cut + 1
        assert first_broken(stored[cut:], stored[cut - 1]["hash"], cut + 1) == cut + 1


async def test_two_tenants_with_the_same_text_have_different_chains(owner, tenant, neighbour):
    for owned in (tenant, neighbour):
        await append(owner, notes(owned, "same", stream=1))
    (one,), (other,) = await rows(owner, tenant), await rows(owner, neighbour)
    assert one["hash"] != other["hash"]
    assert one["erasable_digest"] != other["erasable_digest"]
    assert first_broken([{**other, "tenant_id": tenant}]) == 1


async def test_a_column_changed_by_a_superuser_is_found_at_its_event(owner, ledger):
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    for change in TAMPERING:
        for position in (1, 4, 11):
            async with undone(owner):
                done = await owner.execute(
                    f"UPDATE events SET {change} WHERE tenant_id = $1 AND position = $2", ledger, position
                )
                assert done == "UPDATE 1"
                assert first_broken(await rows(owner, ledger)) == position, change
    assert first_broken(await rows(owner, ledger)) is None


async def test_a_missing_event_is_found_at_its_position(owner, ledger):
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute("DELETE FROM events WHERE tenant_id = $1 AND position = 4", ledger)
    assert first_broken(await rows(owner, ledger)) == 4


async def test_renumbering_does_not_hide_a_missing_event(owner, ledger):
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute("DELETE FROM events WHERE tenant_id = $1 AND position = 4", ledger)
    for position in range(5, 12):
        await owner.execute(
            "UPDATE events SET position = position - 1 WHERE tenant_id = $1 AND position = $2", ledger, position
        )
    assert first_broken(await rows(owner, ledger)) == 4


async def test_reordered_events_are_found(owner, ledger):
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    for old, new in ((4, 99), (5, 4), (99, 5)):
        await owner.execute("UPDATE events SET position = $3 WHERE tenant_id = $1 AND position = $2", ledger, old, new)
    assert first_broken(await rows(owner, ledger)) == 4


async def test_an_inserted_event_is_found(owner, ledger):
    stored = [dict(row) for row in await rows(owner, ledger)]
    forged = stored[3] | {"position": 5, "version": 9, "recorded_at": stored[3]["recorded_at"] + timedelta(seconds=1)}
    moved = [row | {"position": row["position"] + 1} for row in stored[4:]]
    assert first_broken([*stored[:4], forged, *moved]) == 5


REFUSED = [
    "UPDATE events SET data = '{}'",
    "UPDATE events SET data = data",
    "UPDATE events SET erasable = NULL",
    "UPDATE events SET salt = NULL",
    "UPDATE events SET erasable = 'other', salt = NULL",
    "UPDATE events SET erasable = NULL, salt = NULL, erasable_digest = NULL",
    "UPDATE events SET erasable = NULL, salt = NULL, data = '{}'",
    "UPDATE events SET erasable = NULL, salt = NULL, position = position + 100",
    "DELETE FROM events",
    "TRUNCATE events",
]


@pytest.mark.parametrize("replica", [False, True])
async def test_the_database_refuses_changes_even_to_its_owner(owner, ledger, replica):
    before = await rows(owner, ledger)
    if replica:
        await owner.execute("SET session_replication_role = replica")
    for statement in REFUSED:
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            await owner.execute(statement)
    assert await rows(owner, ledger) == before


async def test_text_and_salt_can_be_erased_together_without_breaking_the_chain(owner, ledger):
    before = await rows(owner, ledger)
    for _ in range(2):
        await owner.execute(
            "UPDATE events SET erasable = NULL, salt = NULL WHERE tenant_id = $1 AND position = 4", ledger
        )
    after = await rows(owner, ledger)
    assert [dict(row) for row in after] == [
        dict(row) | ({"erasable": None, "salt": None} if row["position"] == 4 else {}) for row in before
    ]
    assert first_broken(after) is None
    (erased,) = await store.read_after(owner, ledger, 3, 1)
    assert erased.event.message == "[redacted]"  # type: ignore[union-attr]


async def test_an_event_without_erasable_text_cannot_be_changed(owner, tenant):
    command = store.Append(
        tenant_id=tenant,
        kind="incident",
        stream_id=1,
        expected_version=0,
        events=[store.NewEvent(IncidentReopened(), META)],
    )
    await append(owner, command)
    (row,) = await rows(owner, tenant)
    assert (row["erasable"], row["salt"], row["erasable_digest"]) == (None, None, None)
    assert first_broken([row]) is None
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
        await owner.execute("UPDATE events SET erasable = NULL, salt = NULL")


async def test_erased_text_cannot_come_back(owner, ledger):
    (row,) = [row for row in await rows(owner, ledger) if row["position"] == 4]
    await owner.execute("UPDATE events SET erasable = NULL, salt = NULL WHERE tenant_id = $1 AND position = 4", ledger)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
        await owner.execute(
            "UPDATE events SET erasable = $2, salt = $3 WHERE tenant_id = $1 AND position = 4",
            ledger,
            row["erasable"],
            row["salt"],
        )


async def test_the_application_may_only_read_and_append(app_connection, ledger):
    before = await rows(app_connection, ledger)
    for statement in (
        *REFUSED,
        (
            'INSERT INTO events SELECT (jsonb_populate_record(e, \'{"position": 99, "version": 99}\')).* FROM events e'
            " LIMIT 1"
        ),
        "UPDATE ledger_heads SET position = 0",
        "DELETE FROM ledger_heads",
        "INSERT INTO reservations VALUES (1, 'name', 'incident', 1)",
        "DELETE FROM reservations",
        "ALTER TABLE events DISABLE TRIGGER events_append_only",
        "SET session_replication_role = replica",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match=r"permission denied|must be owner"):
            await app_connection.execute(statement)
    assert await rows(app_connection, ledger) == before
    assert isinstance(await append(app_connection, notes(ledger, "more", stream=1, expected=3)), store.Appended)


FIRST_MICROSECONDS = [datetime(1, 1, 1, 0, 0, 0, microsecond, tzinfo=UTC) for microsecond in (0, 1)]
LAST_MICROSECONDS = [
    datetime(year, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC) for year in (1, 1600, 1969, 2026, 2255, 2300, 9999)
]


@pytest.mark.parametrize("happened", [*FIRST_MICROSECONDS, *LAST_MICROSECONDS])
async def test_an_event_of_any_year_is_stored_to_the_microsecond_and_verifies(parts, acme, happened):
    opened = OpenIncident(title="Long ago or far off")
    created = await commands.create(parts, incident.DECIDER, acme.id, opened, META, occurred_at=happened)
    async with parts.database.connection() as connection:
        (event,) = await store.read_stream(connection, acme.id, "incident", created.stream_id)
        written = await connection.fetch("SELECT * FROM events WHERE tenant_id = $1 ORDER BY position", acme.id)
    assert event.occurred_at == happened
    assert first_broken(written) is None

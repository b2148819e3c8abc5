from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from opsentry.domain import incident
from opsentry.domain.incident import IncidentReopened, OpenIncident
from opsentry.events import log
from opsentry.events.chain import GENESIS
from tests.events.ledger import META, append, first_broken, notes, rows
from tests.events.log_contract import ODD_TEXTS

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
    "words = replace(words, 'm', 'M')",
    "words = NULL",
    "salt = NULL",
    "salt = ''",
    "words_digest = sha256('')",
    "words_digest = NULL",
    "hash = sha256('')",
    "words_digest = NULL, words = NULL",
    "words_digest = NULL, words = NULL, salt = NULL",
    "words = '{}', salt = '', words_digest = sha256('{}')",
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
    assert (await owner.fetchval("SELECT hash FROM heads WHERE tenant_id = $1", ledger)) == stored[-1]["hash"]


async def test_the_chain_can_be_checked_in_parts(owner, ledger):
    stored = await rows(owner, ledger)
    for cut in range(1, 11):
        assert first_broken(stored[cut:], stored[cut - 1]["hash"], cut) is None
        assert first_broken(stored[cut:], GENESIS, cut) == cut + 1
        assert first_broken(stored[cut:], stored[cut - 1]["hash"], cut + 1) == cut + 1


async def test_two_tenants_with_the_same_words_have_different_chains(owner, tenant, neighbour):
    for owned in (tenant, neighbour):
        await append(owner, notes(owned, "same", stream=1))
    (one,), (other,) = await rows(owner, tenant), await rows(owner, neighbour)
    assert one["hash"] != other["hash"]
    assert one["words_digest"] != other["words_digest"]
    assert first_broken([{**other, "tenant_id": tenant}]) == 1


async def test_a_superuser_who_changes_a_column_is_found_at_that_event(owner, ledger):
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    for change in TAMPERING:
        for seq in (1, 4, 11):
            async with undone(owner):
                done = await owner.execute(f"UPDATE events SET {change} WHERE tenant_id = $1 AND seq = $2", ledger, seq)
                assert done == "UPDATE 1"
                assert first_broken(await rows(owner, ledger)) == seq, change
    assert first_broken(await rows(owner, ledger)) is None


async def test_an_event_taken_out_is_found_where_it_was(owner, ledger):
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute("DELETE FROM events WHERE tenant_id = $1 AND seq = 4", ledger)
    assert first_broken(await rows(owner, ledger)) == 4


async def test_closing_the_gap_after_an_event_was_taken_out_does_not_hide_it(owner, ledger):
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute("DELETE FROM events WHERE tenant_id = $1 AND seq = 4", ledger)
    for seq in range(5, 12):
        await owner.execute("UPDATE events SET seq = seq - 1 WHERE tenant_id = $1 AND seq = $2", ledger, seq)
    assert first_broken(await rows(owner, ledger)) == 4


async def test_events_in_another_order_are_found(owner, ledger):
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    for old, new in ((4, 99), (5, 4), (99, 5)):
        await owner.execute("UPDATE events SET seq = $3 WHERE tenant_id = $1 AND seq = $2", ledger, old, new)
    assert first_broken(await rows(owner, ledger)) == 4


async def test_an_event_put_in_is_found(owner, ledger):
    stored = [dict(row) for row in await rows(owner, ledger)]
    forged = stored[3] | {"seq": 5, "version": 9, "recorded_at": stored[3]["recorded_at"] + timedelta(seconds=1)}
    moved = [row | {"seq": row["seq"] + 1} for row in stored[4:]]
    assert first_broken([*stored[:4], forged, *moved]) == 5


REFUSED = [
    "UPDATE events SET data = '{}'",
    "UPDATE events SET data = data",
    "UPDATE events SET words = NULL",
    "UPDATE events SET salt = NULL",
    "UPDATE events SET words = 'other', salt = NULL",
    "UPDATE events SET words = NULL, salt = NULL, words_digest = NULL",
    "UPDATE events SET words = NULL, salt = NULL, data = '{}'",
    "UPDATE events SET words = NULL, salt = NULL, seq = seq + 100",
    "DELETE FROM events",
    "TRUNCATE events",
]


@pytest.mark.parametrize("replica", [False, True])
async def test_the_database_refuses_even_its_owner(owner, ledger, replica):
    before = await rows(owner, ledger)
    if replica:
        await owner.execute("SET session_replication_role = replica")
    for statement in REFUSED:
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            await owner.execute(statement)
    assert await rows(owner, ledger) == before


async def test_words_and_their_salt_can_be_erased_together_and_the_chain_stays_whole(owner, ledger):
    before = await rows(owner, ledger)
    for _ in range(2):
        await owner.execute("UPDATE events SET words = NULL, salt = NULL WHERE tenant_id = $1 AND seq = 4", ledger)
    after = await rows(owner, ledger)
    assert [dict(row) for row in after] == [
        dict(row) | ({"words": None, "salt": None} if row["seq"] == 4 else {}) for row in before
    ]
    assert first_broken(after) is None
    (erased,) = await log.read_after(owner, ledger, 3, 1)
    assert erased.event.message == "[redacted]"  # type: ignore[union-attr]


async def test_an_event_without_words_has_nothing_to_erase(owner, tenant):
    command = log.Append(
        tenant_id=tenant,
        kind="incident",
        stream_id=1,
        expected_version=0,
        events=[log.NewEvent(IncidentReopened(), META)],
    )
    await append(owner, command)
    (row,) = await rows(owner, tenant)
    assert (row["words"], row["salt"], row["words_digest"]) == (None, None, None)
    assert first_broken([row]) is None
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
        await owner.execute("UPDATE events SET words = NULL, salt = NULL")


async def test_words_that_were_erased_cannot_come_back(owner, ledger):
    (row,) = [row for row in await rows(owner, ledger) if row["seq"] == 4]
    await owner.execute("UPDATE events SET words = NULL, salt = NULL WHERE tenant_id = $1 AND seq = 4", ledger)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
        await owner.execute(
            "UPDATE events SET words = $2, salt = $3 WHERE tenant_id = $1 AND seq = 4",
            ledger,
            row["words"],
            row["salt"],
        )


async def test_the_application_may_only_read_and_append(app_connection, ledger):
    before = await rows(app_connection, ledger)
    for statement in (
        *REFUSED,
        'INSERT INTO events SELECT (jsonb_populate_record(e, \'{"seq": 99, "version": 99}\')).* FROM events e LIMIT 1',
        "UPDATE heads SET seq = 0",
        "DELETE FROM heads",
        "INSERT INTO claims VALUES (1, 'name', 'incident', 1)",
        "DELETE FROM claims",
        "ALTER TABLE events DISABLE TRIGGER events_append_only",
        "SET session_replication_role = replica",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match=r"permission denied|must be owner"):
            await app_connection.execute(statement)
    assert await rows(app_connection, ledger) == before
    assert isinstance(await append(app_connection, notes(ledger, "more", stream=1, expected=3)), log.Appended)


@pytest.mark.parametrize("year", [1, 1600, 1969, 2026, 2255, 2300, 9999])
async def test_an_event_of_any_year_is_stored_to_the_microsecond_and_verifies(parts, acme, year):
    happened = datetime(year, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    opened = OpenIncident(title="Long ago or far off")
    created = await parts.commands.create(incident.DECIDER, acme.id, opened, META, occurred_at=happened)
    async with parts.database.connection() as connection:
        (event,) = await log.read_stream(connection, acme.id, "incident", created.stream_id)
        written = await connection.fetch("SELECT * FROM events WHERE tenant_id = $1 ORDER BY seq", acme.id)
    assert event.occurred_at == happened
    assert first_broken(written) is None

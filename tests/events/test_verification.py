import asyncio
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from opsentry.events import audit
from opsentry.events.verdict import Anchor
from opsentry.events.verification import verify
from tests.conftest import make_tenant
from tests.events.ledger import append, notes, rows
from tests.events.tampering import (
    COLUMNS,
    KINDS,
    damage_of,
    erase_unrecorded,
    filled,
    take_out_and_number_anew,
    unconstrained,
    undone,
)


async def tamper(settings, owner, parts, ledgers):
    """Damage ledgers of random sizes at random positions in every way; count the violations that were found."""
    chance = random.Random(ledgers)
    await unconstrained(owner)
    found: Counter[str] = Counter()
    for number in range(ledgers):
        tenant_id = (await make_tenant(parts, f"tenant-{number}")).id
        await filled(owner, tenant_id, chance.randrange(3, 40), start=1 + 20 * number)
        last = len(await rows(owner, tenant_id))
        assert await damage_of(settings, tenant_id) is None, "a false alarm"
        harm = list(KINDS)[number % len(KINDS)]
        # The last events may have no erasable text, and renumbering leaves no trace of a missing last event.
        n = chance.randrange(1, last + (harm not in {take_out_and_number_anew, erase_unrecorded}))
        async with undone(owner, tenant_id):
            expected = await harm(owner, tenant_id, n, last, chance)
            violation = await damage_of(settings, tenant_id)
        assert violation is not None, (harm.__name__, n, last)
        assert violation.position == expected, (harm.__name__, n, last, violation)
        assert violation.kind in KINDS[harm], (harm.__name__, n, last, violation)
        found[harm.__name__.replace("_", " ")] += 1
    verdicts = await verify(settings.database_url, jobs=2)
    assert [verdict.violation for verdict in verdicts] == [None] * ledgers
    return found


async def test_verify_finds_tampering_at_the_right_event(settings, owner, parts):
    assert (await tamper(settings, owner, parts, 36)).total() == 36


@pytest.mark.faults
async def test_two_hundred_tampered_ledgers(settings, owner, parts):
    found = await tamper(settings, owner, parts, 200)
    table = Table("violation", "ledgers", "found at the right event", title="200 tampered ledgers, 200 clean ones")
    for name, count in found.items():
        table.add_row(name, str(count), str(count))
    table.add_row("none", "200", "0 false alarms")
    Console().print(table)
    assert found.total() == 200


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_verify_finds_any_changed_byte_of_any_column(settings, owner, sound, loose, data):
    stored = await rows(owner, sound)
    row = data.draw(st.sampled_from(stored))
    column = data.draw(st.sampled_from([c for c in COLUMNS if row[c] is not None]))
    value = row[column]
    if isinstance(value, bytes):
        place, flip = data.draw(st.integers(0, len(value) - 1)), data.draw(st.integers(1, 255))
        new = bytes(byte ^ (flip if i == place else 0) for i, byte in enumerate(value))
    elif isinstance(value, str):
        place = data.draw(st.integers(0, len(value) - 1))
        other = data.draw(st.characters(exclude_categories=["Cs"], exclude_characters=["\x00", value[place]]))
        new = value[:place] + other + value[place + 1 :]
    elif isinstance(value, int):
        new = value ^ (1 << data.draw(st.integers(0, 14 if column == "schema_version" else 30)))
    else:
        new = value + data.draw(st.sampled_from([1, -1, 1000])) * (
            type(stored[1]["recorded_at"] - value)(microseconds=1)
        )
    where = (new, row["position"]) if column == "tenant_id" else (sound, new) if column == "position" else None
    async with undone(owner, sound):
        # An event can only move to a free position.
        if where is not None:
            await owner.execute("DELETE FROM events WHERE tenant_id = $1 AND position = $2", *where)
        await owner.execute(
            f"UPDATE events SET {column} = $1 WHERE tenant_id = $2 AND position = $3", new, sound, row["position"]
        )
        violation = await damage_of(settings, sound)
        if column == "tenant_id":
            await owner.execute("DELETE FROM events WHERE tenant_id = $1", new)
    assert violation is not None, (column, row["position"])
    assert violation.position == (min(row["position"], new) if column == "position" else row["position"]), (
        column,
        new,
        violation,
    )


# ------------------------------------------------------------------------------------------------ anchors and ends


async def pinned(connection, tenant_id):
    head = await audit.read_ledger_head(connection, tenant_id)
    return Anchor(head.position, head.hash)


async def test_an_anchor_holds_while_the_ledger_grows(settings, owner, sound):
    anchor = await pinned(owner, sound)
    await filled(owner, sound, 5, start=500)
    assert await damage_of(settings, sound, anchor, Anchor(0, "00" * 32)) is None


async def test_only_an_anchor_finds_a_ledger_truncated_with_its_head(settings, owner, sound):
    anchor = await pinned(owner, sound)
    async with undone(owner, sound):
        await owner.execute("DELETE FROM events WHERE tenant_id = $1 AND position > 10", sound)
        await owner.execute(
            "UPDATE ledger_heads SET position = 10, hash = (SELECT hash FROM events e WHERE e.tenant_id ="
            " $1 AND position = 10)"
            " WHERE tenant_id = $1",
            sound,
        )
        assert await damage_of(settings, sound) is None
        violation = await damage_of(settings, sound, anchor)
        assert (violation.position, violation.kind) == (11, "truncated")


async def test_an_anchor_finds_a_ledger_that_was_rewritten_as_a_whole(settings, owner, parts):
    one, other = (await make_tenant(parts, "one")).id, (await make_tenant(parts, "other")).id
    await filled(owner, one, 9)
    anchor = await pinned(owner, one)
    assert await damage_of(settings, one, anchor) is None
    violation = await damage_of(settings, one, Anchor(anchor.position, (await pinned(owner, other)).hash))
    assert (violation.position, violation.kind) == (anchor.position, "changed")


async def test_verify_finds_events_beyond_the_head_and_a_false_head(settings, owner, sound):
    last = (await pinned(owner, sound)).position
    async with undone(owner, sound):
        await owner.execute("UPDATE ledger_heads SET position = position - 1 WHERE tenant_id = $1", sound)
        violation = await damage_of(settings, sound)
        assert (violation.position, violation.kind) == (last, "inserted")
    async with undone(owner, sound):
        await owner.execute("UPDATE ledger_heads SET hash = sha256('') WHERE tenant_id = $1", sound)
        violation = await damage_of(settings, sound)
        assert (violation.position, violation.kind) == (last, "changed")


async def test_an_empty_ledger_verifies(settings, owner):
    tenant_id = await owner.fetchval("INSERT INTO tenants (slug, name) VALUES ('empty', 'Empty') RETURNING tenant_id")
    (verdict,) = await verify(settings.database_url, tenant_id=tenant_id)
    assert (verdict.events, verdict.last, verdict.violation) == (0, 0, None)


async def test_several_processes_verify_a_long_ledger(settings, owner, parts, monkeypatch):
    monkeypatch.setattr("opsentry.events.verification.SEGMENT_EVENTS", 7)
    for slug in ("one", "other"):
        await filled(owner, (await make_tenant(parts, slug)).id, 30)
    totals: list[int] = []
    done: list[int] = []
    verdicts = await verify(settings.database_url, jobs=2, begin=totals.append, advance=done.append)
    assert [verdict.violation for verdict in verdicts] == [None, None]
    assert totals == [sum(done)] == [sum(verdict.events for verdict in verdicts)]
    harmed = verdicts[1].tenant_id
    async with undone(owner, harmed):
        await owner.execute(
            "UPDATE events SET data = data || ' ' WHERE tenant_id = $1 AND position IN (16, 23)", harmed
        )
        first, second = await verify(settings.database_url, jobs=2)
    assert first.violation is None
    assert second.violation is not None
    assert second.violation.position == 16


async def test_appends_during_a_verification_do_not_disturb_it(settings, owner, sound):
    async def more():
        for number in range(900, 930):
            await append(owner, notes(sound, "more", stream=number))

    verdicts, _ = await asyncio.gather(verify(settings.database_url, jobs=1), more())
    assert [verdict.violation for verdict in verdicts] == [None]


# ------------------------------------------------------------------------------------------------ erasure


async def test_a_recorded_redaction_is_no_violation(settings, erased):
    (verdict,) = await verify(settings.database_url, tenant_id=erased)
    assert (verdict.violation, verdict.redacted) == (None, 1)


async def test_verify_finds_an_unrecorded_erasure(settings, owner, erased):
    await owner.execute(
        "UPDATE events SET erasable = NULL, salt = NULL WHERE tenant_id = $1 AND erasable LIKE '%M%'", erased
    )
    violation = await damage_of(settings, erased)
    assert violation.kind == "erased"

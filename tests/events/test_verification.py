import asyncio
import gzip
import json
import random
import re
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident, PostUpdate, RedactIncident
from opsentry.domain.redaction import RedactionPlan
from opsentry.events import audit, export
from opsentry.events.export_verification import BadExport, verify_export
from opsentry.events.store import Append, NewEvent
from opsentry.events.verdict import Anchor
from opsentry.events.verification import verify
from tests import commands
from tests.conftest import META, make_tenant
from tests.events.ledger import append, note, notes, rows
from tests.events.store_contract import ODD_TEXTS

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "reference" / "ledger-format.md"
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


@pytest.fixture
async def tenant_id(owner, parts):
    return (await make_tenant(parts, "first")).id


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


@pytest.fixture
async def sound(owner, tenant_id):
    await filled(owner, tenant_id, 20)
    return tenant_id


@pytest.fixture
async def loose(owner):
    await unconstrained(owner)


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


@pytest.fixture
async def erased(parts, tenant_id):
    """A ledger with a recorded redaction of an incident's first message."""
    made = await commands.create(parts, incident.DECIDER, tenant_id, OpenIncident(title="T", description="D"), META)
    await commands.change(parts, incident.DECIDER, tenant_id, made.stream_id, PostUpdate(message="M"), META)
    plan = RedactionPlan(versions=(2,), fields=(), restated={})
    await commands.change(
        parts,
        incident.DECIDER,
        tenant_id,
        made.stream_id,
        RedactIncident(plan=plan, reason="Asked to"),
        META,
    )
    return tenant_id


async def test_a_recorded_redaction_is_no_violation(settings, erased):
    (verdict,) = await verify(settings.database_url, tenant_id=erased)
    assert (verdict.violation, verdict.redacted) == (None, 1)


async def test_verify_finds_an_unrecorded_erasure(settings, owner, erased):
    await owner.execute(
        "UPDATE events SET erasable = NULL, salt = NULL WHERE tenant_id = $1 AND erasable LIKE '%M%'", erased
    )
    violation = await damage_of(settings, erased)
    assert violation.kind == "erased"


# ------------------------------------------------------------------------------------------------ exports


@pytest.fixture
async def exported(owner, sound, tmp_path):
    file = tmp_path / "ledger.ndjson"
    file.write_bytes(await export.chunk(owner, sound, 0, 100))
    return file


async def test_an_export_verifies_without_a_database(owner, sound, exported):
    head = await audit.read_ledger_head(owner, sound)
    verdict = verify_export(exported, anchors=[Anchor(head.position, head.hash)])
    assert (verdict.violation, verdict.events, verdict.last, verdict.hash) == (
        None,
        head.position,
        head.position,
        head.hash,
    )


async def test_compressed_and_partial_exports_verify(exported, tmp_path):
    lines = exported.read_bytes().splitlines(keepends=True)
    packed, part = tmp_path / "packed", tmp_path / "part"
    packed.write_bytes(gzip.compress(exported.read_bytes()))
    part.write_bytes(b"".join(lines[5:9]))
    assert verify_export(packed).violation is None
    verdict = verify_export(part)
    assert (verdict.violation, verdict.first, verdict.last) == (None, 6, 9)


@pytest.mark.parametrize(
    ("edit", "position", "kind"),
    [
        (lambda lines: lines[:3] + lines[4:], 4, "missing"),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], 4, "reordered"),
        (lambda lines: [*lines[:4], lines[3], *lines[4:]], 4, "duplicated"),
        (lambda lines: [*lines[:9], lines[2], *lines[9:]], 3, "duplicated"),
        (lambda lines: lines[:12], 13, "truncated"),
        (lambda lines: [*lines[:3], b"{}\n", *lines[4:]], 4, "changed"),
        (lambda lines: [*lines[:3], lines[3][:40]], 4, "changed"),
    ],
)
async def test_verify_finds_a_damaged_export(owner, sound, exported, edit, position, kind):
    head = await audit.read_ledger_head(owner, sound)
    exported.write_bytes(b"".join(edit(exported.read_bytes().splitlines(keepends=True))))
    violation = verify_export(exported, anchors=[Anchor(head.position, head.hash)]).violation
    assert violation is not None
    assert (violation.position, violation.kind) == (position, kind)


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_changed_octet_of_an_export_is_found_or_changes_no_value(exported, tmp_path, data):
    octets = exported.read_bytes()
    place, flip = data.draw(st.integers(0, len(octets) - 1)), data.draw(st.integers(1, 255))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(octets[:place] + bytes([octets[place] ^ flip]) + octets[place + 1 :])
    try:
        same = [json.loads(line) for line in damaged.read_bytes().splitlines()] == [
            json.loads(line) for line in octets.splitlines()
        ]
    except ValueError:
        same = False
    try:
        violation = verify_export(damaged).violation
    except BadExport:
        return
    line = octets[:place].count(b"\n") + 1
    hexadecimal = octets[place : place + 1].lower() == damaged.read_bytes()[place : place + 1].lower()
    # The violation names the line's place, or the event that a changed line duplicates.
    named = violation is not None and (
        abs(violation.position - line) <= 1
        or (violation.kind == "duplicated" and violation.position == _claimed(damaged, line))
    )
    assert same or hexadecimal or named, (place, flip, violation)


def _claimed(file, line):
    return json.loads(file.read_bytes().splitlines()[line - 1])["position"]


async def test_an_export_needs_the_record_of_each_erasure(owner, erased, tmp_path):
    file = tmp_path / "ledger.ndjson"
    file.write_bytes(await export.chunk(owner, erased, 0, 100))
    assert verify_export(file).violation is None
    lines = file.read_bytes().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"erasable":"{' in line)
    forged = json.loads(lines[at]) | {"erasable": None, "salt": None}
    lines[at] = json.dumps(forged).encode() + b"\n"
    file.write_bytes(b"".join(lines))
    violation = verify_export(file).violation
    assert violation is not None
    assert (violation.position, violation.kind) == (at + 1, "erased")


@pytest.mark.parametrize("octets", [b"", b"\n", b"no export\n", b'{"position":1}\n', b"\x1f\x8b\x08broken"])
async def test_a_file_that_is_no_export_is_refused_with_a_reason(tmp_path, octets):
    file = tmp_path / "file"
    file.write_bytes(octets)
    with pytest.raises(BadExport, match="file: "):
        verify_export(file)


async def test_the_verifier_in_the_documentation_agrees(erased, owner, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    file = tmp_path / "ledger.ndjson"

    def verifies(*lines):
        file.write_bytes(b"".join(lines))
        ran = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=False)
        return ran.stdout.strip() if ran.returncode == 0 else None

    lines = (await export.chunk(owner, erased, 0, 100)).splitlines(keepends=True)
    head = await audit.read_ledger_head(owner, erased)
    assert verifies(*lines) == f"{head.position}:{head.hash}"
    assert verifies(*lines[:3], *lines[4:]) is None
    assert verifies(*lines[:3], lines[3].replace(b"investigating", b"identified"), *lines[4:]) is None
    assert verifies(*lines[:2], lines[2].replace(b"degraded", b"critical"), *lines[3:]) is None
    assert verifies(*lines[:-1]) is None  # the export has the erasure but not its record

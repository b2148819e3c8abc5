import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from opsentry.events import audit, export
from opsentry.events.export_verification import BadExport, verify_export
from opsentry.events.verdict import Anchor

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "reference" / "ledger-format.md"


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

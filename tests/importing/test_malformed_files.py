import json

import pytest

from opsentry.importing.statuspage import MalformedExport, read_export
from tests.importing.pages import component, incident, ledger, page, small_page, update, window, write
from tests.system.processes import environment, opsentry

DUPLICATE = [update("u1", "investigating", 1), update("u1", "investigating", 2)]

# Each wrong file, and the beginning of its error message.
WRONG = {
    "not JSON": (b"{", "not well-formed JSON"),
    "empty": (b"", "not well-formed JSON"),
    "not UTF-8": (b'{"page": {"id": "\xff"}}', "not well-formed JSON"),
    "half a character": (b'{"page": {"id": "\\ud800"}}', "not well-formed JSON"),
    "nested without end": (b"[" * 100_000, "the file: Expected `object`, got `array`"),
    "something after it": (json.dumps(page()).encode() + b"x", "not well-formed JSON"),
    "another shape": ([], "the file: Expected `object`, got `array`"),
    "no page": ({"components": [], "incidents": []}, "the file: Object missing required field `page`"),
    "wrong type": (page(incidents=[incident("i", name=5)]), "incidents[0].name: Expected `str`, got `int`"),
    "wrong type inside": (
        page(incidents=[incident("i"), incident("j", update("u", "resolved", 1) | {"body": []})]),
        "incidents[1].incident_updates[0].body: Expected `str | null`, got `array`",
    ),
    "missing field": (page(components=[{"id": "c"}]), "components[0]: Object missing required field `name`"),
    "unknown status": (
        page(incidents=[incident("i", update("u", "solved", 1), status="resolved")]),
        "incidents[0].incident_updates[0].status: Invalid enum value 'solved'",
    ),
    "unknown impact": (
        page(incidents=[incident("i", impact="huge")]),
        "incidents[0].impact: Invalid enum value 'huge'",
    ),
    "unknown status of a window": (
        page(scheduled_maintenances=[window("m", status="resolved")]),
        "scheduled_maintenances[0].status: Invalid enum value 'resolved'",
    ),
    "naive time": (
        page(incidents=[incident("i", created_at="2024-05-01T12:00:00")]),
        "incidents[0].created_at: Expected `datetime` with a timezone component",
    ),
    "no time": (page(incidents=[incident("i", started_at="noon")]), "incidents[0].started_at: Invalid RFC3339"),
    "time outside of the calendar": (
        page(incidents=[incident("i", update("u", "resolved", 1) | {"display_at": "0001-01-01T00:00:00+14:00"})]),
        "incidents[0].incident_updates[0].display_at: is out of range",
    ),
    "incident twice": (page(incidents=[incident("i"), incident("i")]), "incidents[1].id: i is a duplicate"),
    "component twice": (
        page(components=[component("c", "A"), component("c", "B")]),
        "components[1].id: c is a duplicate",
    ),
    "window twice": (
        page(scheduled_maintenances=[window("m"), window("m")]),
        "scheduled_maintenances[1].id: m is a duplicate",
    ),
    "entry twice": (
        page(incidents=[incident("i", *DUPLICATE)]),
        "incidents[0].incident_updates[1].id: u1 is a duplicate",
    ),
    "end before start": (
        page(scheduled_maintenances=[window("m"), window("n", scheduled_until="2024-05-01T12:59:00Z")]),
        "scheduled_maintenances[1].scheduled_until: must be after scheduled_for",
    ),
    "end at start": (
        page(scheduled_maintenances=[window("m", scheduled_until="2024-05-01T13:00:00Z")]),
        "scheduled_maintenances[0].scheduled_until: must be after scheduled_for",
    ),
    "NUL in a name": (
        page(incidents=[incident("i", name="a\0b")]),
        "incidents[0].name: must not contain the character",
    ),
    "NUL in a text": (
        page(incidents=[incident("i", update("u", "resolved", 1, "a\0b"))]),
        "incidents[0].incident_updates[0].body: must not contain the character NUL",
    ),
    "NUL in a description": (
        page(components=[component("c", "A", description="\0")]),
        "components[0].description: must not contain the character NUL",
    ),
    "NUL in an id": (page(incidents=[incident("i\0")]), "incidents[0].id: must not contain the character NUL"),
    "NUL in the page's id": (page(page={"id": "\0"}), "page.id: must not contain the character NUL"),
    "blank name": (page(components=[component("c", " ")]), "components[0].name: must not be blank"),
    "endless name": (page(incidents=[incident("i", name="x" * 301)]), "incidents[0].name: must have at most 300"),
    "endless text": (
        page(incidents=[incident("i", update("u", "resolved", 1, "x" * 50_001))]),
        "incidents[0].incident_updates[0].body: must have at most 50000 characters",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_error_names_the_wrong_place(name, tmp_path):
    content, says = WRONG[name]
    with pytest.raises(MalformedExport) as refused:
        read_export(write(tmp_path, content))
    assert str(refused.value).startswith(says)


def test_a_valid_file_is_read_whole(tmp_path):
    export = read_export(write(tmp_path, small_page()))
    assert (len(export.components), len(export.incidents), len(export.scheduled_maintenances)) == (3, 2, 1)


def test_unknown_fields_are_ignored(tmp_path):
    content = small_page() | {"later": 1}
    content["incidents"][0]["shortlink"] = "https://example.com"
    assert len(read_export(write(tmp_path, content)).incidents) == 2


async def test_one_invalid_record_refuses_the_whole_file(settings, acme, owner, tmp_path):
    content = small_page()
    content["scheduled_maintenances"][-1]["incident_updates"][0]["body"] = "\0"
    before = await ledger(owner, acme.id)
    ran = await opsentry(
        environment(settings), "import", "statuspage", str(write(tmp_path, content)), "--tenant", "acme"
    )
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err == (
        "Error: scheduled_maintenances[0].incident_updates[0].body: must not contain the character NUL\n"
    )
    assert await ledger(owner, acme.id) == before


async def test_a_missing_file_is_wrong_use(settings, tmp_path):
    ran = await opsentry(environment(settings), "import", "statuspage", str(tmp_path / "none"), "--tenant", "acme")
    assert ran.code == 2
    assert "does not exist" in ran.err


async def test_an_unknown_tenant_is_named(settings, acme, tmp_path):
    file = write(tmp_path, small_page())
    ran = await opsentry(environment(settings), "import", "statuspage", str(file), "--tenant", "nobody")
    assert (ran.code, ran.err) == (1, "Error: no tenant has the slug nobody\n")

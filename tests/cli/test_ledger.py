import asyncio
import json
import random
import sys
from asyncio.subprocess import PIPE
from datetime import UTC, datetime

import pytest

from opsentry.domain import incident
from opsentry.domain.incident import ChangeIncident, OpenIncident, PostUpdate, ResolveIncident
from opsentry.events import audit, export
from tests import commands
from tests.conftest import META, make_service, make_tenant
from tests.system.processes import environment, opsentry, running

CANARY = "Jane Doe"


@pytest.fixture
async def story(parts, acme):
    """An incident with a beginning, a middle and an end; and the position after each command."""
    await make_service(parts, acme.id, "api")
    opened = OpenIncident(title="Logins fail", description=f"Found by {CANARY}", severity="major_outage")
    made = await commands.create(parts, incident.DECIDER, acme.id, opened, META)
    positions = [made.position]
    for command in (
        PostUpdate(message="A deploy did it.", status="identified"),
        ChangeIncident(severity="degraded", title="Logins are slow"),
        ResolveIncident(root_cause="A missing index."),
    ):
        done = await commands.change(parts, incident.DECIDER, acme.id, made.stream_id, command, META)
        positions.append(done.position)
    await parts.projector.catch_up(acme.id, positions[-1])
    return str(made.stream_id), positions


def of_incident(command, number):
    return "ledger", command, "incident", number, "--tenant", "acme"


async def test_history_shows_actors_times_and_changes(run, story):
    number, _ = story
    shown = await run(*of_incident("history", number))
    for text in ("operator", "opened", "Logins fail", "status: investigating → identified", "A deploy did it."):
        assert text in shown
    assert "severity: major_outage → degraded" in shown
    assert "title: Logins fail → Logins are slow" in shown
    assert "root_cause: A missing index." in shown
    entries = json.loads(await run(*of_incident("history", number), "--json"))
    assert [entry["version"] for entry in entries] == list(range(1, len(entries) + 1))
    assert {entry["actor"]["kind"] for entry in entries} == {"operator"}


async def test_history_shows_the_state_as_of_a_position_and_a_time(run, fail, story, owner, acme):
    number, positions = story
    as_of = (*of_incident("history", number), "--as-of")
    state = json.loads(await run(*as_of, str(positions[1]), "--json"))
    assert (state["status"], state["severity"], state["title"]) == ("identified", "major_outage", "Logins fail")
    assert [update["message"] for update in state["updates"]] == [f"Found by {CANARY}", "A deploy did it."]
    at = await owner.fetchval(
        "SELECT recorded_at FROM events WHERE tenant_id = $1 AND position = $2", acme.id, positions[1]
    )
    assert json.loads(await run(*as_of, at.isoformat(), "--json")) == state
    assert "Logins fail" in await run(*as_of, str(positions[1]))
    assert await fail(1, *as_of, "1") == "Error: the incident did not exist at 1"


async def test_history_shows_the_state_at_a_real_world_time(run, fail, parts, acme):
    began, later = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    opened = OpenIncident(title="Recorded later")
    made = await commands.create(parts, incident.DECIDER, acme.id, opened, META, occurred_at=began)
    await commands.change(parts, incident.DECIDER, acme.id, made.stream_id, ResolveIncident(), META, occurred_at=later)
    at = (*of_incident("history", str(made.stream_id)), "--at")
    for moment, status in (("2026-01-01T12:00:00Z", "investigating"), ("2026-01-02T02:00:00+02:00", "resolved")):
        assert json.loads(await run(*at, moment, "--json"))["status"] == status
    assert "did not exist at" in await fail(1, *at, "2025-12-31T00:00:00Z")


async def test_history_shows_the_changes_between_two_moments(run, story):
    number, positions = story
    difference = (*of_incident("history", number), "--diff", str(positions[0]), str(positions[2]))
    found = json.loads(await run(*difference, "--json"))
    assert found["changed"] == {
        "status": {"before": "investigating", "after": "identified"},
        "severity": {"before": "major_outage", "after": "degraded"},
        "title": {"before": "Logins fail", "after": "Logins are slow"},
    }
    assert [update["message"] for update in found["updates"]] == ["A deploy did it."]
    assert "identified" in await run(*difference)


WRONG = [
    (1, "ledger history incident 987654 --tenant acme", "Error: acme has no incident 987654"),
    (2, "ledger history incident N", "Error: Missing option '--tenant'"),
    (
        2,
        "ledger history incident N --tenant acme --as-of yesterday",
        "Error: yesterday: must be a position, or a time such",
    ),
    (2, "ledger history incident N --tenant acme --as-of 999999", "Error: 999999: the ledger ends at position"),
    (2, "ledger history incident N --tenant acme --as-of 2999-01-01T00:00:00Z", "must not be in the future"),
    (2, "ledger history incident N --tenant acme --as-of 1 --diff 1 2", "exclude each other"),
    (1, "ledger history incident N --tenant globex", "Error: globex has no incident"),
    (2, "ledger history incident N --tenant acme --at yesterday", "Error: yesterday: must be a time such as"),
    (2, "ledger history token 1", "Error: Invalid value for '{incident|maintenance|service}'"),
    (2, "ledger redact incident N --tenant acme --reason r --yes", "Error: fields: name at least one field or event"),
    (2, "ledger redact incident N --tenant acme --reason r --field status --yes", "Error: fields: must be one of"),
    (
        2,
        "ledger redact incident N --tenant acme --reason r --event 1 --yes",
        "Error: events: no erasable text is recorded",
    ),
    (2, "ledger redact incident N --tenant acme --reason= --field title --yes", "Error: reason: must not be blank"),
    (2, "ledger verify --anchor 1:aa --tenant acme", "Error: Invalid value for '--anchor': must be a position"),
    (2, f"ledger verify --anchor 1:{'a' * 64}", "Error: --anchor needs --tenant, or --from-file"),
    (1, "ledger verify --tenant nobody", "Error: no tenant has the slug nobody"),
    (2, "ledger verify --from-file /nowhere", "does not exist."),
    (2, "ledger export --tenant acme --resume", "Error: --resume needs --output, without --gzip"),
    (2, "ledger tail --tenant acme --type x", "is not one of"),
]


async def test_wrong_use_names_the_mistake(fail, story, parts):
    await make_tenant(parts, "globex")
    commands = [command.replace("N", story[0]).split() for _, command, _ in WRONG]
    said = await asyncio.gather(*(fail(wrong[0], *command) for wrong, command in zip(WRONG, commands, strict=True)))
    for (_, command, says), line in zip(WRONG, said, strict=True):
        assert says in line, (command, line)


async def test_redact_erases_texts_after_a_confirmation(run, story, owner, settings):
    number, _ = story
    arguments = (*of_incident("redact", number), "--field", "description", "--reason", "she asked")
    asked = await opsentry(environment(settings), *arguments)
    assert asked.code == 1  # standard input is closed, so nobody confirms
    assert f"Erase the texts of incident {number} at " in asked.err
    assert await owner.fetchval("SELECT count(*) FROM events WHERE erasable LIKE $1", f"%{CANARY}%") == 2
    done = json.loads(await run(*arguments, "--yes", "--json"))
    assert len(done["redacted"]) == 2
    for table in ("events", "incidents", "incident_updates"):
        assert await owner.fetchval(f"SELECT count(*) FROM {table} t WHERE t::text LIKE $1", f"%{CANARY}%") == 0
    shown = await run(*of_incident("history", number))
    assert "[redacted]" in shown
    assert "she asked" in shown
    assert CANARY not in shown
    assert "erased before" in await run(*arguments, "--yes")
    (verdict,) = json.loads(await run("ledger", "verify", "--tenant", "acme", "--json"))
    assert (verdict["violation"], verdict["redacted"]) == (None, 2)


async def test_tail_prints_the_last_events_and_follows(run, story, settings, parts, acme):
    lines = (await run("ledger", "tail", "--tenant", "acme", "-n", "2")).splitlines()
    assert len(lines) == 2
    assert "incident.resolved" in lines[1]
    last = [json.loads(line) for line in (await run("ledger", "tail", "--tenant", "acme", "--json")).splitlines()]
    assert [entry["position"] for entry in last] == list(range(1, len(last) + 1))
    one = await run("ledger", "tail", "--tenant", "acme", "-n", "1", "--type", "tenant.created", "--json")
    assert json.loads(one)["position"] == 1
    async with running(environment(settings), "ledger", "tail", "--tenant", "acme", "-n", "1", "-f") as process:
        await process.mentions("incident.resolved")
        await commands.create(parts, incident.DECIDER, acme.id, OpenIncident(title="While you look"), META)
        await process.mentions("While you look")


async def test_a_closed_pipe_prints_no_error(story, settings, parts, acme):
    for number in range(300):
        await commands.create(parts, incident.DECIDER, acme.id, OpenIncident(title=f"{number} {'x' * 290}"), META)
    for command in ("ledger tail --tenant acme -n 1000 --json", "ledger export --tenant acme"):
        process = await asyncio.create_subprocess_shell(
            f"{sys.executable} -m opsentry {command} | head -1", env=environment(settings), stdout=PIPE, stderr=PIPE
        )
        out, err = await process.communicate()
        assert (json.loads(out)["position"], err) == (1, b"")


async def test_an_export_verifies_without_a_database_and_resumes(run, fail, story, owner, acme, tmp_path):
    file, packed = tmp_path / "ledger.ndjson", tmp_path / "ledger.ndjson.gz"
    await run("ledger", "export", "--tenant", "acme", "-o", str(file))
    whole = file.read_bytes()
    assert whole == await export.chunk(owner, acme.id, 0, 100)
    assert (await run("ledger", "export", "--tenant", "acme")).encode() == whole
    assert (
        await run("ledger", "export", "--tenant", "acme", "--from-position", "3", "--to-position", "3")
    ).encode() == (whole.splitlines(keepends=True)[2])
    chance = random.Random(1)
    for _ in range(3):
        file.write_bytes(whole[: chance.randrange(len(whole))])
        await run("ledger", "export", "--tenant", "acme", "-o", str(file), "--resume")
        assert file.read_bytes() == whole
    await run("ledger", "export", "--tenant", "acme", "-o", str(packed), "--gzip")
    head = await audit.read_ledger_head(owner, acme.id)
    anchor = f"{head.position}:{head.hash}"
    for exported in (file, packed):
        (verdict,) = json.loads(
            await run("ledger", "verify", "--from-file", str(exported), "--anchor", anchor, "--json")
        )
        assert (verdict["violation"], verdict["last"], verdict["hash"]) == (None, head.position, head.hash)
    file.write_bytes(whole.replace(b"Logins fail", b"Logins work"))
    (tmp_path / "empty").touch()
    assert "is empty" in await fail(1, "ledger", "verify", "--from-file", str(tmp_path / "empty"))


async def test_verify_names_the_damaged_event_and_exits_with_1(run, story, owner, acme, settings):
    shown = await run("ledger", "verify", "--tenant", "acme")
    assert "intact" in shown
    head = await audit.read_ledger_head(owner, acme.id)
    assert f"acme {head.position}:{head.hash}\n" in shown
    await owner.execute("SET session_replication_role = replica; ALTER TABLE events DISABLE TRIGGER ALL")
    await owner.execute("UPDATE events SET data = data || ' ' WHERE tenant_id = $1 AND position = 4", acme.id)
    ran = await opsentry(environment(settings), "ledger", "verify", "--jobs", "1")
    assert ran.code == 1
    assert "event 4 changed: it is not the recorded event" in ran.out
    assert "Anchors" not in ran.out, "a damaged ledger has no end to rely on"
    ran = await opsentry(environment(settings), "ledger", "verify", "--json")
    assert (ran.code, json.loads(ran.out)[0]["violation"]["position"]) == (1, 4)

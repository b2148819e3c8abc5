"""Rebuilds, catch-ups, pauses and code of two versions interleave without losing events."""

import pytest

from opsentry.bootstrap import projections, working
from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident, PostUpdate, RedactIncident
from opsentry.domain.redaction import HistoryEntry, plan_redaction
from opsentry.events import store
from opsentry.infrastructure.postgres import DatabaseUnavailable
from opsentry.notifications.delivery.management import measure_backlog
from opsentry.projections.engine import management
from opsentry.projections.engine.applier import Applier
from opsentry.projections.engine.projector import Projector
from opsentry.projections.engine.rebuild import Rebuilder
from opsentry.projections.engine.replay import StagingFailed
from opsentry.projections.impact import Impact
from opsentry.projections.incidents import Incidents
from tests import commands
from tests.commands import opened
from tests.conftest import META
from tests.projections.planting import plant
from tests.waiting import until

NAMES = sorted(projection.name for projection in projections())


async def shown(parts, tenant):
    made = await opened(parts, tenant)
    await parts.projector.catch_up(tenant.id, made.position)
    return made


def newer():
    found = Incidents()
    found.version = 2
    return found


async def test_a_rebuild_by_older_code_does_not_count_for_newer_code(parts, acme, globex, app_connection):
    for tenant in (acme, globex):
        await shown(parts, tenant)
    older, ours = Rebuilder(parts.database, [Incidents()]), Rebuilder(parts.database, [newer()])
    await older.request()

    async def release_the_newer_code():
        await management.register(app_connection, [newer()])

    assert await older.rebuild(acme.id, between_chunks=release_the_newer_code) == []
    assert await older.rebuild(globex.id) == []  # the older code listed this tenant before the release
    assert sorted(await ours.pending_tenants(10)) == sorted([acme.id, globex.id])
    assert await ours.rebuild(acme.id) == ["incidents"]


async def test_a_rebuild_that_is_requested_during_another_runs_too(parts, acme, app_connection):
    await shown(parts, acme)
    found = Rebuilder(parts.database, [Incidents()])
    await found.request()

    async def ask_again():
        await app_connection.execute("UPDATE projections SET generation = generation + 1")

    assert await found.rebuild(acme.id, between_chunks=ask_again) == ["incidents"]
    assert list(await found.pending_tenants(10)) == [acme.id]


async def test_rows_that_older_code_changes_settle_before_the_next_rebuild(parts, acme, app_connection):
    made = await shown(parts, acme)
    await management.register(app_connection, projections())
    await management.register(app_connection, [newer()])
    found = Rebuilder(parts.database, [newer()])
    assert await found.rebuild(acme.id) == ["incidents"]
    done = await commands.change(parts, incident.DECIDER, acme.id, made.stream_id, PostUpdate(message="m"), META)
    await parts.projector.catch_up(acme.id, done.position)
    assert await found.pending_tenants(10, settle_seconds=300) == {}
    assert list(await found.pending_tenants(10)) == [acme.id]


async def test_a_catch_up_from_before_a_resume_keeps_the_backlog(parts, acme, app_connection, monkeypatch):
    await shown(parts, acme)
    await management.register(app_connection, projections())
    await management.pause(app_connection, ["outbox"])
    await opened(parts, acme)
    real = Incidents.prepare

    async def while_it_applies(self, connection, tenant_id, events):
        await management.resume(app_connection, ["outbox"])
        return await real(self, connection, tenant_id, events)

    monkeypatch.setattr(Incidents, "prepare", while_it_applies)
    await parts.projector.catch_up(acme.id, 0)
    monkeypatch.undo()
    assert await parts.projector.lagging_tenants() == [acme.id]
    assert (await measure_backlog(app_connection, 10)).unseen_events == 1
    await parts.projector.catch_up(acme.id, 0)
    assert await parts.projector.lagging_tenants() == []
    assert (await measure_backlog(app_connection, 10)).unseen_events == 0


@pytest.mark.parametrize("is_handed_over", [False, True])
async def test_a_rebuild_between_reading_and_writing_keeps_its_rows(parts, acme, owner, monkeypatch, is_handed_over):
    made = await shown(parts, acme)
    await management.register(owner, projections())
    changed = await commands.change(parts, incident.DECIDER, acme.id, made.stream_id, PostUpdate(message="m"), META)
    await parts.projector.catch_up(acme.id, changed.position)
    await owner.execute("UPDATE incidents SET body = replace(body, 'Down', 'Wrong')")
    real = Incidents.prepare
    rebuilt: list[str] = []

    async def before_a_rebuild(self, connection, tenant_id, events):
        rows = await real(self, connection, tenant_id, events)
        if not rebuilt:
            await owner.execute("UPDATE checkpoints SET generation = -1 WHERE projection = 'incidents'")
            rebuilt.extend(await Rebuilder(parts.database, projections()).rebuild(acme.id))
        return rows

    last = await commands.change(parts, incident.DECIDER, acme.id, made.stream_id, PostUpdate(message="n"), META)
    monkeypatch.setattr(Incidents, "prepare", before_a_rebuild)

    async def at_the_change(_connection, _tenant_id):
        return changed.position

    # The rebuild does not see the new event, so it leaves the checkpoint where it is.
    monkeypatch.setattr(store, "read_head_position", at_the_change)
    await parts.projector.catch_up(acme.id, last.position, events=last.history[-1:] if is_handed_over else ())
    assert rebuilt == ["incidents"]
    assert "Down" in await owner.fetchval("SELECT body FROM incidents")
    assert await owner.fetchval("SELECT min(position) FROM checkpoints") == last.position


async def test_a_paused_outbox_is_in_the_backlog(parts, acme, app_connection):
    await shown(parts, acme)
    await management.register(app_connection, projections())
    await management.pause(app_connection, ["outbox"])
    await shown(parts, acme)
    assert await parts.projector.lagging_tenants() == []
    assert (await measure_backlog(app_connection, 10)).unseen_events == 1


async def test_code_without_a_projection_does_not_clear_its_backlog(parts, acme):
    await shown(parts, acme)
    older = Projector(parts.database, [projection for projection in projections() if projection.name != "outbox"])
    made = await opened(parts, acme)
    await older.catch_up(acme.id, made.position)
    assert await parts.projector.lagging_tenants() == [acme.id]
    await parts.projector.catch_up(acme.id, made.position)
    assert await parts.projector.lagging_tenants() == []


async def test_a_catch_up_that_ends_between_two_projections_leaves_the_backlog(parts, acme, owner, monkeypatch):
    await shown(parts, acme)
    await opened(parts, acme)
    made = await opened(parts, acme)
    real_prepare, real_step = Impact.prepare, Applier._step
    failures = iter([ZeroDivisionError("once")])

    async def fail_once(self, connection, tenant_id, events):
        for error in failures:
            raise error
        return await real_prepare(self, connection, tenant_id, events)

    async def cut_off(self, connection, tenant_id, until, *, single):
        # After a failed batch, each step applies one event to one projection. The first step succeeds.
        if single and await owner.fetchval("SELECT max(position) FROM checkpoints") == made.position:
            raise DatabaseUnavailable("killed here")
        return await real_step(self, connection, tenant_id, until, single=single)

    monkeypatch.setattr(Impact, "prepare", fail_once)
    monkeypatch.setattr(Applier, "_step", cut_off)
    with pytest.raises(DatabaseUnavailable):
        await parts.projector.catch_up(acme.id, made.position)
    monkeypatch.undo()
    assert await parts.projector.lagging_tenants() == [acme.id]


async def test_a_starting_worker_retries_halted_projections(parts, acme, owner, app_connection):
    made = await shown(parts, acme)
    await plant(owner, acme.id, made.stream_id, 2, type="incident.exploded")
    found = Rebuilder(parts.database, projections())
    await found.request()
    await found.rebuild(acme.id)
    await parts.projector.catch_up(acme.id, 0)
    assert {row["phase"] for row in await management.list_halted(app_connection)} == {"catch_up", "rebuild"}
    # This is how a release that knows the event would read it.
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute("UPDATE events SET type = 'incident.updated' WHERE type = 'incident.exploded'")
    async with working(parts):
        query = (
            "SELECT NOT EXISTS (SELECT FROM checkpoints c JOIN ledger_heads h USING (tenant_id)"
            " JOIN projections p ON p.name = c.projection WHERE c.position < h.position OR c.generation < p.generation)"
        )
        await until(lambda: app_connection.fetchval(query))
    assert await management.list_halted(app_connection) == []
    assert [await found.verify(projection, acme.id) for projection in projections()] == [None] * len(NAMES)


async def test_a_raised_version_retries_a_failed_rebuild(parts, acme, owner, app_connection):
    made = await shown(parts, acme)
    await plant(owner, acme.id, made.stream_id, 2, type="incident.exploded")
    older = Rebuilder(parts.database, [Incidents()])
    await older.request()
    assert await older.rebuild(acme.id) == []
    assert await older.pending_tenants(10) == {}
    assert await management.register(app_connection, [newer()]) == ["incidents"]
    assert list(await Rebuilder(parts.database, [newer()]).pending_tenants(10)) == [acme.id]


async def test_newer_code_rebuilds_rows_that_halt_older_code(parts, acme, app_connection, monkeypatch):
    made = await shown(parts, acme)
    await management.register(app_connection, projections())
    await management.register(app_connection, [newer()])
    found = Rebuilder(parts.database, [newer()])
    assert await found.rebuild(acme.id) == ["incidents"]

    async def lost(*_):
        raise KeyError("a column of newer rows")

    monkeypatch.setattr(Incidents, "prepare", lost)
    done = await commands.change(parts, incident.DECIDER, acme.id, made.stream_id, PostUpdate(message="m"), META)
    await parts.projector.catch_up(acme.id, done.position)
    monkeypatch.undo()
    assert [row["projection"] for row in await management.list_halted(app_connection)] == ["incidents"]
    assert await found.rebuild(acme.id) == ["incidents"]
    assert await management.list_halted(app_connection) == []


async def test_rows_that_cannot_be_written_fail_the_rebuild(parts, acme, owner, app_connection):
    await shown(parts, acme)
    await owner.execute("ALTER TABLE incidents ADD CONSTRAINT refused CHECK (false) NOT VALID")
    found = Rebuilder(parts.database, projections())
    await found.request()
    with pytest.raises(Exception, match="refused"):
        await found.rebuild(acme.id)
    rows = await management.list_halted(app_connection)
    assert [(row["projection"], row["phase"], row["position"]) for row in rows] == [(n, "rebuild", None) for n in NAMES]
    assert await found.pending_tenants(10) == {}


async def test_a_full_disk_for_staged_rows_is_not_a_lost_database(parts, acme, app_connection, monkeypatch, tmp_path):
    await shown(parts, acme)
    monkeypatch.setattr("opsentry.projections.engine.replay.MAX_ROWS_IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    found = Rebuilder(parts.database, projections())
    await found.request()
    with pytest.raises(StagingFailed, match="nowhere"):
        await found.rebuild(acme.id)
    assert {row["phase"] for row in await management.list_halted(app_connection)} == {"rebuild"}


@pytest.mark.parametrize("in_memory", [0, 10**6])
async def test_text_that_is_redacted_during_a_replay_is_in_no_row(parts, acme, app_connection, monkeypatch, in_memory):
    monkeypatch.setattr("opsentry.projections.engine.replay.MAX_ROWS_IN_MEMORY", in_memory)
    opening = OpenIncident(title="SECRET title", description="SECRET description")
    made = await commands.create(parts, incident.DECIDER, acme.id, opening, META)
    for number in range(120):
        said = PostUpdate(message=f"SECRET {number}" if number % 50 == 0 else f"{number}")
        await commands.change(parts, incident.DECIDER, acme.id, made.stream_id, said, META)
    await parts.projector.catch_up(acme.id, 0)
    found = Rebuilder(parts.database, projections())
    await found.request()
    erased: list[int] = []

    def erase(_, history):
        written = [HistoryEntry(event.version, event.position, event.event) for event in history]
        messages = [event.position for event in history if "SECRET" in getattr(event.event, "message", "")]
        plan = plan_redaction(written, incident.REDACTABLE_FIELDS, ["title", "description"], messages)
        return RedactIncident(plan=plan, reason="asked to")

    async def once():
        if not erased:
            done = await commands.change(parts, incident.DECIDER, acme.id, made.stream_id, erase, META)
            erased.append(done.position)

    assert sorted(await found.rebuild(acme.id, between_chunks=once)) == NAMES
    for table in ("incidents", "incident_updates", "incident_snapshots"):
        assert await app_connection.fetchval(f"SELECT count(*) FROM {table} t WHERE t::text LIKE '%SECRET%'") == 0
    assert [await found.verify(projection, acme.id) for projection in projections()] == [None] * len(NAMES)

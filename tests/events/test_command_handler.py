import asyncio

import pytest

from opsentry.bootstrap import core
from opsentry.domain import incident, service
from opsentry.domain.decider import IllegalTransition, InvalidField
from opsentry.domain.incident import (
    ChangeIncident,
    IncidentOpened,
    IncidentResolved,
    IncidentSeverityChanged,
    IncidentUpdated,
    OpenIncident,
    PostUpdate,
    ResolveIncident,
)
from opsentry.domain.service import RegisterService
from opsentry.events import store
from opsentry.events.command_handler import (
    MAX_ATTEMPTS,
    CommandOptions,
    ConcurrencyConflict,
    NameReserved,
    StreamNotFound,
    UnexpectedVersion,
)
from tests import commands
from tests.events.ledger import META, append, notes, rows

DECIDER = incident.DECIDER


async def opened(parts, tenant, **fields):
    executed = await commands.create(parts, DECIDER, tenant.id, OpenIncident(title="Down", **fields), META)
    return executed.stream_id


async def events(connection, tenant, incident_id):
    return [type(r.event) for r in await store.read_stream(connection, tenant.id, "incident", incident_id)]


async def test_a_stream_begins_with_what_was_decided(parts, acme, app_connection):
    executed = await commands.create(parts, DECIDER, acme.id, OpenIncident(title="Down", description="All of it"), META)
    recorded = await store.read_stream(app_connection, acme.id, "incident", executed.stream_id)
    assert executed.history == recorded
    assert [type(r.event) for r in recorded] == [IncidentOpened, IncidentUpdated]
    assert (executed.version, executed.appended, executed.position) == (2, 2, recorded[-1].position)
    assert executed.state.title == "Down"


async def test_a_command_is_decided_on_the_state_that_the_log_gives(parts, acme, app_connection):
    incident_id = await opened(parts, acme)
    await commands.change(parts, DECIDER, acme.id, incident_id, ResolveIncident(root_cause="DNS"), META)
    with pytest.raises(IllegalTransition):
        await commands.change(parts, DECIDER, acme.id, incident_id, ResolveIncident(), META)
    executed = await commands.change(
        parts, DECIDER, acme.id, incident_id, ChangeIncident(status="investigating", severity="critical"), META
    )
    assert (executed.state.status, executed.state.severity, executed.state.root_cause) == (
        "investigating",
        "critical",
        "DNS",
    )
    assert (executed.version, executed.appended) == (4, 2)
    assert executed.history == await store.read_stream(app_connection, acme.id, "incident", incident_id)


async def test_no_change_appends_nothing(parts, acme, app_connection):
    incident_id = await opened(parts, acme)
    before = await store.read_head_position(app_connection, acme.id)
    executed = await commands.change(parts, DECIDER, acme.id, incident_id, ChangeIncident(title="Down"), META)
    assert (executed.appended, executed.version, executed.position) == (0, 1, before)
    assert await store.read_head_position(app_connection, acme.id) == before


async def test_a_refused_command_appends_nothing(parts, acme, app_connection):
    incident_id = await opened(parts, acme)
    before = await store.read_head_position(app_connection, acme.id)
    with pytest.raises(InvalidField, match="severity"):
        await commands.change(parts, DECIDER, acme.id, incident_id, ChangeIncident(title="New", severity="awful"), META)
    with pytest.raises(InvalidField, match="title"):
        await commands.create(parts, DECIDER, acme.id, OpenIncident(title=" "), META)
    assert await store.read_head_position(app_connection, acme.id) == before


async def test_streams_of_others_do_not_exist(parts, acme, globex, app_connection):
    incident_id = await opened(parts, acme)
    ledger_heads = [await store.read_head_position(app_connection, tenant.id) for tenant in (acme, globex)]
    for tenant_id, kind_decider, stream_id in (
        (globex.id, DECIDER, incident_id),
        (acme.id, DECIDER, incident_id + 1),
        (10**9, DECIDER, incident_id),
    ):
        with pytest.raises(StreamNotFound):
            await commands.change(parts, kind_decider, tenant_id, stream_id, ResolveIncident(), META)
    with pytest.raises(StreamNotFound):
        await commands.change(parts, service.DECIDER, acme.id, incident_id, service.RetireService(), META)
    with pytest.raises(StreamNotFound):
        await commands.create(parts, DECIDER, 10**9, OpenIncident(title="Down"), META)
    assert [await store.read_head_position(app_connection, tenant.id) for tenant in (acme, globex)] == ledger_heads


async def test_a_name_that_is_taken_names_its_holder(parts, acme, globex):
    command = RegisterService(slug="web", name="Web")
    claim = service.slug_reservation("web")
    first = await commands.create(parts, service.DECIDER, acme.id, command, META, reservation=claim)
    with pytest.raises(NameReserved) as raised:
        await commands.create(parts, service.DECIDER, acme.id, command, META, reservation=claim)
    assert raised.value.stream_id == first.stream_id
    await commands.create(parts, service.DECIDER, globex.id, command, META, reservation=claim)


async def test_an_unexpected_version_changes_nothing(parts, acme, app_connection):
    incident_id = await opened(parts, acme)
    change = ChangeIncident(severity="critical")
    for expected in ({2}, set()):
        with pytest.raises(UnexpectedVersion):
            await commands.change(parts, DECIDER, acme.id, incident_id, change, META, expected=expected)
    assert await events(app_connection, acme, incident_id) == [IncidentOpened]
    await commands.change(parts, DECIDER, acme.id, incident_id, change, META, expected={1, 7})
    assert await events(app_connection, acme, incident_id) == [IncidentOpened, IncidentSeverityChanged]


async def test_of_editors_who_expect_one_version_one_succeeds(parts, settings, acme, app_connection):
    incident_id = await opened(parts, acme)
    mine = PostUpdate(message="mine")
    async with core(settings) as other:
        outcomes = await asyncio.gather(
            *(
                commands.change(process, DECIDER, acme.id, incident_id, mine, META, expected={1})
                for process in (parts, other)
                for _ in range(4)
            ),
            return_exceptions=True,
        )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["CommandResult"] + ["UnexpectedVersion"] * 7
    assert await events(app_connection, acme, incident_id) == [IncidentOpened, IncidentUpdated]


async def test_a_check_of_the_events_can_refuse_them(parts, acme, app_connection):
    async def check(decided):
        assert [type(event) for event in decided] == [IncidentSeverityChanged]
        raise InvalidField("severity", "not today")

    incident_id = await opened(parts, acme)
    options = CommandOptions(META, check=check)
    with pytest.raises(InvalidField, match="not today"):
        await parts.application.command_handler.change(
            DECIDER, acme.id, incident_id, ChangeIncident(severity="critical"), options
        )
    assert await events(app_connection, acme, incident_id) == [IncidentOpened]


async def test_editors_in_two_processes_both_succeed(parts, settings, acme, app_connection):
    incident_id = await opened(parts, acme)
    async with core(settings) as other:
        executed = await asyncio.gather(
            *(
                commands.change(process, DECIDER, acme.id, incident_id, PostUpdate(message=f"{name}{i}"), META)
                for name, process in (("a", parts), ("b", other))
                for i in range(8)
            )
        )
    recorded = await store.read_stream(app_connection, acme.id, "incident", incident_id)
    assert sorted(e.version for e in executed) == list(range(2, 18))
    assert {r.event.message for r in recorded[1:]} == {f"{name}{i}" for name in "ab" for i in range(8)}  # type: ignore[union-attr]
    for one in executed:
        assert one.history == recorded[: one.version]


async def test_of_two_who_resolve_at_once_one_hears_that_it_is_done(parts, settings, acme, app_connection):
    incident_id = await opened(parts, acme)
    async with core(settings) as other:
        outcomes = await asyncio.gather(
            *(commands.change(p, DECIDER, acme.id, incident_id, ResolveIncident(), META) for p in (parts, other)),
            return_exceptions=True,
        )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["CommandResult", "IllegalTransition"]
    assert await events(app_connection, acme, incident_id) == [IncidentOpened, IncidentResolved]


async def test_a_change_between_loading_and_appending_is_loaded_and_decided_again(
    parts, acme, app_connection, monkeypatch
):
    incident_id = await opened(parts, acme)
    real = parts.application.command_handler._appender.append
    rivals = iter(["critical", "partial_outage"])

    async def raced(command):
        if rival := next(rivals, None):
            event = IncidentSeverityChanged(severity=rival, previous="?")
            taken = store.Append(
                tenant_id=acme.id,
                kind="incident",
                stream_id=incident_id,
                expected_version=command.expected_version,
                events=[store.NewEvent(event, META)],
            )
            assert isinstance(await append(app_connection, taken), store.Appended)
        return await real(command)

    monkeypatch.setattr(parts.application.command_handler._appender, "append", raced)
    executed = await commands.change(
        parts, DECIDER, acme.id, incident_id, ChangeIncident(severity="major_outage"), META
    )
    assert executed.version == 4
    assert executed.history[-1].event == IncidentSeverityChanged(severity="major_outage", previous="partial_outage")


async def test_a_command_that_loses_every_race_is_refused_in_the_end(parts, acme, app_connection, monkeypatch):
    incident_id = await opened(parts, acme)
    attempts = []

    async def always_late(command):
        attempts.append(command.expected_version)
        await append(app_connection, notes(acme.id, "rival", stream=incident_id, expected=command.expected_version))
        return store.VersionConflict(command.expected_version + 1)

    monkeypatch.setattr(parts.application.command_handler._appender, "append", always_late)
    with pytest.raises(ConcurrencyConflict, match=str(incident_id)):
        await commands.change(parts, DECIDER, acme.id, incident_id, PostUpdate(message="late"), META)
    assert attempts == list(range(1, MAX_ATTEMPTS + 1))
    messages = [row["erasable"] for row in await rows(app_connection, acme.id) if row["type"] == "incident.updated"]
    assert set(messages) == {'{"message":"rival"}'}


async def test_64_commands_for_one_stream_and_64_for_many_all_succeed_at_once(parts, acme, app_connection):
    before = await store.read_head_position(app_connection, acme.id)
    one = await opened(parts, acme)
    on_one = [commands.change(parts, DECIDER, acme.id, one, PostUpdate(message=str(i)), META) for i in range(64)]
    on_many = [commands.create(parts, DECIDER, acme.id, OpenIncident(title=str(i)), META) for i in range(64)]
    executed = await asyncio.gather(*on_one, *on_many)
    assert sorted(e.version for e in executed[:64]) == list(range(2, 66))
    assert len({e.stream_id for e in executed[64:]}) == 64
    assert sorted(e.position for e in executed) == list(range(before + 2, before + 130))
    assert len(await events(app_connection, acme, one)) == 65

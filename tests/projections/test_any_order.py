from typing import Any

import msgspec
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from opsentry.bootstrap import projections
from opsentry.domain import incident, maintenance, service
from opsentry.domain.uptime import LEVELS
from opsentry.projections import incident_view, maintenance_view
from opsentry.projections import incidents as incidents_module
from opsentry.projections import maintenance as maintenance_module
from opsentry.projections.engine.comparison import keyed
from opsentry.projections.engine.projection import by_stream
from tests.projections.histories import DECIDERS, apply, batches, clear, dump, histories

with_a_database = hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


async def undo_after(connection, work):
    transaction = connection.transaction()
    await transaction.start()
    try:
        return await work()
    finally:
        await transaction.rollback()


async def from_scratch(connection, made):
    for projection in projections():
        for history in made:
            await apply(connection, projection, history.events)
    return await dump(connection)


@with_a_database
@given(data=st.data())
async def test_rows_do_not_depend_on_how_the_ledger_is_batched(app_connection, data):
    made = data.draw(histories())
    cuts = [(projection, data.draw(batches(made))) for projection in projections()]

    async def cut_up():
        for projection, cut in cuts:
            for events in cut:
                await apply(app_connection, projection, events)
        return await dump(app_connection)

    expected = await undo_after(app_connection, lambda: from_scratch(app_connection, made))
    assert await undo_after(app_connection, cut_up) == expected


@with_a_database
@given(data=st.data())
async def test_applying_all_events_twice_changes_nothing(app_connection, data):
    made = data.draw(histories())
    first, second = data.draw(batches(made)), data.draw(batches(made))

    async def twice():
        for projection in projections():
            for events in first:
                await apply(app_connection, projection, events)
        before = await dump(app_connection)
        for projection in projections():
            for events in second:
                await apply(app_connection, projection, events)
        return before, await dump(app_connection)

    before, after = await undo_after(app_connection, twice)
    assert after == before


@with_a_database
@given(data=st.data())
async def test_totals_count_the_rows_after_each_batch(app_connection, data):
    cut = data.draw(batches(data.draw(histories())))
    projection = next(projection for projection in projections() if projection.name == "incidents")
    counted = "SELECT tenant_id, status, severity, count(*) FROM incidents GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"

    async def follow():
        for events in cut:
            for _ in range(2):
                await apply(app_connection, projection, events)
                kept = await app_connection.fetch("SELECT * FROM incident_counts ORDER BY 1, 2, 3")
                assert [tuple(row) for row in kept] == [tuple(row) for row in await app_connection.fetch(counted)]

    await undo_after(app_connection, follow)


@with_a_database
@given(data=st.data())
async def test_applying_a_batch_again_changes_no_row_of_a_stream(app_connection, data):
    made = data.draw(histories())
    cut = data.draw(batches(made))
    streams = [projection for projection in projections() if projection.name != "outbox"]

    async def again():
        for projection in streams:
            for events in cut:
                await apply(app_connection, projection, events)
        before = await dump(app_connection)
        for projection in streams:
            for events in data.draw(st.permutations(cut)):
                await apply(app_connection, projection, events)
                assert await dump(app_connection) == before

    await undo_after(app_connection, again)


@with_a_database
@given(data=st.data())
async def test_one_tenants_events_change_no_rows_of_another(app_connection, data):
    first, second = data.draw(histories())

    async def both():
        await from_scratch(app_connection, [first])
        alone = await dump(app_connection)
        await from_scratch(app_connection, [second])
        for projection in projections():
            await clear(app_connection, projection, second.tenant_id)
        return alone, await dump(app_connection)

    alone, after = await undo_after(app_connection, both)
    assert after == alone


@with_a_database
@given(made=histories(tenants=1))
async def test_rows_show_the_state_that_the_decider_gives(app_connection, made):
    (history,) = made

    async def rows():
        await from_scratch(app_connection, made)
        return {
            kind: {row["id"]: row for row in await app_connection.fetch(f"SELECT {kind}_id AS id, * FROM {table}")}
            for kind, table in (("incident", "incidents"), ("maintenance", "maintenance"), ("service", "services"))
        }

    found = await undo_after(app_connection, rows)
    shown = {(kind, stream_id): row for kind, rows in found.items() for stream_id, row in rows.items()}
    assert shown.keys() == {key for key in history.states if key[0] != "subscription"}
    for (kind, stream_id), row in shown.items():
        state = history.states[kind, stream_id]
        body = msgspec.json.decode(row["body"])
        assert row["version"] == history.versions[kind, stream_id]
        for field in set(body) & set(state.__struct_fields__):
            assert body[field] == msgspec.json.decode(msgspec.json.encode(getattr(state, field))), field
        if kind == service.KIND:
            assert row["retired"] == state.retired
        else:
            assert (row["status"], row["visibility"]) == (state.status, state.visibility)
            assert tuple(row["service_ids"]) == state.service_ids
        if kind == maintenance.KIND:
            assert row["transition_due_at"] == state.due_at
            assert (row["reminder_pending_since"] is not None) == (state.status == "scheduled" and not state.reminded)


@with_a_database
@given(data=st.data())
async def test_ongoing_impacts_equal_the_open_incidents_and_active_windows_after_each_batch(app_connection, data):
    (history,) = data.draw(histories(tenants=1))
    impact = next(projection for projection in projections() if projection.name == "impact")
    states: dict[tuple[str, int], Any] = {}

    async def follow():
        for events in data.draw(batches([history])):
            await apply(app_connection, impact, events)
            for recorded in events:
                key = (recorded.kind, recorded.stream_id)
                states[key] = DECIDERS[recorded.kind].evolve(states.get(key), recorded.event)
            lasting = await app_connection.fetch(
                "SELECT stream_kind, stream_id, service_id, level, is_excluded FROM service_impacts"
                " WHERE ended_at = 'infinity'"
            )
            assert sorted(map(tuple, lasting)) == sorted(touched())

    def touched():
        for (kind, stream_id), state in states.items():
            if kind == incident.KIND and state.status != "resolved":
                yield from ((kind, stream_id, s, LEVELS[state.severity], False) for s in state.service_ids)
            if kind == maintenance.KIND and state.status == "active":
                yield from ((kind, stream_id, s, 0, state.exclude_from_sla) for s in state.service_ids)

    await undo_after(app_connection, follow)


@with_a_database
@given(made=histories(tenants=1))
async def test_a_replay_after_a_redaction_gives_the_live_rows(app_connection, made):
    (history,) = made

    async def anew():
        for projection in projections():
            await apply(app_connection, projection, history.erased())
        return await dump(app_connection)

    lived = await undo_after(app_connection, lambda: from_scratch(app_connection, made))
    assert await undo_after(app_connection, anew) == lived


@with_a_database
@given(made=histories(tenants=1))
async def test_the_response_to_a_command_equals_a_read_of_the_row(app_connection, owner, made):
    (history,) = made

    async def compare():
        await from_scratch(app_connection, made)
        links = {
            row["service_id"]: msgspec.Raw(row["link"].encode())
            for row in await app_connection.fetch("SELECT service_id, link FROM services")
        }
        for kind, select, render in (
            ("incident", incidents_module.select_incident, incident_view.render),
            ("maintenance", maintenance_module.select_window, maintenance_view.render),
        ):
            for stream_id in {e.stream_id for e in history.events if e.kind == kind}:
                stream = [e for e in history.erased() if (e.kind, e.stream_id) == (kind, stream_id)]
                row = await select(app_connection, history.tenant_id, stream_id)
                assert row["body"] == render(stream, links, {1: TOKEN_NAME})

    await owner.execute(
        "INSERT INTO tenants (tenant_id, slug, name) OVERRIDING SYSTEM VALUE VALUES (1, 'one', 'One')"
        " ON CONFLICT DO NOTHING"
    )
    await owner.execute(
        "INSERT INTO api_tokens (tenant_id, token_id, prefix, digest, name, scopes)"
        " VALUES (1, 1, 'p', 'd', $1, '{}') ON CONFLICT DO NOTHING",
        TOKEN_NAME,
    )
    await undo_after(app_connection, compare)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_a_replay_equals_the_live_rows(app_connection, data):
    """The law of rebuilds: it holds for any history, batches and order of tenants, with each batch applied twice."""
    made = data.draw(histories())
    lived, again = data.draw(batches(made)), data.draw(batches(made))
    transaction = app_connection.transaction()
    await transaction.start()
    try:
        for projection in projections():
            for events in (*(batch for batch in lived for _ in range(2)), *again):
                await apply(app_connection, projection, events)
            for history in made:
                await assert_replay_equals_live(app_connection, projection, history)
    finally:
        await transaction.rollback()


async def assert_replay_equals_live(connection, projection, history):
    replay = projection.replayer()
    replayed: dict[str, list[tuple[object, ...]]] = {}
    for kind in projection.kinds:
        streams = by_stream(e for e in history.erased() if e.kind == kind)
        for number, stream in sorted(streams.items(), reverse=True):
            for name, rows in replay(kind, {number: stream}).items():
                replayed.setdefault(name, []).extend(rows)
    for table in (t for t in projection.tables if t.of_streams):
        live = await connection.fetch(
            f"SELECT {', '.join(table.columns)} FROM {table.name} WHERE tenant_id = $1", history.tenant_id
        )
        assert dict(map(keyed(table), replayed.get(table.name, ()))) == dict(map(keyed(table), live))


TOKEN_NAME = 'Zoë\'s "CI" \\ / \t\n\r\b\f\x01\x1f\x7f \u2028 🧯 "author":null "services":[]'

"""Events that a command hands to its catch-up are applied once, and only where they follow."""

import asyncio

import pytest

from opsentry.bootstrap import projections
from opsentry.events import store
from opsentry.projections.engine import applier as applier_module
from opsentry.projections.engine import management
from opsentry.projections.engine.applier import Applier
from opsentry.projections.engine.projector import Projector
from tests.commands import opened
from tests.projections.histories import dump
from tests.projections.test_projector import NAMES, positions


@pytest.fixture
def ledger_reads(monkeypatch):
    """The position after which each batch was read from the ledger."""
    reads: list[int] = []
    real = store.read_after

    async def noted(connection, tenant_id, position, limit):
        reads.append(position)
        return await real(connection, tenant_id, position, limit)

    monkeypatch.setattr(store, "read_after", noted)
    return reads


async def test_events_that_a_command_brings_are_not_read(parts, acme, app_connection, ledger_reads):
    first = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, first.position, events=first.history)
    assert ledger_reads == [0]
    second, third = await opened(parts, acme), await opened(parts, acme)
    await asyncio.gather(
        *(parts.projector.catch_up(acme.id, made.position, events=made.history) for made in (third, second))
    )
    assert ledger_reads == [0]
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, third.position)
    assert await parts.projector.lagging_tenants() == []


async def test_events_behind_a_gap_are_read(parts, acme, app_connection, ledger_reads):
    first = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, first.position)
    await opened(parts, acme)
    third = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, third.position, events=third.history)
    assert ledger_reads == [0, first.position]
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, third.position)


async def test_events_that_another_process_has_applied_are_not_applied_again(parts, acme, app_connection, ledger_reads):
    other = Projector(parts.database, projections())
    first = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, first.position)
    second = await opened(parts, acme)
    await other.catch_up(acme.id, second.position)
    before = await dump(app_connection)
    await parts.projector.catch_up(acme.id, second.position, events=second.history)
    assert await dump(app_connection) == before
    assert ledger_reads == [0, first.position]
    third = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, third.position, events=third.history)
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, third.position)


@pytest.mark.parametrize("state", ["paused", "halted"])
async def test_events_that_a_command_brings_pass_no_stopped_projection(parts, acme, app_connection, owner, state):
    await management.register(owner, parts.projector.projections)
    first = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, first.position)
    if state == "paused":
        await management.pause(owner, ["impact"])
    else:
        await owner.execute("UPDATE checkpoints SET halted_at = 1, halt_error = 'x' WHERE projection = 'impact'")
    second = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, second.position, events=second.history)
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, second.position) | {
        "impact": first.position
    }


async def test_events_that_others_have_read_meanwhile_are_not_applied_again(parts, acme, app_connection, monkeypatch):
    monkeypatch.setattr(applier_module, "BATCH_EVENTS", 2)
    first = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, first.position)
    second = await opened(parts, acme)
    last = [await opened(parts, acme) for _ in range(3)][-1]
    real = Applier._following

    def forgotten(self, tenant_id, events):
        found = real(self, tenant_id, events)
        self._known.clear()  # as other tenants' writes do in the end
        return found

    monkeypatch.setattr(Applier, "_following", forgotten)
    running = [parts.projector.catch_up(acme.id, made.position, events=made.history) for made in (second, last)]
    await asyncio.gather(*running)
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, last.position)
    assert await app_connection.fetchval("SELECT count(*) FROM incidents") == 5


async def test_a_caller_who_names_no_position_gets_all_that_the_ledger_has(parts, acme, app_connection):
    first = await opened(parts, acme)
    await parts.projector.catch_up(acme.id, first.position)
    second = await opened(parts, acme)
    last = await opened(parts, acme)
    await asyncio.gather(
        parts.projector.catch_up(acme.id, second.position, events=second.history),
        parts.projector.catch_up(acme.id, 0),
    )
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, last.position)


async def test_a_catch_up_leaves_what_comes_later_to_others(parts, acme, app_connection):
    first = await opened(parts, acme)
    await Projector(parts.database, projections()).catch_up(acme.id, first.position)
    await opened(parts, acme)
    await parts.projector.catch_up(acme.id, first.position)
    assert await positions(app_connection, acme.id) == dict.fromkeys(NAMES, first.position)
    assert await parts.projector.lagging_tenants() == [acme.id]

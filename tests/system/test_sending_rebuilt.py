"""Rebuilds during sending, a raised version and a changed rule repeat no message and report no old event."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_network

import pytest
from rich.console import Console

from opsentry.bootstrap import core, projections, sending
from opsentry.domain import incident
from opsentry.domain.incident import ChangeIncident, IncidentEdited, OpenIncident, ResolveIncident
from opsentry.infrastructure.encryption import generate_key
from opsentry.projections.engine import management
from opsentry.projections.engine.rebuild import Rebuilder
from opsentry.projections.outbox import intents
from opsentry.projections.outbox.projection import Outbox
from tests import commands
from tests.conftest import META, make_tenant
from tests.system.processes import environment, opsentry
from tests.system.receivers import receivers
from tests.system.test_killed_sender import all_sent, tell_all
from tests.waiting import until

SUBSCRIBERS = 5
PAUSE_SECONDS = 0.02
INTENTS = "SELECT count(*) FROM outbox_intents"


async def rebuild_again_and_again(settings, owner, monkeypatch, rounds):  # noqa: PLR0915 - one story
    key = generate_key()
    settings = replace(
        settings, encryption_keys=(key,), webhook_allowed_networks=(ip_network("127.0.0.0/8"),), coalesce_seconds=0
    )
    events_total = 0
    async with core(settings) as parts, receivers() as there, sending(parts):
        tenant = await make_tenant(parts, "acme")
        await tell_all(parts, tenant, SUBSCRIBERS, key, there.url, 0, 0)
        stop = asyncio.Event()

        async def run(command, number=None):
            if number is None:
                done = await commands.create(parts, incident.DECIDER, tenant.id, command, META)
            else:
                done = await commands.change(parts, incident.DECIDER, tenant.id, number, command, META)
            await parts.projector.catch_up(tenant.id, done.position)
            return done.stream_id

        async def declare_and_resolve():
            nonlocal events_total
            while not stop.is_set():
                number = await run(OpenIncident(title="Down"))
                await run(ResolveIncident(), number)
                events_total += 2
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), PAUSE_SECONDS)

        async def quiet():
            await until(lambda: all_sent(owner))
            assert there.count == events_total * SUBSCRIBERS
            assert len({arrival.id for one in there.arrived.values() for arrival in one}) == there.count

        async def rebuild_outbox():
            """Rebuild as a worker does whose code has another version of the outbox."""
            async with parts.database.connection(10) as connection:
                assert await management.register(connection, projections()) == ["outbox"]
            rebuilder = Rebuilder(parts.database, projections())
            for tenant_id in await rebuilder.pending_tenants(100, 0):
                await rebuilder.rebuild(tenant_id)

        writing = asyncio.create_task(declare_and_resolve())
        for _ in range(rounds):
            ran = await opsentry(environment(settings), "projections", "rebuild", "--all")
            assert ran.code == 0, ran.err
        monkeypatch.setattr(Outbox, "version", Outbox.version + 1)
        await rebuild_outbox()
        stop.set()
        await writing
        await quiet()

        # A changed rule derives intents for edits, old ones included.
        number = await run(OpenIncident(title="Down"))
        await run(ChangeIncident(title="Very much down"), number)
        events_total += 1
        await quiet()
        before = await owner.fetchval(INTENTS)
        monkeypatch.setattr(intents, "NOTIFIABLE_EVENTS", intents.NOTIFIABLE_EVENTS | {IncidentEdited})
        monkeypatch.setattr(Outbox, "version", Outbox.version + 1)
        await rebuild_outbox()
        assert await owner.fetchval(INTENTS) == before + SUBSCRIBERS
        await quiet()
        await run(ChangeIncident(title="Down as never before"), number)
        events_total += 1
        await quiet()
    return events_total * SUBSCRIBERS


async def test_rebuilds_during_sending_send_nothing_again(settings, owner, monkeypatch):
    assert await rebuild_again_and_again(settings, owner, monkeypatch, rounds=2)


@pytest.mark.faults
async def test_twenty_rebuilds_during_sending_send_nothing_again(settings, owner, monkeypatch):
    sent = await rebuild_again_and_again(settings, owner, monkeypatch, rounds=20)
    Console().print(f"20 rebuilds while {sent:,} messages were sent: none again")

import asyncio
import json
import signal

import psutil
import pytest

from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident, PostUpdate
from tests import commands
from tests.conftest import META, make_service
from tests.projections.planting import plant
from tests.system.processes import environment, opsentry, running
from tests.waiting import until

NAMES = ["services", "incidents", "maintenance", "subscriptions", "impact", "outbox"]


async def filled(parts, tenant):
    service_id = await make_service(parts, tenant.id, "web")
    opened = OpenIncident(title="Down", service_ids=(service_id,))
    made = await commands.create(parts, incident.DECIDER, tenant.id, opened, META)
    await commands.change(parts, incident.DECIDER, tenant.id, made.stream_id, PostUpdate(message="m"), META)
    await parts.projector.catch_up(tenant.id, 0)
    return made.stream_id


async def projection_status(run):
    return {row["projection"]: row for row in json.loads(await run("projections", "status", "--json"))}


async def test_status_counts_tenants_and_lag(run, parts, acme, globex, owner):
    await filled(parts, acme)
    await parts.projector.catch_up(globex.id, 0)
    found = await projection_status(run)
    assert set(found) == set(NAMES)
    counts = ("tenants", "up_to_date", "lagging", "halted")
    assert {tuple(row[name] for name in counts) for row in found.values()} == {(2, 2, 0, 0)}
    await owner.execute("UPDATE checkpoints SET position = 1 WHERE projection = 'impact' AND tenant_id = $1", acme.id)
    row = (await projection_status(run))["impact"]
    assert (row["up_to_date"], row["lagging"]) == (1, 1)
    assert row["lag_events"] > 0
    assert row["lag_seconds"] > 0
    assert "impact" in await run("projections", "status")


async def test_verify_finds_a_changed_row_and_rebuild_restores_it(run, parts, acme, globex, owner, settings):
    await filled(parts, acme)
    await filled(parts, globex)
    assert f"{2 * len(NAMES)} of {2 * len(NAMES)}" in await run("projections", "verify", "--all")
    await owner.execute("UPDATE incidents SET body = replace(body, 'Down', 'Up') WHERE tenant_id = $1", acme.id)
    ran = await opsentry(environment(settings), "projections", "verify", "incidents", "--json")
    assert ran.code == 1
    wrong = {row["slug"]: row["difference"] for row in json.loads(ran.out)}
    assert (wrong["globex"], wrong["acme"]["table"]) == (None, "incidents")
    assert "Up" in wrong["acme"]["stored"]["body"]
    assert "Down" in wrong["acme"]["replayed"]["body"]
    ran = await opsentry(environment(settings), "projections", "verify", "incidents")
    assert [line.split(":")[0].strip() for line in ran.out.splitlines()] == [
        "1 of 2 projections of tenants equal the ledger", "acme incidents, table incidents", "live", "ledger"
    ]  # fmt: skip
    events = {
        t.id: await owner.fetchval("SELECT position FROM ledger_heads WHERE tenant_id = $1", t.id)
        for t in (acme, globex)
    }
    rebuilt = json.loads(await run("projections", "rebuild", "incidents", "--tenant", "acme", "--json"))
    assert rebuilt == {"tenants": 1, "events": events[acme.id], "failed": []}
    assert "2 of 2" in await run("projections", "verify", "incidents")
    assert "1 of 1" in await run("projections", "verify", "incidents", "--sample", "1")
    rebuilt = json.loads(await run("projections", "rebuild", "--all", "--json"))
    assert rebuilt == {"tenants": 2, "events": sum(events.values()), "failed": []}
    assert (await projection_status(run))["incidents"]["generation"] == 1
    assert {row["to_rebuild"] for row in (await projection_status(run)).values()} == {0}


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_a_stopped_rebuild_continues_with_the_remaining_tenants(run, parts, acme, globex, owner, settings, sign):
    for tenant in (acme, globex):
        await filled(parts, tenant)
    rebuilt = "SELECT rebuilt_at IS NOT NULL FROM checkpoints WHERE projection = 'incidents' ORDER BY tenant_id"
    async with owner.transaction():
        await owner.execute(
            "SELECT FROM checkpoints WHERE tenant_id = $1 AND projection = 'incidents' FOR UPDATE", globex.id
        )
        async with running(environment(settings), "projections", "rebuild", "incidents", "--jobs", "2") as process:

            async def first_is_done():
                return (await parts.database.fetch(rebuilt))[0][0]

            await until(first_is_done)
            started = psutil.Process(process.pid).children(recursive=True)
            assert len(started) >= 2
            process.process.send_signal(sign)
            assert await process.ended() != 0
            _, alive = await asyncio.to_thread(psutil.wait_procs, started, 10)
            assert alive == []
    assert [row[0] for row in await owner.fetch(rebuilt)] == [True, False]
    assert json.loads(await run("projections", "rebuild", "incidents", "--json"))["tenants"] == 1
    assert [row[0] for row in await owner.fetch(rebuilt)] == [True, True]
    assert "2 of 2" in await run("projections", "verify", "incidents")


async def test_projections_pause_and_resume(run, fail, parts, acme):
    number = await filled(parts, acme)
    assert json.loads(await run("projections", "pause", "--all", "--json")) == {"paused": sorted(NAMES)}
    assert "none, all were paused already" in await run("projections", "pause", "impact")
    assert "outbox: paused" in await fail(1, "projections", "rebuild", "outbox")
    await commands.change(parts, incident.DECIDER, acme.id, number, PostUpdate(message="m"), META)
    await parts.projector.catch_up(acme.id, 0)
    assert {(row["lagging"], row["paused"]) for row in (await projection_status(run)).values()} == {(1, True)}
    assert json.loads(await run("projections", "resume", "impact", "--json")) == {"resumed": ["impact"]}
    await parts.projector.catch_up(acme.id, 0)
    assert (await projection_status(run))["impact"]["lagging"] == 0
    assert "impact" not in await run("projections", "resume", "--all")


async def test_halted_projections_are_listed_and_resume_without_the_cause(run, parts, acme, owner, settings):
    number = await filled(parts, acme)
    await plant(owner, acme.id, number, 3, type="incident.exploded")
    await parts.projector.catch_up(acme.id, 0)
    halted = json.loads(await run("projections", "halted", "--json"))
    assert {row["projection"] for row in halted} == {"impact", "incidents", "outbox"}
    assert all("incident.exploded" in row["error"] for row in halted)
    ran = await opsentry(environment(settings), "projections", "retry", "--all", "--json")
    assert (ran.code, json.loads(ran.out)) == (1, {"retried": 3, "halted": 3})
    ran = await opsentry(environment(settings), "projections", "rebuild", "incidents", "--json")
    assert ran.code == 1
    assert "incident.exploded" in json.loads(ran.out)["failed"][0]["error"]
    assert json.loads(await run("projections", "halted", "--json"))[2]["phase"] == "rebuild"
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute("UPDATE events SET type = 'incident.reopened' WHERE type = 'incident.exploded'")
    assert json.loads(await run("projections", "retry", "--all", "--json")) == {"retried": 3, "halted": 0}
    assert json.loads(await run("projections", "halted", "--json")) == []
    assert {row["lagging"] for row in (await projection_status(run)).values()} == {0}


async def test_wrong_use_names_the_mistake(fail):
    assert "name one projection, or use --all" in await fail(2, "projections", "rebuild")
    assert "name one projection, or use --all" in await fail(2, "projections", "verify", "incidents", "--all")
    assert "is not one of" in await fail(2, "projections", "retry", "nonsense")
    assert "no tenant has the slug" in await fail(1, "projections", "rebuild", "--all", "--tenant", "nobody")

"""An event that a projection cannot apply halts this projection of this tenant, and nothing else."""

import asyncio
import json

from opsentry.bootstrap import core
from opsentry.identity import operator_tokens
from tests.conftest import Client
from tests.projections.planting import plant
from tests.system.load import prepare
from tests.system.processes import environment, opsentry, running, server
from tests.waiting import until

NAMES = {"services", "incidents", "maintenance", "subscriptions", "impact", "outbox"}
OF_INCIDENTS = {"incidents", "impact", "outbox"}
WINDOW = {"title": "Move", "scheduled_start": "2036-06-01T02:00:00Z", "scheduled_end": "2036-06-01T04:00:00Z"}


async def age(owner, tenant_id, position):
    """Make an event one hour older; no projection that reads it has applied it."""
    await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
    await owner.execute(
        "UPDATE events SET recorded_at = recorded_at - interval '1 hour' WHERE tenant_id = $1 AND position = $2",
        tenant_id,
        position,
    )
    await owner.execute("ALTER TABLE events ENABLE ALWAYS TRIGGER events_append_only")


class Operator:
    """An operator with a command line and a token for `/ops/…`."""

    def __init__(self, settings, client):
        self.settings = settings
        self.client = client

    async def runs(self, *arguments):
        """Run `opsentry projections …`; return its exit code and its decoded JSON."""
        ran = await opsentry(environment(self.settings), "projections", *arguments, "--json")
        return ran.code, json.loads(ran.out)

    async def sees_parked(self, expected):
        """Check that every report of halted projections names these, with their positions."""

        async def reported():
            _, body, _ = await self.client.send("GET", "/ops/projections/halted")
            return {(row["slug"], row["projection"], row["position"]) for row in body["halted"]} == expected

        await until(reported)
        (_, rows), (_, standing) = await asyncio.gather(self.runs("halted"), self.runs("status"))
        assert {(row["slug"], row["projection"], row["position"]) for row in rows} == expected
        assert all("exploded" in row["error"] for row in rows)
        names = {name for _, name, _ in expected}
        assert {row["projection"] for row in standing} == NAMES
        assert {row["projection"] for row in standing if row["halted"] == 1} == names

        async def listed():
            # An answer may be as old as a second.
            _, body, _ = await self.client.send("GET", "/ops/projections")
            return {row["projection"] for row in body["projections"] if row["halted"] == 1} == names

        await until(listed)

    async def ready(self):
        return await self.client.send("GET", "/health/ready")


FROM_BEFORE = "UPDATE checkpoints SET halted_at = position + 1, halt_error = 'from before' WHERE tenant_id = $1"


async def begun(owner, tenant):
    """Return when the worker has let go on what stood still before it: later on it tries nothing again by itself."""
    standing_still = "SELECT EXISTS (SELECT FROM checkpoints WHERE tenant_id = $1 AND halt_error = 'from before')"

    async def let_go():
        return not await owner.fetchval(standing_still, tenant.id)

    await until(let_go)


async def test_poison_is_seen_everywhere_stops_nothing_else_and_nothing_is_skipped_after_it(  # noqa: PLR0915 - one story
    settings, owner, http
):
    acme, globex = await prepare(settings, 2)
    async with core(settings) as parts, parts.database.connection() as connection:
        token = await operator_tokens.create_operator_token(connection, name="on call")
    await owner.execute(FROM_BEFORE, globex.id)
    async with server(settings) as (_, url), running(environment(settings), "worker") as worker:
        await begun(owner, globex)
        api, other = (Client(http, url, tenant.token) for tenant in (acme, globex))
        operator = Operator(settings, Client(http, url, token))

        # Only the registry of services stops: nobody's notifications do.
        service = await owner.fetchval("SELECT service_id FROM services WHERE tenant_id = $1", acme.id)
        in_services = await plant(owner, acme.id, service, 2, kind="service", type="service.exploded", data="{}")
        await worker.mentions('"projection": "services"')
        await operator.sees_parked({(acme.slug, "services", in_services)})
        _, number, _ = await api.post("/incidents", {"title": "Down"})
        incident = f"/incidents/{number['id']}"
        await age(owner, acme.id, in_services)
        assert (await api.get(incident))[1]["title"] == "Down"
        assert (await operator.ready())[0] == 200

        # The outbox stops as well, and readiness tells once somebody waits for too long.
        in_incidents = await plant(owner, acme.id, number["id"], 2, type="incident.exploded")
        for name in OF_INCIDENTS:
            await worker.mentions(f'"projection": "{name}"')
        assert worker.said.count("projection_halted") == 1 + len(OF_INCIDENTS)
        halted = {(acme.slug, name, in_incidents) for name in OF_INCIDENTS} | {(acme.slug, "services", in_services)}
        await operator.sees_parked(halted)
        status, body, _ = await operator.ready()
        assert (status, body["checks"]["outbox"]["status"]) == (200, "ok")
        await age(owner, acme.id, in_incidents)

        async def not_ready():
            status, body, _ = await operator.ready()
            checks = {name: check["status"] for name, check in body["checks"].items()}
            return status == 503 and checks == {"postgres": "ok", "redis": "ok", "outbox": "fail"}

        await until(not_ready)

        # Its other projections go on, and so do other tenants; no read waits.
        for client in (api, other):
            _, window, _ = await client.post("/maintenance", WINDOW)
            status, body, headers = await client.get(f"/maintenance/{window['id']}")
            assert (status, body["title"], "Opsentry-Lag-Events" in headers) == (200, "Move", False)
        status, body, _ = await other.post("/incidents", {"title": "Up and down"})
        assert [item["title"] for item in (await other.get("/incidents/active"))[1]["incidents"]] == ["Up and down"]
        assert (await api.get(incident))[1]["updates"] == []

        # A retry halts again at an event that still cannot be applied, and otherwise resumes.
        assert await operator.runs("retry", "--all") == (1, {"retried": 4, "halted": 4})
        await operator.sees_parked(halted)
        await owner.execute("ALTER TABLE events DISABLE TRIGGER events_append_only")
        await owner.execute("UPDATE events SET type = 'service.retired' WHERE type = 'service.exploded'")
        await owner.execute("UPDATE events SET type = 'incident.updated' WHERE type = 'incident.exploded'")
        await owner.execute("ALTER TABLE events ENABLE ALWAYS TRIGGER events_append_only")
        assert await operator.runs("retry", "--all") == (0, {"retried": 4, "halted": 0})
        await operator.sees_parked(set())
        code, compared = await operator.runs("verify", "--all")
        assert (code, len(compared)) == (0, 2 * len(NAMES))
        assert {row["up_to_date"] for row in (await operator.runs("status"))[1]} == {2}
        await api.post(f"{incident}/updates", {"message": "after it"})
        status, body, headers = await api.get(incident)
        assert [entry["message"] for entry in body["updates"]] == ["planted", "after it"]
        assert "Opsentry-Lag-Events" not in headers

        async def ready():
            return (await operator.ready())[0] == 200

        await until(ready)

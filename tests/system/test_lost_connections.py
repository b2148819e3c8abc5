"""A server loses its database connections again and again."""

from tests.conftest import Client
from tests.system.load import Load, check_ledgers, check_read_models, prepare
from tests.system.processes import server
from tests.waiting import until

KILLS = 30

TERMINATE = (
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
    " WHERE datname = current_database() AND usename = 'opsentry'"
)


async def test_a_server_whose_connections_are_killed_tells_the_truth_and_recovers(settings, owner, http):
    tenants = await prepare(settings, 4)
    async with server(settings) as (process, url):
        apis = [Client(http, url, tenant.token) for tenant in tenants]
        async with Load(url, tenants, clients=32) as load:
            for _ in range(KILLS):
                await load.answered(20)
                assert await owner.fetchval(TERMINATE) > 0
        assert set(load.answers.values()) == {201, 503}
        assert set(load.reads) <= {200, 503}
        assert load.unseen == []
        marks = await check_ledgers(owner, tenants, load.answers)
        assert len(marks) >= load.count(201)

        async def works():
            status, _, _ = await apis[0].get("/incidents")
            return status == 200

        await until(works)
        for api, tenant in zip(apis, tenants, strict=True):
            await check_read_models(owner, api, tenant)
        status, _, _ = await apis[0].post("/incidents", {"title": "After all that"})
        assert status == 201
        assert process.process.returncode is None

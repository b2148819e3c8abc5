import asyncpg

from opsentry.bootstrap import core, working
from opsentry.demo.embedded import APP_USER, DATABASE, EmbeddedPostgres
from opsentry.domain.incident import DECIDER, OpenIncident
from opsentry.infrastructure.migrations import migrate, migrations
from opsentry.settings import Settings
from tests import commands
from tests.conftest import META, make_tenant
from tests.system.processes import environment, running
from tests.waiting import until
from tests.worker.windows import DONE, completed, schedule, story

UP_TO_DATE = (
    "SELECT NOT EXISTS (SELECT FROM ledger_heads h WHERE (SELECT count(*) FROM checkpoints c"
    " WHERE c.tenant_id = h.tenant_id AND c.position = h.position) < $1)"
)
PROJECTIONS = 6


async def leave_behind(parts, tenants, incidents):
    for tenant in tenants:
        for number in range(incidents):
            await commands.create(parts, DECIDER, tenant.id, OpenIncident(title=f"{number}"), META)


async def shown(connection):
    return await connection.fetchval("SELECT count(*) FROM incidents")


async def test_events_that_commands_left_behind_are_projected(parts, acme, globex, owner):
    await leave_behind(parts, [acme, globex], 20)
    assert await shown(owner) == 0
    async with working(parts):
        await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
    assert await shown(owner) == 40


async def test_later_events_are_projected_too(settings, parts, acme, owner):
    async with running(environment(settings), "worker"):
        await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
        for turn in range(1, 3):
            await leave_behind(parts, [acme], 5)
            await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
            assert await shown(owner) == 5 * turn


async def test_a_locked_checkpoint_does_not_delay_other_tenants(parts, acme, globex, owner, app_connection):
    await parts.projector.catch_up(acme.id, 0)
    await leave_behind(parts, [acme, globex], 1)
    async with owner.transaction():
        await owner.execute("SELECT FROM checkpoints WHERE tenant_id = $1 FOR UPDATE", acme.id)
        async with working(parts):
            query = "SELECT count(*) = 1 FROM incidents WHERE tenant_id = $1"
            await until(lambda: app_connection.fetchval(query, globex.id))
            assert not await app_connection.fetchval(query, acme.id)


async def test_a_worker_continues_after_a_database_outage(tmp_path):
    server = EmbeddedPostgres(tmp_path / "postgres")
    server.start()
    try:
        owner = await asyncpg.connect(server.url("postgres"))
        await owner.execute(f"CREATE DATABASE {DATABASE}")
        await owner.close()
        owner = await asyncpg.connect(server.url())
        await migrate(owner, migrations())
        await owner.execute(f"CREATE ROLE {APP_USER} LOGIN IN ROLE opsentry_app")
        settings = Settings(database_url=server.url(user=APP_USER), log_level="warning")
        async with core(settings) as parts, running(environment(settings), "worker") as process:
            await process.line("working")
            tenant = await make_tenant(parts, "acme")
            before = await schedule(parts, tenant.id, -1, 0.5)
            await completed(owner, 1)
            during = await schedule(parts, tenant.id, 0.5, 0.5)
            await owner.close()
            server.stop("immediate")
            await process.mentions("task_deferred")
            server.start()
            owner = await asyncpg.connect(server.url())
            await completed(owner, 2)
            assert await story(owner, before) == await story(owner, during) == DONE
            assert process.process.returncode is None
            await owner.close()
    finally:
        server.stop("immediate")

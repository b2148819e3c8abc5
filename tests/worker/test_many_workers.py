"""Worker processes run in parallel without a leader. A frozen one blocks no other and writes nothing late."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import groupby, pairwise
from operator import itemgetter

import aiohttp
import asyncpg
import pytest

from opsentry.bootstrap import projections
from opsentry.demo.embedded import EmbeddedValkey
from opsentry.domain import incident
from opsentry.domain.events import AnyEvent
from opsentry.domain.incident import IncidentOpened, IncidentUpdated, OpenIncident, PostUpdate
from opsentry.events import store
from opsentry.events.store import Append, Appended, NewEvent
from opsentry.projections.engine import management
from opsentry.projections.engine.rebuild import Rebuilder
from tests import commands
from tests.conftest import META, Client, make_tenant
from tests.projections.histories import TABLES, dump
from tests.system.processes import environment, running
from tests.waiting import stretched, until
from tests.worker.test_catch_up import PROJECTIONS, UP_TO_DATE, leave_behind

# Each move of a checkpoint: its process, its positions, and its time by the database's clock.
TRAIL = """
CREATE TABLE trail (
    number bigint GENERATED ALWAYS AS IDENTITY, tenant_id bigint, projection text, was bigint, position bigint,
    who text, at timestamptz);
CREATE FUNCTION note_trail() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO trail (tenant_id, projection, was, position, who, at) VALUES (
        NEW.tenant_id, NEW.projection, OLD.position, NEW.position, current_setting('application_name'),
        clock_timestamp());
    RETURN NULL;
END
$$;
CREATE TRIGGER checkpoints_trail AFTER UPDATE OF position ON checkpoints FOR EACH ROW EXECUTE FUNCTION note_trail();
"""
# Each process waits at its first step for the other two. Otherwise one might finish before another starts.
# Other transactions see a sequence move at once.
MUSTER = """
CREATE SEQUENCE seen_one; CREATE SEQUENCE seen_two; CREATE SEQUENCE seen_three;
CREATE FUNCTION muster() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF current_setting('application_name') IN ('one', 'two', 'three') THEN
        PERFORM nextval('seen_' || current_setting('application_name'));
        WHILE (SELECT count(last_value) FROM pg_sequences WHERE sequencename LIKE 'seen\\_%') < 3 LOOP
            PERFORM pg_sleep(0.005);
        END LOOP;
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER checkpoints_muster BEFORE UPDATE OF position ON checkpoints FOR EACH ROW EXECUTE FUNCTION muster();
"""
STEPS = "SELECT tenant_id, projection, was, position, who FROM trail ORDER BY tenant_id, projection, number"
# The sessions of a process, and their current statements.
SESSIONS = """
SELECT state, wait_event_type, wait_event, query FROM pg_stat_activity
WHERE datname = current_database() AND application_name = $1
"""
ASKED_SINCE = """
SELECT count(*) > 0 FROM pg_stat_activity
WHERE datname = current_database() AND application_name = $1 AND query_start > $2
"""


@pytest.fixture
async def holder(settings):
    """A second connection of the owner. Workers cannot end its session."""
    connection = await asyncpg.connect(settings.migration_database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def trail(owner):
    """The steps of each tenant's projections, as (process, position). Each begins where the previous one ended."""
    await owner.execute(TRAIL)

    async def steps():
        found: dict[tuple[int, str], list[tuple[str, int]]] = {}
        for key, rows in groupby(await owner.fetch(STEPS), key=itemgetter("tenant_id", "projection")):
            reached = None
            for row in rows:
                assert reached in {None, row["was"]}
                reached = row["position"]
                found.setdefault(key, []).append((row["who"], reached))
        return found

    return steps


@asynccontextmanager
async def process(settings, name, *arguments):
    """Run `opsentry` with `name` as the application name of its sessions."""
    url = f"{settings.database_url}&application_name={name}"
    async with running(environment(settings, OPSENTRY_DATABASE_URL=url), *arguments) as one:
        yield one


@asynccontextmanager
async def worker(settings, name):
    async with process(settings, name, "worker") as one:
        await one.line("working")
        yield one


async def is_at(owner, name, **wanted):
    """Return whether a session of the process has these columns; `query` is a prefix of its statement."""
    begins = wanted.pop("query", "")
    return any(
        row["query"].lstrip().startswith(begins) and all(row[column] == value for column, value in wanted.items())
        for row in await owner.fetch(SESSIONS, name)
    )


async def all_is_right(parts):
    """Compare all rows of all tenants with a replay of the ledgers."""
    rebuilder = Rebuilder(parts.database, projections())
    for row in await parts.database.fetch("SELECT tenant_id FROM tenants"):
        for projection in projections():
            assert await rebuilder.verify(projection, row["tenant_id"]) is None


async def append_to(parts, tenant, stream_id):
    """Append an update without catching up; return its position."""
    return (
        await commands.change(parts, incident.DECIDER, tenant.id, stream_id, PostUpdate(message="m"), META)
    ).position


async def thaws(parts, owner, tenant, stream_id, trail, frozen):
    """Thaw the frozen process, now the only one: its old pass writes nothing more, and it projects new events."""
    before = await dump(owner, ("checkpoints", "trail", *TABLES))
    now = await owner.fetchval("SELECT clock_timestamp()")
    frozen.process.send_signal(signal.SIGCONT)
    await until(lambda: owner.fetchval(ASKED_SINCE, "frozen", now))
    assert await dump(owner, ("checkpoints", "trail", *TABLES)) == before
    position = await append_to(parts, tenant, stream_id)
    await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
    assert {steps[-1] for steps in (await trail()).values()} == {("frozen", position)}
    await all_is_right(parts)


async def test_workers_share_the_work_and_apply_each_event_once(settings, parts, owner, trail):
    # Registered in advance: an unknown projection would be rebuilt for all tenants.
    await management.register(owner, projections())
    tenants = [await make_tenant(parts, f"tenant-{number}") for number in range(40)]
    for tenant in tenants[::2]:
        await parts.projector.catch_up(tenant.id, 0)
    names = ["one", "two", "three"]
    async with AsyncExitStack() as stack:
        for name in names:
            await stack.enter_async_context(worker(settings, name))
        await owner.execute(MUSTER)
        await asyncio.gather(*(leave_behind(parts, [tenant], 20) for tenant in tenants))
        await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
    steps = await trail()
    assert len(steps) == len(tenants) * PROJECTIONS
    assert {who for one in steps.values() for who, _ in one} >= set(names)
    ledger_heads = {
        row["tenant_id"]: row["position"] for row in await owner.fetch("SELECT tenant_id, position FROM ledger_heads")
    }
    assert {key: one[-1][1] for key, one in steps.items()} == {key: ledger_heads[key[0]] for key in steps}
    for one in steps.values():
        assert all(before < after for (_, before), (_, after) in pairwise(one))
    assert await owner.fetchval("SELECT count(*) FROM incidents") == 20 * len(tenants)
    await all_is_right(parts)


async def test_a_worker_frozen_while_it_writes_holds_no_lock(settings, parts, acme, owner, holder, trail):
    made = await commands.create(parts, incident.DECIDER, acme.id, OpenIncident(title="Down"), META)
    await parts.projector.catch_up(acme.id, 0)
    async with worker(settings, "frozen") as frozen:
        async with holder.transaction():
            await holder.execute("SELECT FROM incidents WHERE tenant_id = $1 FOR UPDATE", acme.id)
            written = await append_to(parts, acme, made.stream_id)
            await until(lambda: is_at(owner, "frozen", wait_event_type="Lock", query="SELECT true, write_impact"))
            frozen.process.send_signal(signal.SIGSTOP)
        # The write is one statement, so the server ends it without the process.
        await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
        assert {steps[-1] for steps in (await trail()).values()} == {("frozen", written)}
        async with worker(settings, "other"):
            position = await append_to(parts, acme, made.stream_id)
            await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
            assert {steps[-1] for steps in (await trail()).values()} == {("other", position)}
        await thaws(parts, owner, acme, made.stream_id, trail, frozen)


async def test_a_worker_frozen_before_it_writes_writes_nothing_late(settings, parts, acme, owner, holder, trail):
    made = await commands.create(parts, incident.DECIDER, acme.id, OpenIncident(title="Down"), META)
    await parts.projector.catch_up(acme.id, 0)
    async with worker(replace(settings, log_level="warning"), "frozen") as frozen:
        await append_to(parts, acme, made.stream_id)
        await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
        async with holder.transaction():
            # It waits where it reads the rows that the events continue.
            await holder.execute("LOCK TABLE incidents IN ACCESS EXCLUSIVE MODE")
            await append_to(parts, acme, made.stream_id)
            await until(lambda: is_at(owner, "frozen", wait_event_type="Lock", query="SELECT i.incident_id"))
            frozen.process.send_signal(signal.SIGSTOP)
        async with worker(settings, "other"):
            await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
            position = await append_to(parts, acme, made.stream_id)
            await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
            assert {steps[-1] for steps in (await trail()).values()} == {("other", position)}
        await thaws(parts, owner, acme, made.stream_id, trail, frozen)
        frozen.process.terminate()
        assert await frozen.ended() == 0
        assert "Traceback" not in frozen.said


async def test_a_worker_frozen_in_a_copy_is_evicted(settings, parts, acme, owner, holder, trail):
    # More data than the socket buffers hold, so the frozen process has not sent all of it.
    events: list[AnyEvent] = [IncidentOpened(title="Down", severity="degraded", visibility="public")]
    events += [IncidentUpdated(message="m" * 2000, status="investigating")] * 2000
    append = Append(
        tenant_id=acme.id,
        kind=incident.KIND,
        stream_id=0,
        expected_version=0,
        events=[NewEvent(event, META) for event in events],
    )
    async with parts.database.connection(30) as connection:
        (made,) = await store.append_events(connection, [append], wait=True)
    assert isinstance(made, Appended)
    await parts.projector.catch_up(acme.id, 0)
    row = await owner.fetchrow("DELETE FROM incident_updates WHERE version = 2 RETURNING *")
    async with worker(settings, "frozen") as frozen:
        # The copy waits at this row, because an open transaction has inserted it.
        transaction = holder.transaction()
        await transaction.start()
        await holder.copy_records_to_table("incident_updates", records=[tuple(row)])
        await owner.execute("UPDATE checkpoints SET generation = -1")
        await until(lambda: is_at(owner, "frozen", wait_event_type="Lock", query="COPY"))
        frozen.process.send_signal(signal.SIGSTOP)
        await transaction.rollback()
        await until(lambda: is_at(owner, "frozen", state="active", wait_event="ClientRead", query="COPY"))
        position = await append_to(parts, acme, made.stream_id)
        async with worker(replace(settings, log_level="warning"), "other") as other:
            await other.mentions("idle_session_evicted")
            await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
            assert {steps[-1] for steps in (await trail()).values()} == {("other", position)}
            await until(lambda: owner.fetchval("SELECT min(generation) = 0 FROM checkpoints"))
            other.process.terminate()
            assert await other.ended() == 0
        assert not await is_at(owner, "frozen", query="COPY")
        await thaws(parts, owner, acme, made.stream_id, trail, frozen)


LATE = """
SELECT max(extract(epoch FROM at - recorded_at))::float8 AS seconds, array_agg(DISTINCT who) AS who
FROM events e JOIN trail t ON t.tenant_id = e.tenant_id AND t.was < e.position AND t.position >= e.position
WHERE type = 'incident.opened'
"""


async def test_events_of_a_killed_server_are_projected_within_a_second_without_a_hint(
    settings, parts, acme, globex, owner, holder, http, trail, tmp_path
):
    valkey = EmbeddedValkey(tmp_path / "valkey")
    valkey.start()
    settings = replace(settings, redis_url=valkey.url)
    for tenant in (acme, globex):
        await parts.projector.catch_up(tenant.id, 0)
    written = "SELECT count(*) FROM events WHERE type = 'incident.opened'"
    async with worker(settings, "worker"):
        os.kill(valkey.pid, signal.SIGKILL)
        for turn in range(1, 4):
            async with process(settings, "server", "serve") as server:
                url = await server.line("serving ")
                # The server records its commands and dies before it projects them.
                async with holder.transaction():
                    await holder.execute("LOCK TABLE outbox_state IN ACCESS EXCLUSIVE MODE")
                    clients = [Client(http, url, tenant.token) for tenant in (acme, globex)]
                    asked = [asyncio.create_task(client.post("/incidents", {"title": "Down"})) for client in clients]

                    async def recorded(turn=turn):
                        return await owner.fetchval(written) == 2 * turn

                    await until(recorded)
                    server.kill()
                    await server.ended()
            assert all(
                isinstance(one, aiohttp.ClientError) for one in await asyncio.gather(*asked, return_exceptions=True)
            )
            await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
        # Events recorded at any moment between two polls of the worker.
        for number in range(25):
            await leave_behind(parts, [(acme, globex)[number % 2]], 1)
            await asyncio.sleep(0.09)
        await until(lambda: owner.fetchval(UP_TO_DATE, PROJECTIONS))
    late = await owner.fetchrow(LATE)
    assert late["who"] == ["worker"]
    assert late["seconds"] < stretched(1)
    await trail()
    await all_is_right(parts)

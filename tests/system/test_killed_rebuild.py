"""A rebuild is killed at every stage while clients write and read: no response is ever wrong."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import asyncpg
import psutil
import pytest
from rich.console import Console
from rich.table import Table

from opsentry.bootstrap import core, projections
from opsentry.projections.engine.rebuild import Rebuilder
from opsentry.settings import Settings
from tests.conftest import make_tenant, new_database, settings_for
from tests.system.intents import check_intents
from tests.system.processes import Running, environment, opsentry, running, server
from tests.system.watched import Watch, watched
from tests.waiting import until

TENANTS = 6
INCIDENTS = 30
# No sender runs, and readiness counts pending intents: a new database begins before it fails.
ROUNDS_OF_ONE_DATABASE = 20
# Readiness fails when an intent has been pending for five minutes.
SECONDS_OF_ONE_DATABASE = 200
# Most of a round waits for processes to start, so that two overlap well.
DATABASES = 2
CHECK_INTERVAL_SECONDS = 0.3

# The stages of the kill, and the process that finishes the rebuild: the same command, the worker, or both.
MOMENTS = ("starting", "replaying", "waiting", "swapping", "between tenants", "any")
ENDINGS = ("again", "worker", "new worker")

GENERATION = "SELECT coalesce(min(generation), 0) FROM projections"
DONE = "SELECT count(*) FROM (SELECT FROM checkpoints GROUP BY tenant_id HAVING min(rebuilt_at) > $1) AS done"
OUTBOX = "SELECT tenant_id, position FROM checkpoints WHERE projection = 'outbox'"
# All intents for events up to a position of each tenant.
INTENTS = """
SELECT tenant_id, count(*), md5(string_agg(i::text, ',' ORDER BY intent_id)) FROM outbox_intents i
JOIN unnest($1::bigint[], $2::bigint[]) AS upto (tenant_id, position) USING (tenant_id)
WHERE i.position <= upto.position GROUP BY tenant_id ORDER BY tenant_id
"""
# The statements of sessions that rebuild a tenant.
AT_WORK = """
SELECT a.application_name, a.query, coalesce(a.state = 'active' AND a.wait_event_type = 'Lock', false) AS waits
FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid AND l.locktype = 'advisory' AND l.granted
WHERE a.datname = current_database()
"""
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'rebuild'"
# Locks that block a rebuild: at its own locks, or before it deletes the last rows.
HOLD = {
    "waiting": "SELECT FROM checkpoints WHERE 0 < ALL($1::bigint[]) ORDER BY tenant_id, projection FOR NO KEY UPDATE",
    "swapping": "SELECT FROM service_impacts WHERE stream_id = ANY($1) FOR UPDATE",
}
STAGES = {
    "FROM events": "replay",
    "FOR NO KEY UPDATE": "lock",
    "DELETE FROM": "swap",
    "COPY": "swap",
    "rebuilt_at": "end",
    "COMMIT": "end",
}


class Round(NamedTuple):
    """The result of one kill: `at` is the stage of the processes, `done` the tenants that they had finished."""

    moment: str
    at: str
    done: int
    ending: str
    written: int
    read: int
    lagging: int
    probed: int
    intents: int


class Killing:
    """Kill rebuilds of one database."""

    def __init__(self, settings: Settings, chance: random.Random) -> None:
        self.settings = settings
        self.chance = chance
        self.stack = AsyncExitStack()

    async def begin(self) -> None:
        """Fill the database; start the server, the worker and the clients."""
        self.parts = await self.stack.enter_async_context(core(self.settings))
        self.tenants = [
            await watched(self.parts, await make_tenant(self.parts, f"tenant-{number}"), INCIDENTS)
            for number in range(TENANTS)
        ]
        self.owner, self.holder, self.keeper = [await self.connect() for _ in range(3)]
        _, url = await self.stack.enter_async_context(server(self.settings))
        await self.start_worker()
        self.watch = await self.stack.enter_async_context(Watch(url, self.tenants))

    async def connect(self) -> Any:
        connection = await asyncpg.connect(self.settings.migration_database_url)
        self.stack.push_async_callback(connection.close)
        return connection

    async def start_worker(self) -> None:
        self.worker = await self.stack.enter_async_context(running(environment(self.settings), "worker"))
        await self.worker.line("working")

    async def round(self, moment: str, ending: str) -> Round:
        """Mark all rows as old, kill a rebuild, let another process finish it, and check all rows."""
        before = self.counted()
        for one in self.tenants:
            await one.mark(self.owner)
        await self.watch.shown(old=True)
        rows = await self.owner.fetch(OUTBOX)
        positions = [row["tenant_id"] for row in rows], [row["position"] for row in rows]
        async with self.kept(positions):
            began = await self.owner.fetchval("SELECT clock_timestamp()")
            done, at = await self.kill(moment, began)
            if ending == "new worker":
                self.worker.kill()
                await self.worker.ended()
                await self.start_worker()
            if ending != "worker":
                ran = await opsentry(*self.command())
                assert ran.code == 0, ran
            await until(lambda: self.all_done(began))
            await self.watch.shown(old=False)
        assert self.watch.wrong == []
        intents = await self.check()
        written, read, lagging, probed = (now - then for now, then in zip(self.counted(), before, strict=True))
        return Round(moment, at, done, ending, written, read, lagging, probed, intents)

    def counted(self) -> Sequence[int]:
        return self.watch.written, self.watch.read, self.watch.lagging, self.watch.probed

    def command(self) -> tuple[dict[str, str], *tuple[str, ...]]:
        """Return the rebuild command; its sessions carry a name of their own.

        It is not nice: on a busy machine it would starve, and pending intents would grow too old for readiness.
        """
        url = f"{self.settings.database_url}&application_name=rebuild"
        env = environment(self.settings, OPSENTRY_DATABASE_URL=url)
        return env, "projections", "rebuild", "--all", "--jobs", "2", "--nice", "0"

    async def all_done(self, began: Any) -> bool:
        return bool(await self.owner.fetchval(DONE, began) == TENANTS)

    @asynccontextmanager
    async def kept(self, positions: tuple[list[int], list[int]]) -> AsyncIterator[None]:
        """Check continuously that the intents of old events stay the same."""
        before = await self.keeper.fetch(INTENTS, *positions)
        over = asyncio.Event()

        async def look() -> None:
            while not over.is_set():
                assert await self.keeper.fetch(INTENTS, *positions) == before
                with suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), CHECK_INTERVAL_SECONDS)

        looking = asyncio.create_task(look())
        try:
            yield
        finally:
            over.set()
            await looking
        assert await self.keeper.fetch(INTENTS, *positions) == before

    # -------------------------------------------------------------------------------------------- killing

    async def kill(self, moment: str, began: Any) -> tuple[int, str]:
        """Kill a rebuild at `moment`; return the number of finished tenants and the stage of its processes."""
        while True:
            generation = await self.owner.fetchval(GENERATION)
            async with running(*self.command()) as process, self.held(moment) as release:
                await self.until(process, partial(self.raised, generation))
                await self.reach(process, moment, began)
                started = psutil.Process(process.pid).children(recursive=True) if self.runs(process) else []
                at = await self.stages()
                process.kill()
                done = await self.owner.fetchval(DONE, began)
                code = await process.ended()
                _, alive = await asyncio.to_thread(psutil.wait_procs, started, 10)
                assert alive == []
                await release()
                await until(self.nobody_rebuilds)
                # The worker may have finished first: then the command ended before the kill.
                if code == -9:
                    return done, at

    @asynccontextmanager
    async def held(self, moment: str) -> AsyncIterator[Any]:
        """Hold the locks that the moment needs until they are released."""
        transaction = self.holder.transaction()
        await transaction.start()
        released = False

        async def release() -> None:
            nonlocal released
            if not released:
                released = True
                await transaction.rollback()

        if moment in HOLD:
            await self.holder.execute(HOLD[moment], [one.quiet for one in self.tenants])
        try:
            yield release
        finally:
            await release()

    async def reach(self, process: Running, moment: str, began: Any) -> None:
        """Wait for the moment, or for the end of the process before it."""
        match moment:
            case "starting":
                await asyncio.sleep(self.chance.uniform(0, 0.8))
            case "replaying" | "any":
                await self.until(process, self.works)
                await asyncio.sleep(self.chance.uniform(0, 0.02 if moment == "replaying" else 0.4))
            case "waiting" | "swapping":
                await self.until(process, self.waits)
            case "between tenants":
                wanted = self.chance.randrange(1, TENANTS)

                async def some_are_done() -> bool:
                    return bool(await self.owner.fetchval(DONE, began) >= wanted)

                await self.until(process, some_are_done)

    async def until(self, process: Running, question: Any) -> None:
        async def answer() -> bool:
            return await question() or not self.runs(process)

        await until(answer)

    def runs(self, process: Running) -> bool:
        return process.process.returncode is None

    async def raised(self, generation: int) -> bool:
        return bool(await self.owner.fetchval(GENERATION) > generation)

    async def works(self) -> bool:
        return any(row["application_name"] == "rebuild" for row in await self.owner.fetch(AT_WORK))

    async def waits(self) -> bool:
        rows = await self.owner.fetch(AT_WORK)
        return any(row["waits"] and row["application_name"] == "rebuild" for row in rows)

    async def stages(self) -> str:
        queries = [row["query"] for row in await self.owner.fetch(AT_WORK) if row["application_name"] == "rebuild"]
        found = {next((name for text, name in STAGES.items() if text in query), "begin") for query in queries}
        return ", ".join(sorted(found)) or "-"

    async def nobody_rebuilds(self) -> bool:
        return bool(await self.owner.fetchval(SESSIONS) == 0)

    # -------------------------------------------------------------------------------------------- checking

    async def check(self) -> int:
        """Compare all rows with a replay of the ledger; return the number of intents."""
        rebuilder = Rebuilder(self.parts.database, projections())
        intents = 0
        for one in self.tenants:
            for projection in projections():
                assert await rebuilder.verify(projection, one.tenant.id) is None
            intents += await check_intents(self.owner, one.tenant.id)
        return intents

    async def end(self) -> None:
        """Compare everything again, with the command that operators use."""
        ran = await opsentry(environment(self.settings), "projections", "verify", "--all")
        assert ran.code == 0, ran
        assert self.watch.wrong == []


async def kill_rebuilds(postgres: Any, valkey: Any, rounds: int) -> list[Round]:
    """Kill `rounds` rebuilds, so that every moment meets every ending."""
    chance = random.Random(rounds)
    left = [(MOMENTS[n % len(MOMENTS)], ENDINGS[(n + n // len(MOMENTS)) % len(ENDINGS)]) for n in range(rounds)]
    size = min(ROUNDS_OF_ONE_DATABASE, rounds // DATABASES)
    found: list[Round] = []

    async def kill() -> None:
        while left:
            async with new_database(postgres) as name:
                killing = Killing(settings_for(postgres, valkey, name), chance)
                async with killing.stack:
                    await killing.begin()
                    began, killed = time.monotonic(), 0
                    while left and killed < size and time.monotonic() - began < SECONDS_OF_ONE_DATABASE:
                        found.append(await killing.round(*left.pop(0)))
                        killed += 1
                    await killing.end()

    async with asyncio.TaskGroup() as group:
        for _ in range(DATABASES):
            group.create_task(kill())
    return found


async def test_a_killed_rebuild_shows_no_wrong_row_and_resumes(postgres, valkey):
    found = await kill_rebuilds(postgres, valkey, len(MOMENTS))
    assert {one.moment for one in found} == set(MOMENTS)
    assert all(one.written and one.read and one.probed for one in found)


@pytest.mark.faults
async def test_two_hundred_killed_rebuilds_show_no_wrong_row_and_resume(postgres, valkey):
    found = await kill_rebuilds(postgres, valkey, 200)
    columns = (
        "killed when",
        "it was at",
        "tenants done",
        "ended by",
        "writes",
        "reads",
        "lagging",
        "probes",
        "intents",
    )
    table = Table("round", *columns, title="kill -9 of a rebuild")
    for number, one in enumerate(found, 1):
        table.add_row(str(number), *map(str, one))
    sums = [sum(column) for column in list(zip(*found, strict=True))[4:8]]
    table.add_row("all", "", "", str(sum(one.done for one in found)), "", *map(str, sums), "")
    Console(width=120).print(table)
    assert {"replay", "lock", "swap"} <= {stage for one in found for stage in one.at.split(", ")}
    assert {one.done for one in found} >= {0, 1, TENANTS - 1}

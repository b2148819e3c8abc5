import asyncio
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from opsentry.events import appender as appender_module
from opsentry.events import store
from opsentry.events.appender import Appender, TenantBusy
from opsentry.events.store import Appended, Reserved, UnknownTenant, VersionConflict
from opsentry.infrastructure.postgres import Database
from tests.events.ledger import held, messages, new_tenant, note, notes
from tests.waiting import GENEROUS_SECONDS


class Watched:
    """Record every batch that is appended, and delay batches while the gate is closed."""

    def __init__(self):
        self.batches = []
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.under_way = []
        self.overlaps = []

    async def append_events(self, connection, commands, *, wait):
        tenants = {command.tenant_id for command in commands}
        self.overlaps += [tenants & others for others in self.under_way if tenants & others]
        self.under_way.append(tenants)
        self.batches.append(list(commands))
        self.began.set()
        await self.gate.wait()
        outcomes = await store.append_events(connection, commands, wait=wait)
        self.under_way.remove(tenants)
        return outcomes


@pytest.fixture
async def watched(monkeypatch):
    watch = Watched()
    monkeypatch.setattr(appender_module, "store", watch)
    return watch


@pytest.fixture
async def database(settings):
    database = Database(settings.database_url, size=8, timeout_seconds=GENEROUS_SECONDS)
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def appender(database):
    appender = Appender(database)
    yield appender
    await appender.drain()


def start(appender, *commands):
    return [asyncio.create_task(appender.append(command)) for command in commands]


async def turn():
    await asyncio.sleep(0)


async def test_all_waiting_commands_share_the_next_batch(watched, appender, tenant, neighbour):
    watched.gate.clear()
    first = start(appender, notes(tenant, "first"), notes(neighbour, "first"))
    await watched.began.wait()
    rest = start(appender, *(notes((tenant, neighbour)[i % 2], str(i)) for i in range(64)))
    await turn()
    watched.gate.set()
    outcomes = await asyncio.gather(*first, *rest)
    assert [type(outcome) for outcome in outcomes] == [Appended] * 66
    assert [len(batch) for batch in watched.batches] == [2, 64]


async def test_a_batch_has_a_largest_size(watched, database, connect, tenant):
    appender = Appender(database, batch=10)
    await asyncio.gather(*start(appender, *(notes(tenant, str(i)) for i in range(35))))
    assert [len(batch) for batch in watched.batches] == [10, 10, 10, 5]
    assert await messages(await connect(), tenant) == [str(i) for i in range(35)]


async def test_a_long_queue_of_one_tenant_does_not_starve_another(watched, database, tenant, neighbour):
    appender = Appender(database, lanes=1, batch=10)
    many = start(appender, *(notes(tenant, str(i)) for i in range(100)))
    (one,) = start(appender, notes(neighbour, "one"))
    await one
    assert len(watched.batches) <= 3
    await asyncio.gather(*many)


async def test_commands_of_a_tenant_keep_their_order_in_one_batch_at_a_time(
    watched, database, connect, tenant, neighbour
):
    appender = Appender(database, lanes=4, batch=3)
    both = [t for i in range(60) for t in start(appender, notes(tenant, f"a{i}"), notes(neighbour, f"b{i}"))]
    outcomes = [await task for task in both]
    for mine in (outcomes[::2], outcomes[1::2]):
        assert all(isinstance(o, Appended) for o in mine)
        assert all(earlier.position < later.position for earlier, later in pairwise(mine))
    assert watched.overlaps == []
    reader = await connect()
    assert await messages(reader, tenant) == [f"a{i}" for i in range(60)]
    assert await messages(reader, neighbour) == [f"b{i}" for i in range(60)]


async def test_each_caller_gets_its_own_outcome(appender, tenant):
    outcomes = await asyncio.gather(
        *start(
            appender,
            notes(tenant, "a", stream=1, reservation="name"),
            notes(tenant, "b", stream=1),
            notes(tenant, "c", stream=2, reservation="name"),
            notes(tenant, "d", stream=1, expected=1),
            notes(10**9, "e"),
        )
    )
    assert [type(o) for o in outcomes] == [Appended, VersionConflict, Reserved, Appended, UnknownTenant]
    assert outcomes[1:3] == [VersionConflict(1), Reserved(1)]


async def test_an_impossible_command_fails_alone(watched, appender, connect, tenant, neighbour):
    good = notes(tenant, "good")
    naive = store.Append(
        tenant_id=tenant,
        kind="incident",
        stream_id=0,
        expected_version=0,
        events=[note("no time zone", datetime(2020, 1, 1))],  # noqa: DTZ001 - that is the fault
    )
    refused = notes(neighbour, "refused", reservation="nul \x00 in it")
    outcomes = await asyncio.gather(
        *start(appender, good, naive, good, refused, notes(neighbour, "good")), return_exceptions=True
    )
    assert len(watched.batches[0]) == 5
    assert [isinstance(o, Appended) for o in outcomes] == [True, False, True, False, True]
    assert isinstance(outcomes[1], TypeError)
    assert "invalid byte sequence" in str(outcomes[3])
    reader = await connect()
    assert (await messages(reader, tenant), await messages(reader, neighbour)) == (["good", "good"], ["good"])


class Instantly:
    """A fake database, for tests of the hand-over between callers and lanes."""

    def __init__(self, turns):
        self._turns = iter(turns)
        self._seqs = count(1)

    @asynccontextmanager
    async def connection(self, _seconds):
        await self._wait()
        yield None
        await self._wait()

    async def append_events(self, _connection, commands, *, wait):  # noqa: ARG002 - called by name
        await self._wait()
        return [Appended(1, 1, next(self._seqs), datetime.min) for _ in commands]  # noqa: DTZ901 - not looked at

    async def _wait(self):
        for _ in range(next(self._turns, 0)):
            await turn()


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=25),
    turns=st.lists(st.integers(0, 5), max_size=60),
    lanes=st.integers(1, 3),
    batch=st.integers(1, 4),
)
async def test_no_command_stays_in_the_queue(arrivals, turns, lanes, batch):
    fake = Instantly(turns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appender_module, "store", fake)
        appender = Appender(fake, lanes=lanes, batch=batch)  # type: ignore[arg-type]
        waiting = []
        for tenant_id, pause in arrivals:
            waiting += start(appender, notes(tenant_id, "x"))
            for _ in range(pause):
                await turn()
        async with asyncio.timeout(GENEROUS_SECONDS):
            await asyncio.gather(*waiting)
            await appender.drain()


async def test_a_cancelled_caller_does_not_cancel_the_append(watched, appender, connect, tenant):
    watched.gate.clear()
    (sent,) = start(appender, notes(tenant, "sent"))
    await watched.began.wait()
    queued, last = start(appender, notes(tenant, "queued"), notes(tenant, "last"))
    await turn()
    for task in (sent, queued):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    watched.gate.set()
    assert isinstance(await last, Appended)
    assert await messages(await connect(), tenant) == ["sent", "queued", "last"]


async def test_drain_writes_all_waiting_commands(watched, database, connect, tenant):
    appender = Appender(database, batch=2)
    waiting = start(appender, *(notes(tenant, str(i)) for i in range(9)))
    await turn()
    await appender.drain()
    assert len(await messages(await connect(), tenant)) == 9
    assert all(isinstance(outcome, Appended) for outcome in await asyncio.gather(*waiting))


async def test_a_held_ledger_head_delays_no_other_tenant(appender, owner, connect, tenant, neighbour):
    third = await new_tenant(owner, "third")
    one, other = await connect(), await connect()
    async with held(one, tenant), held(other, neighbour):
        stuck = start(appender, notes(tenant, "a"), notes(neighbour, "x"), notes(third, "0"))
        await stuck.pop()
        for i in range(1, 20):
            assert isinstance(await appender.append(notes(third, str(i))), Appended)
        assert not any(task.done() for task in stuck)
    assert [type(o) for o in await asyncio.gather(*stuck)] == [Appended, Appended]
    reader = await connect()
    assert await messages(reader, third) == [str(i) for i in range(20)]
    assert (await messages(reader, tenant), await messages(reader, neighbour)) == (["a"], ["x"])


async def test_waiting_too_long_for_a_ledger_head_records_nothing(appender, connect, tenant):
    holder = await connect()
    async with held(holder, tenant):
        for outcome in await asyncio.gather(
            *start(appender, notes(tenant, "a"), notes(tenant, "b")), return_exceptions=True
        ):
            assert type(outcome) is TenantBusy
    assert isinstance(await appender.append(notes(tenant, "c")), Appended)
    assert await messages(holder, tenant) == ["c"]

import asyncio
import json
import sys
from collections import Counter
from datetime import timedelta
from itertools import count
from pathlib import Path

import asyncpg
import pytest

from opsentry.events import store
from opsentry.events.store import Appended
from tests.events.ledger import ODD_TEXTS, append, blocked_backend, first_broken, messages, notes, rows
from tests.events.store_contract import StoreContract
from tests.waiting import GENEROUS_SECONDS

KILLED = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)
KILL_ONE = """
SELECT count(pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity WHERE pid <> ALL($1::int[]) AND datname = current_database()
    AND backend_type = 'client backend' ORDER BY random() LIMIT 1) AS victim
"""
SCRIPT = Path(__file__).with_name("appending_process.py")


class TestPostgresLog(StoreContract):
    pass


async def assert_whole(connection, tenant_id: int, length: int) -> None:
    ledger = await rows(connection, tenant_id)
    assert [row["position"] for row in ledger] == list(range(1, length + 1))
    assert await store.read_head_position(connection, tenant_id) == length
    assert first_broken(ledger) is None
    versions: dict[tuple[str, int], list[int]] = {}
    for row in ledger:
        versions.setdefault((row["stream_kind"], row["stream_id"]), []).append(row["version"])
    for numbers in versions.values():
        assert numbers == list(range(1, len(numbers) + 1))


async def test_a_backend_killed_in_the_middle_of_an_append_leaves_nothing_behind(owner, connect, tenant):
    # The wait must outlast the kill, however busy the machine is.
    await owner.execute("ALTER FUNCTION append_events SET lock_timeout = '60s'")
    appender, victim = await connect(), await connect()
    await append(appender, notes(tenant, "before", stream=1))
    await owner.execute("BEGIN")
    await owner.execute("INSERT INTO reservations VALUES ($1, 'name', 'incident', 77)", tenant)
    # The first command of the batch has been appended when the second one meets the reservation.
    batch = [notes(tenant, "lost", "lost", stream=1, expected=1), notes(tenant, "lost", reservation="name")]
    append_under_way = asyncio.create_task(store.append_events(victim, batch, wait=False))
    pid = await blocked_backend(appender)
    assert pid == victim.get_server_pid()
    await owner.execute("SELECT pg_terminate_backend($1)", pid)
    with pytest.raises(KILLED):
        await append_under_way
    await owner.execute("ROLLBACK")
    await append(appender, notes(tenant, "after", stream=1, expected=1))
    await assert_whole(appender, tenant, 2)
    assert await messages(appender, tenant) == ["before", "after"]


async def test_killed_backends_lose_no_acknowledged_append(owner, connect, tenant):
    watcher = await connect()
    spared = [watcher.get_server_pid(), owner.get_server_pid()]
    answered: dict[int, str] = {}
    unanswered: set[str] = set()
    progress = asyncio.Event()

    async def write(number):
        connection = None
        for i in count():
            if killing.done():
                return
            text = f"{number}/{i}"
            try:
                connection = connection or await connect()
                outcome = await append(connection, notes(tenant, text, text))
            except KILLED:
                unanswered.add(text)
                connection = None
            else:
                assert isinstance(outcome, Appended)
                answered[outcome.position] = text
                progress.set()

    async def kill():
        killed = 0
        while killed < 40:
            progress.clear()
            await progress.wait()
            killed += await owner.fetchval(KILL_ONE, spared)

    killing = asyncio.create_task(kill())
    async with asyncio.timeout(60):
        await asyncio.gather(killing, *map(write, range(4)))
    texts = await messages(watcher, tenant)
    await assert_whole(watcher, tenant, len(texts))
    assert {position: texts[position - 1] for position in answered} == answered
    assert set(Counter(texts).values()) == {2}
    assert set(texts) - set(answered.values()) <= unanswered


async def run_process(url: str, *arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, SCRIPT, url, *map(str, arguments), stdout=asyncio.subprocess.PIPE
    )


async def answers(process: asyncio.subprocess.Process) -> list[tuple[str, int, int]]:
    assert process.stdout is not None
    return [tuple(json.loads(line)) async for line in process.stdout]


@pytest.mark.parametrize("streams", [1, 16])
async def test_four_processes_with_64_writers_lose_and_duplicate_nothing(parts, settings, acme, connect, streams):
    reader = await connect()
    begun = await store.read_head_position(reader, acme.id)
    stream_ids = []
    for _ in range(streams):
        opened = await append(reader, notes(acme.id, "begin"))
        assert isinstance(opened, Appended)
        stream_ids.append(opened.stream_id)
    processes = [await run_process(settings.database_url, acme.id, p, 16, 3, *stream_ids) for p in range(4)]
    said = [answer for each in await asyncio.gather(*map(answers, processes)) for answer in each]
    assert [await process.wait() for process in processes] == [0, 0, 0, 0]
    written = {f"{p}/{w}/{i}" for p in range(4) for w in range(16) for i in range(3)}
    assert Counter(text for text, _, _ in said) == dict.fromkeys(written, 1)
    recorded = await store.read_after(reader, acme.id, begun + streams, 10_000)
    assert {(r.event.message, r.position, r.version) for r in recorded} == set(said)  # type: ignore[union-attr]
    await assert_whole(reader, acme.id, begun + streams + len(written))


async def test_a_killed_process_loses_no_acknowledged_append(parts, settings, acme, connect):
    reader = await connect()
    opened = await append(reader, notes(acme.id, "begin"))
    assert isinstance(opened, Appended)
    url = f"{settings.database_url}&application_name=victim"
    process = await run_process(url, acme.id, 0, 16, 1000, opened.stream_id)
    assert process.stdout is not None
    said = [tuple(json.loads(await process.stdout.readline())) for _ in range(40)]
    process.kill()
    said += [tuple(json.loads(line)) async for line in process.stdout if line.endswith(b"\n")]
    assert await process.wait() < 0
    # The server may still be committing an append of the killed process.
    async with asyncio.timeout(GENEROUS_SECONDS):
        while await reader.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'victim'"):
            pass
    recorded = {
        (r.event.message, r.position, r.version)  # type: ignore[union-attr]
        for r in await store.read_stream(reader, acme.id, "incident", opened.stream_id, after=1)
    }
    assert set(said) <= recorded
    await assert_whole(reader, acme.id, opened.position + len(recorded))


async def test_columns_hold_the_exact_text(connect, tenant):
    appender = await connect()
    for number, text in enumerate(ODD_TEXTS, 1):
        await append(appender, notes(tenant, text, stream=number))
    for row, text in zip(await rows(appender, tenant), ODD_TEXTS, strict=True):
        assert json.loads(row["erasable"]) == {"message": text}
        assert row["data"] == '{"erasable":["message"],"is_public":true,"source":null,"status":"monitoring"}'
        assert row["meta"] == '{"actor":{"kind":"operator"}}'


async def test_recorded_at_increases_when_the_clock_goes_back(owner, connect, tenant):
    appender = await connect()
    ahead = await owner.fetchval(
        "UPDATE ledger_heads SET recorded_at = now() + interval '1 hour' WHERE tenant_id = $1 RETURNING recorded_at",
        tenant,
    )
    for stream in (1, 2):
        await append(appender, notes(tenant, "a", "b", stream=stream))
    moments = [row["recorded_at"] for row in await rows(appender, tenant)]
    assert moments == [ahead + timedelta(microseconds=number) for number in range(1, 5)]
    await assert_whole(appender, tenant, 4)


async def test_an_append_locks_rows_of_its_tenant_only(owner, connect, tenant, neighbour):
    one, other = await connect(), await connect()
    first, second = one.transaction(), other.transaction()
    await first.start()
    await append(one, notes(tenant, "a", reservation="name"), wait=False)
    await second.start()
    await append(other, notes(neighbour, "x", reservation="name"), wait=False)
    locks = await owner.fetch("SELECT * FROM pg_locks WHERE pid = $1", one.get_server_pid())
    assert {lock["locktype"] for lock in locks} == {"relation", "transactionid", "virtualxid"}
    modes = {lock["mode"] for lock in locks if lock["locktype"] == "relation"}
    assert modes <= {"AccessShareLock", "RowShareLock", "RowExclusiveLock"}
    await second.commit()
    await first.commit()


async def test_the_database_sends_no_notifications(owner):
    # NOTIFY takes a lock that serialises all commits of the cluster.
    assert await owner.fetchval("SELECT count(*) FROM pg_proc WHERE prosrc ILIKE '%append%'") > 0
    sources = await owner.fetch("SELECT prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace")
    assert not [row for row in sources if "notify" in row["prosrc"].lower()]

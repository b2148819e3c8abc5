"""Server processes under load: clients read their own writes, and SIGTERM loses no request."""

import asyncio
import signal

import aiohttp

from tests.conftest import Client
from tests.system.load import Load, check_ledgers, check_read_models, prepare
from tests.system.processes import server
from tests.waiting import until

RESPONSES = 640

# Looks at all databases: a lock on a transaction belongs to none, and the server has no other load.
WAITING = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"


async def test_64_concurrent_clients_read_their_own_writes(settings, owner, http):
    tenants = await prepare(settings, 8)
    async with server(settings) as (process, url):
        async with Load(url, tenants, clients=64) as load:
            await load.answered(RESPONSES)
        assert load.count() == load.count(201) == len(load.answers)
        assert load.count() >= RESPONSES
        assert set(load.reads) == {200}
        assert load.unseen == []
        marks = await check_ledgers(owner, tenants, load.answers)
        assert len(marks) == load.count(201)
        for tenant in tenants:
            await check_read_models(owner, Client(http, url, tenant.token), tenant)
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 0
        assert process.said.count("\n") == 1, process.said


async def test_a_write_that_one_server_acknowledged_shows_on_another_at_once(settings, http):
    (tenant,) = await prepare(settings, 1)
    async with server(settings) as (_, first), server(settings) as (_, second):
        apis = [Client(http, url, tenant.token) for url in (first, second)]

        async def conversation(number):
            missed = []
            for turn in range(20):
                here, there = apis if (number + turn) % 2 else reversed(apis)
                status, made, headers = await here.post("/incidents", {"title": f"{number}/{turn}"})
                assert status == 201
                _, read, read_headers = await there.get(f"/incidents/{made['id']}")
                _, listed, _ = await there.get("/incidents?limit=200")
                status, _, _ = await there.post(f"/incidents/{made['id']}/resolve")
                assert status == 200
                _, active, _ = await here.get("/incidents/active")
                if read["title"] != made["title"] or read_headers["ETag"] != headers["ETag"]:
                    missed.append(("read", number, turn))
                if made["id"] not in {one["id"] for one in listed["incidents"]}:
                    missed.append(("list", number, turn))
                if made["id"] in {one["id"] for one in active["incidents"]}:
                    missed.append(("active", number, turn))
            return missed

        found = await asyncio.gather(*map(conversation, range(6)))
    assert [missed for missed in found if missed] == []


async def test_two_servers_change_one_incident_at_once_and_lose_nothing(settings, http):
    (tenant,) = await prepare(settings, 1)
    async with server(settings) as (_, first), server(settings) as (_, second):
        apis = [Client(http, url, tenant.token) for url in (first, second)]
        _, incident, _ = await apis[0].post("/incidents", {"title": "One"})
        path = f"/incidents/{incident['id']}"
        answers = await asyncio.gather(
            *(apis[number % 2].post(f"{path}/updates", {"message": f"{number}"}) for number in range(40))
        )
        assert {status for status, _, _ in answers} == {201}
        _, read, _ = await apis[1].get(path)
    assert sorted(int(update["message"]) for update in read["updates"]) == list(range(40))
    assert read["updates"] == sorted(read["updates"], key=lambda update: update["id"])


async def test_sigterm_lets_a_request_in_flight_finish(settings, acme, owner):
    async with server(settings) as (process, url), aiohttp.ClientSession() as session:
        # A lock on the ledger head makes the server wait.
        async with owner.transaction():
            await owner.execute("SELECT FROM ledger_heads FOR UPDATE")
            last = asyncio.create_task(Client(session, url, acme.token).post("/incidents", {"title": "The last one"}))
            await until(lambda: owner.fetchval(WAITING))
            process.process.send_signal(signal.SIGTERM)
            await refused(int(url.rpartition(":")[2]))
        status, made, _ = await last
        assert (status, made["title"]) == (201, "The last one")
        assert await process.ended() == 0


async def refused(port):
    """Wait until the port refuses connections."""

    async def refuses():
        try:
            _, appender = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            return False  # the connection came between the last accept and the close of the socket
        appender.close()
        return False

    await until(refuses)


async def test_sigterm_with_idle_connections_ends_at_once(settings, acme):
    async with server(settings) as (process, url), aiohttp.ClientSession() as session:
        status, _, _ = await Client(session, url, acme.token).get("/incidents")
        assert status == 200
        process.process.send_signal(signal.SIGTERM)
        assert await process.ended() == 0

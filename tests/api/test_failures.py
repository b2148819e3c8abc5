"""Dependencies that are down or frozen: a clear answer in a bounded time, and recovery without restart."""

import asyncio
import os
import signal
import time
from dataclasses import replace

import asyncpg
import psutil
import pytest

from opsentry.application import readiness
from opsentry.bootstrap import core, serving
from opsentry.demo.embedded import APP_USER, EmbeddedPostgres, EmbeddedValkey
from opsentry.infrastructure.migrations import migrate, migrations
from tests.conftest import Client, make_tenant
from tests.waiting import GENEROUS_SECONDS, stretched, until


@pytest.fixture
async def own_postgres(tmp_path):
    """A server of this test's own, which may be stopped and frozen."""
    server = EmbeddedPostgres(tmp_path / "postgres")
    server.start()
    connection = await asyncpg.connect(server.url("postgres"))
    await connection.execute("CREATE DATABASE opsentry")
    await connection.close()
    connection = await asyncpg.connect(server.url())
    await migrate(connection, migrations())
    await connection.execute(f"CREATE ROLE {APP_USER} LOGIN IN ROLE opsentry_app")
    await connection.close()
    yield server
    server.stop("immediate")


@pytest.fixture
async def own_valkey(tmp_path):
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def stack(monkeypatch, settings, own_postgres, own_valkey, http):
    monkeypatch.setattr(readiness, "CACHE_SECONDS", 0.0)
    own = replace(
        settings, database_url=own_postgres.url(user=APP_USER), redis_url=own_valkey.url, request_body_timeout_seconds=1
    )
    async with core(own) as parts, serving(own, parts) as url:
        tenant = await make_tenant(parts, "acme")
        yield Client(http, url, tenant.token)


async def timed(call):
    began = time.monotonic()
    answer = await call
    return *answer, time.monotonic() - began


async def assert_database_down(api):
    for call in (api.get("/incidents"), api.post("/incidents", {"title": "T"}), api.get("/services/1/uptime")):
        status, body, headers, seconds = await timed(call)
        assert (status, set(body)) == (503, {"error", "request_id"})
        assert headers["Retry-After"] == "1"
        assert body["request_id"] == headers["X-Request-ID"]
        assert seconds < stretched(2)
    status, _, _, seconds = await timed(api.send("GET", "/health"))
    assert status == 200
    status, body, _, seconds = await timed(api.send("GET", "/health/ready"))
    assert (status, body["status"]) == (503, "unavailable")
    assert (body["checks"]["postgres"]["status"], body["checks"]["redis"]["status"]) == ("fail", "ok")
    assert seconds < stretched(1)


async def until_ready(api):
    async def ready():
        return (await api.send("GET", "/health/ready"))[0] == 200

    await until(ready)


@pytest.mark.production_timeouts
async def test_a_stopped_database_is_said_and_its_return_is_noticed(stack, own_postgres):
    assert (await stack.post("/incidents", {"title": "before"}))[0] == 201
    own_postgres.stop("immediate")
    await assert_database_down(stack)
    own_postgres.start()
    await until_ready(stack)
    assert (await stack.post("/incidents", {"title": "after"}))[0] == 201
    assert [i["title"] for i in (await stack.get("/incidents"))[1]["incidents"]] == ["after", "before"]


@pytest.mark.production_timeouts
async def test_a_frozen_database_is_said_and_its_return_is_noticed(stack, own_postgres):
    assert (await stack.post("/incidents", {"title": "before"}))[0] == 201
    postmaster = psutil.Process(own_postgres.pid)
    frozen = [postmaster, *postmaster.children()]
    for process in frozen:
        process.suspend()
    try:
        await assert_database_down(stack)
    finally:
        for process in frozen:
            process.resume()
    await until_ready(stack)
    assert (await stack.post("/incidents", {"title": "after"}))[0] == 201
    titles = [i["title"] for i in (await stack.get("/incidents"))[1]["incidents"]]
    # The server may have carried out the request that arrived during the freeze, but only once.
    assert titles in (["after", "before"], ["after", "T", "before"])


@pytest.mark.production_timeouts
async def test_a_server_starts_while_the_database_is_down(settings, own_postgres, own_valkey, http, monkeypatch):
    monkeypatch.setattr(readiness, "CACHE_SECONDS", 0.0)
    own = replace(settings, database_url=own_postgres.url(user=APP_USER), redis_url=own_valkey.url)
    async with core(own) as parts:
        tenant = await make_tenant(parts, "acme")
    own_postgres.stop()
    async with core(own) as parts, serving(own, parts) as url:
        api = Client(http, url, tenant.token)
        await assert_database_down(api)
        own_postgres.start()
        await until_ready(api)
        assert (await api.get("/incidents"))[0] == 200


@pytest.mark.production_timeouts
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_without_redis_requests_go_on_and_readiness_says_so(stack, own_valkey, number):
    assert (await stack.get("/incidents"))[0] == 200
    os.kill(own_valkey.pid, number)
    for _ in range(20):
        status, _, headers = await stack.get("/incidents")
        assert status == 200
        assert "RateLimit" in headers
    status, body, _ = await stack.send("GET", "/health/ready")
    assert (status, body["checks"]["redis"]["status"], body["checks"]["postgres"]["status"]) == (503, "fail", "ok")
    if number == signal.SIGSTOP:
        os.kill(own_valkey.pid, signal.SIGCONT)
        await until_ready(stack)


async def test_a_body_that_trickles_in_is_cut(stack):
    host, port = stack.base_url.removeprefix("http://").split(":")
    reader, appender = await asyncio.open_connection(host, int(port))
    head = f"POST /api/v1/incidents HTTP/1.1\r\nHost: x\r\nAuthorization: {stack.headers['Authorization']}\r\n"
    appender.write(f"{head}Content-Type: application/json\r\nContent-Length: 40\r\n\r\n".encode() + b'{"title": ')
    async with asyncio.timeout(GENEROUS_SECONDS):
        answer = await reader.read()  # to the end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":"the request body did not arrive in time"}' in answer
    appender.close()
    assert (await stack.get("/incidents"))[1]["total"] == 0


@pytest.mark.production_timeouts
async def test_a_created_resource_is_found_while_projections_are_blocked(api, parts, acme, owner):
    await parts.projector.catch_up(acme.id, 0)
    window = {"title": "Drill", "scheduled_start": "2036-06-01T02:00:00Z", "scheduled_end": "2036-06-01T04:00:00Z"}
    async with owner.transaction():
        await owner.execute("SELECT FROM checkpoints WHERE tenant_id = $1 FOR UPDATE", acme.id)
        for path, body in (("/incidents", {"title": "Down", "description": "d"}), ("/maintenance", window)):
            _, made, told = await api.post(path, body)
            status, found, headers = await api.get(f"{path}/{made['id']}")
            assert (status, headers["ETag"], headers["Opsentry-Position"]) == (
                200,
                told["ETag"],
                told["Opsentry-Position"],
            )
            assert {name: found[name] for name in made} == made
            assert (await api.get(f"{path}/987654321"))[:2] == (404, {"error": "not found"})
        # A service is known from its read model alone, so it cannot be denied while that lags.
        status, _, headers = await api.get("/services/987654321")
        assert (status, headers["Retry-After"]) == (503, "1")
    assert (await api.get("/services/987654321"))[0] == 404

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
import structlog

from opsentry.api.v1 import OPERATIONS
from opsentry.bootstrap import serving
from opsentry.identity import operator_tokens, tokens
from opsentry.infrastructure import single_flight
from opsentry.infrastructure.postgres import DatabaseUnavailable
from opsentry.projections.engine import management
from tests.api.conftest import make_operator, raw
from tests.conftest import Client, expire_caches
from tests.projections.planting import plant

PATHS = ("/ops/projections", "/ops/projections/halted", "/ops/outbox")
NAMES = ["impact", "incidents", "maintenance", "outbox", "services", "subscriptions"]
MESSAGE = "missing, unknown, expired or revoked API token"


async def answers(client, **options):
    return [await client.send("GET", path, **options) for path in PATHS]


async def revoke(parts, value):
    async with parts.database.connection() as connection:
        await operator_tokens.revoke_operator_token(connection, tokens.public_prefix(value))


async def test_how_read_models_stand_over_all_tenants(operator, api, other_api, parts, acme, globex, owner):
    await api.post("/incidents", {"title": "Down"})
    await parts.projector.catch_up(globex.id, 0)
    await owner.execute("UPDATE checkpoints SET rebuilt_at = '2026-01-02T03:04:05.678901+02'")
    status, body, headers = await operator.send("GET", "/ops/projections")
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert headers["Cache-Control"] == "no-store"
    found = await management.projection_status(owner, parts.projector.projections)
    assert body == {"projections": msgspec.to_builtins([dict(row) for row in found])}
    rows = body["projections"]
    assert [row["projection"] for row in rows] == NAMES
    assert {(row["tenants"], row["up_to_date"], row["lagging"], row["halted"]) for row in rows} == {(2, 2, 0, 0)}
    assert {row["rebuilt_at"] for row in rows} == {"2026-01-02T01:04:05.678901Z"}


async def test_halted_projections_are_listed_with_their_event(monkeypatch, operator, api, parts, acme, owner):
    assert (await operator.send("GET", "/ops/projections/halted"))[1] == {"halted": []}
    _, incident, _ = await api.post("/incidents", {"title": "Down"})
    position = await plant(owner, acme.id, incident["id"], 2, type="incident.exploded")
    await parts.projector.catch_up(acme.id, 0)
    expire_caches(monkeypatch)
    found = (await operator.send("GET", "/ops/projections/halted"))[1]["halted"]
    assert [row["projection"] for row in found] == ["impact", "incidents", "outbox"]
    assert {(row["slug"], row["tenant_id"], row["position"]) for row in found} == {("acme", acme.id, position)}
    assert all("incident.exploded" in row["error"] for row in found)


async def test_concurrent_requests_share_one_query(monkeypatch, http, settings, parts):
    began, may_end = asyncio.Semaphore(0), asyncio.Event()
    query = management.projection_status
    asked = 0

    async def slow(*arguments):
        nonlocal asked
        asked += 1
        began.release()
        await may_end.wait()
        return await query(*arguments)

    monkeypatch.setattr(management, "projection_status", slow)
    monkeypatch.setattr("opsentry.application.operator_queries.CACHE_SECONDS", 3600.0)
    values = [await make_operator(parts), await make_operator(parts)]
    async with serving(settings, parts) as url:
        clients = [Client(http, url, value) for value in values] * 5
        waiting = [asyncio.create_task(client.send("GET", "/ops/projections")) for client in clients]
        await began.acquire()
        # Other endpoints answer meanwhile, and a client that disconnects does not end the shared query.
        assert (await clients[0].send("GET", "/ops/projections/halted"))[0] == 200
        waiting.pop().cancel()
        may_end.set()
        assert {(await one)[0] for one in waiting} == {200}
        assert (await clients[0].send("GET", "/ops/projections"))[0] == 200
        assert asked == 1
        expire_caches(monkeypatch)
        assert (await clients[0].send("GET", "/ops/projections"))[0] == 200
        assert asked == 2


async def test_a_database_that_is_lost_is_said_and_its_return_is_noticed(monkeypatch, http, settings, parts):
    query = management.projection_status
    lost = True

    async def standing(*arguments):
        if lost:
            raise DatabaseUnavailable("database: gone")
        return await query(*arguments)

    monkeypatch.setattr(management, "projection_status", standing)
    async with serving(settings, parts) as url:
        client = Client(http, url, await make_operator(parts))
        status, body, headers = await client.send("GET", "/ops/projections")
        assert (status, body["request_id"]) == (503, headers["X-Request-ID"])
        assert headers["Retry-After"] == "1"
        assert "gone" not in body["error"]
        lost = False
        assert (await client.send("GET", "/ops/projections"))[0] == 200


async def test_every_bad_token_is_the_same_401(anonymous, parts, acme):
    expired = await make_operator(parts, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    revoked = await make_operator(parts)
    await revoke(parts, revoked)
    works = await make_operator(parts)
    values = [
        tokens.generate_token(operator_tokens.OPERATOR_TOKEN_MARK),
        expired,
        revoked,
        acme.token,
        "opo_" + acme.token[4:],
        "ops_" + works[4:],
    ]
    sent = [{}, {"Authorization": works}, *({"Authorization": f"Bearer {value}"} for value in values)]
    for headers in sent:
        for status, body, answered in await answers(anonymous, headers=headers):
            assert (status, body) == (401, {"error": MESSAGE}), headers
            assert answered["WWW-Authenticate"] == 'Bearer realm="opsentry"'
            assert "RateLimit" not in answered


async def test_an_operators_token_opens_nothing_of_a_tenants(operator, things):
    for method, path in ((o.method, o.path.removeprefix("/api/v1")) for o in OPERATIONS):
        where = path.replace("{id}", "1").replace("{delivery_id}", f"msg_{1:032x}")
        assert await raw(operator, method, where) == (401, b'{"error":"%s"}' % MESSAGE.encode()), (method, path)
    assert (await operator.get("/ops/projections"))[0] == 404


async def test_a_revoked_token_stops_working_within_five_seconds(monkeypatch, http, settings, parts):
    now = 1000.0

    class Clock:
        @staticmethod
        def monotonic():
            return now

    monkeypatch.setattr(single_flight, "time", Clock)
    value = await make_operator(parts)
    async with serving(settings, parts) as one, serving(settings, parts) as other:
        clients = [Client(http, url, value) for url in (one, other)]
        assert [(await client.send("GET", PATHS[0]))[0] for client in clients] == [200, 200]
        await revoke(parts, value)
        now += 5
        assert [(await client.send("GET", PATHS[0]))[0] for client in clients] == [401, 401]


@pytest.mark.parametrize("path", PATHS)
async def test_nothing_can_be_changed(operator, path):
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        status, body, headers = await operator.send(method, path)
        assert (status, body, headers["Allow"]) == (405, {"error": "method not allowed"}, "GET, HEAD")
    status, body, headers = await operator.send("HEAD", path)
    assert (status, body, headers["Cache-Control"]) == (200, None, "no-store")
    assert int(headers["Content-Length"]) > 0
    for nothing in ("/ops", f"{path}/", f"{path}/1"):
        assert (await operator.send("GET", nothing))[:2] == (404, {"error": "not found"})


async def test_the_log_says_which_token_asked_and_not_its_secret(operator):
    value = operator.headers["Authorization"].removeprefix("Bearer ")
    with structlog.testing.capture_logs() as lines:
        _, _, headers = await operator.send("GET", "/ops/projections")
    assert lines == [
        {
            "event": "operator_request",
            "log_level": "info",
            "path": "/ops/projections",
            "request_id": headers["X-Request-ID"],
            "token_prefix": tokens.public_prefix(value),
        }
    ]

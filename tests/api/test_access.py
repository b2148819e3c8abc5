import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

import pytest

from opsentry.access import tokens
from opsentry.api.app import ROUTES
from opsentry.wiring import serving
from tests.conftest import META, Client, make_service

WINDOW = {"title": "W", "scheduled_start": "2036-06-01T02:00:00Z", "scheduled_end": "2036-06-01T04:00:00Z"}
NOT_FOUND = b'{"error":"not found"}'
BAD_IDS = ["0", "-1", "abc", "01", "1.0", "9223372036854775808", "99999999999999999999", "%31x", "1%00", "%C2%B9"]


async def make_token(parts, tenant_id, *scopes, **fields):
    async with parts.database.connection() as connection:
        return await tokens.create(connection, tenant_id, name="t", scopes=scopes, meta=META, **fields)


@pytest.fixture
async def things(api, parts, acme):
    """One of each, of tenant acme."""
    service = await make_service(parts, acme.id, "main-api", name="CANARY")
    _, incident, _ = await api.post(
        "/incidents", {"title": "CANARY", "description": "CANARY", "service_ids": [service]}
    )
    _, window, _ = await api.post("/maintenance", {**WINDOW, "title": "CANARY"})
    return {"services": service, "incidents": incident["id"], "maintenance": window["id"]}


def paths_of(kind):
    for method, path, _, _ in ROUTES:
        if path.startswith(f"/{kind}/{{id}}"):
            yield method, path.replace("{action}", "start")


async def raw(client, method, path):
    body = {"json": {"message": "m", "title": "T"}} if method != "GET" else {}
    url = f"{client.base_url}/api/v1{path}"
    async with client.session.request(method, url, headers=client.headers, **body) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("kind", ["services", "incidents", "maintenance"])
async def test_foreign_missing_and_impossible_ids_are_the_same_404(api, other_api, things, kind):
    for method, path in paths_of(kind):
        for bad in [*BAD_IDS, "987654321"]:
            assert await raw(api, method, path.replace("{id}", bad)) == (404, NOT_FOUND), (method, path, bad)
        assert await raw(other_api, method, path.replace("{id}", str(things[kind]))) == (404, NOT_FOUND)


async def test_no_answer_of_one_tenant_shows_anything_of_another(api, other_api, things):
    paths = ["/services", "/incidents", "/incidents/active", "/maintenance", "/maintenance/upcoming", "/health"]
    paths += [f"/{kind}/{number}" for kind in things for number in range(1, 20)]
    for path in paths:
        _, answer = await raw(other_api, "GET", path)
        assert b"CANARY" not in answer
    assert (await api.get("/incidents"))[1]["total"] == 1


async def test_services_of_another_tenant_are_as_unknown_as_those_that_never_were(other_api, things):
    body = {"title": "T", "service_ids": [things["services"], 987654321]}
    status, answer, _ = await other_api.post("/incidents", body)
    assert status == 400
    assert answer == {"error": f"service_ids: no such service: {things['services']}, 987654321"}


async def test_the_token_says_what_it_carries(http, base_url, parts, acme):
    value = await make_token(parts, acme.id, "write:incidents", "read:status")
    status, body, _ = await Client(http, base_url, value).get("/health")
    assert status == 200
    assert body == {
        "ok": True,
        "tenant_id": acme.id,
        "token_prefix": value[4:12],
        "scopes": ["read:status", "write:incidents"],
    }


async def test_every_route_wants_its_scope_and_no_other(http, base_url, parts, acme, things):
    for scope in tokens.SCOPES:
        client = Client(http, base_url, await make_token(parts, acme.id, scope))
        for method, path, needed, _ in ROUTES:
            where = path.replace("{id}", "987654321").replace("{action}", "start")
            status, answer = await raw(client, method, where)
            if needed in {None, scope}:
                assert status != 403, (scope, method, path)
            else:
                assert (status, answer) == (403, b'{"error":"missing required scope: %s"}' % needed.encode())


async def test_every_bad_token_is_the_same_401(http, base_url, parts, acme):
    expired = await make_token(parts, acme.id, "read:status", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    revoked = await make_token(parts, acme.id, "read:status")
    async with parts.database.connection() as connection:
        await tokens.revoke(connection, acme.id, tokens.prefix(revoked), META)
    answers = set()
    for value in (None, "", "nonsense", "ops_" + "0" * 56, tokens.mint(), expired, revoked, acme.token[:-1] + "x"):
        status, body, headers = await Client(http, base_url, value).get("/incidents")
        answers.add((status, body["error"], headers["WWW-Authenticate"]))
    basic = {"Authorization": f"Basic {acme.token}"}
    status, body, headers = await Client(http, base_url, None).get("/incidents", headers=basic)
    answers.add((status, body["error"], headers["WWW-Authenticate"]))
    message = "missing, unknown, expired or revoked API token"
    assert answers == {(401, message, 'Bearer realm="opsentry"')}


async def test_a_revoked_token_stops_working_once_it_is_forgotten(monkeypatch, http, settings, parts, acme):
    monkeypatch.setattr(tokens, "CACHE_SECONDS", 0.0)
    assert tokens.CACHE_SECONDS < 5
    async with serving(settings, parts) as url:
        client = Client(http, url, acme.token)
        assert (await client.get("/health"))[0] == 200
        async with parts.database.connection() as connection:
            await tokens.revoke(connection, acme.id, tokens.prefix(acme.token), META)
        assert (await client.get("/health"))[0] == 401


async def test_what_was_looked_up_is_believed_for_less_than_five_seconds():
    assert 0 < tokens.CACHE_SECONDS < 5


async def test_no_token_is_in_the_database_and_their_coming_and_going_is_on_the_record(owner, parts, acme):
    async with parts.database.connection() as connection:
        await tokens.revoke(connection, acme.id, tokens.prefix(acme.token), META)
    tables = await owner.fetch("SELECT relname FROM pg_stat_user_tables")
    for row in tables:
        text = await owner.fetchval(f"SELECT string_agg(t::text, '') FROM {row['relname']} t")
        assert acme.token not in (text or "")
        assert acme.token[12:52] not in (text or "")
    types = await owner.fetch("SELECT type FROM events WHERE tenant_id = $1 ORDER BY seq", acme.id)
    assert [row["type"] for row in types] == ["tenant.created", "token.created", "token.revoked"]


async def test_the_rate_limit_counts_each_token_and_says_how_it_stands(http, limited_settings, parts, acme, globex):
    async with serving(limited_settings, parts) as url:
        client = Client(http, url, acme.token)
        answers = [await client.get("/incidents") for _ in range(7)]
        assert [status for status, _, _ in answers] == [200] * 5 + [429] * 2
        assert [headers["RateLimit"].split(";")[1] for _, _, headers in answers[:5]] == [
            f"r={n}" for n in range(4, -1, -1)
        ]
        assert answers[0][2]["RateLimit-Policy"] == '"default";q=5;w=60'
        _, body, headers = answers[-1]
        assert set(body) == {"error"}
        assert 1 <= int(headers["Retry-After"]) <= 60
        assert (await Client(http, url, globex.token).get("/incidents"))[0] == 200


async def test_failed_authentications_have_a_limit_of_their_own(http, limited_settings, parts, acme):
    async with serving(limited_settings, parts) as url:
        stranger = Client(http, url, tokens.mint())
        assert [(await stranger.get("/incidents"))[0] for _ in range(5)] == [401] * 3 + [429] * 2
        assert (await Client(http, url, acme.token).get("/incidents"))[0] == 200


async def test_forwarded_addresses_are_believed_only_from_proxies(http, limited_settings, parts, acme):
    async def statuses(settings):
        async with serving(settings, parts) as url:
            client = Client(http, url, acme.token)
            spread = [{"X-Forwarded-For": f"203.0.113.{n}"} for n in range(8)]
            return [(await client.get("/health", headers=headers))[0] for headers in spread]

    assert (await statuses(replace(limited_settings, rate_limit="4/minute"))).count(429) == 4
    trusting = replace(limited_settings, trusted_proxies=(ip_network("127.0.0.0/8"),))
    assert await statuses(trusting) == [200] * 8


async def test_two_processes_share_one_limit(http, limited_settings, parts, acme, settings):
    limit = replace(limited_settings, rate_limit="50/minute")
    async with serving(limit, parts) as one, serving(limit, parts) as two:
        clients = [Client(http, url, acme.token) for url in (one, two)]
        passed = 0
        for turn in range(200):
            status, _, _ = await clients[turn % 2].get("/health")
            passed += status == 200
            await asyncio.sleep(0)
        # What reaches one process before it hears of the other's is let through; here, a few in twenty milliseconds.
        assert 50 <= passed < 100

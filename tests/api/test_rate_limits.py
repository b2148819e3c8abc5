import asyncio
import os
import signal
from dataclasses import replace
from ipaddress import ip_network

import pytest

from opsentry.bootstrap import serving
from opsentry.demo.embedded import EmbeddedValkey
from opsentry.identity import api_tokens, tokens
from opsentry.infrastructure import rate_limit
from opsentry.infrastructure.redis import connect
from tests.api.conftest import make_operator
from tests.conftest import Client
from tests.waiting import GENEROUS_SECONDS


@pytest.fixture(autouse=True)
async def empty_buckets(valkey):
    """ApiTokens of all tests have the same few ids, so what another test counted must go."""
    client = connect(valkey.url, GENEROUS_SECONDS)
    await client.flushdb()
    await client.aclose()


async def statuses(client, count, **options):
    return [(await client.get("/health", **options))[0] for _ in range(count)]


async def test_each_answer_says_how_the_bucket_stands(http, limited_settings, parts, acme, globex):
    async with serving(limited_settings, parts) as url:
        client = Client(http, url, acme.token)
        answers = [await client.get("/incidents") for _ in range(7)]
        assert [status for status, _, _ in answers] == [200] * 5 + [429] * 2
        assert [headers["RateLimit"].split(";")[1] for _, _, headers in answers] == [
            f"r={left}" for left in (4, 3, 2, 1, 0, 0, 0)
        ]
        for _, _, headers in answers:
            assert headers["RateLimit-Policy"] == '"default";q=5;w=60'
            assert 1 <= int(headers["RateLimit"].split("t=")[1]) <= 60
        _, body, headers = answers[-1]
        assert body == {"error": "rate limit of 5 requests in 60 s exceeded"}
        assert headers["Retry-After"] == headers["RateLimit"].split("t=")[1]
        assert headers["X-Request-ID"]
        assert (await Client(http, url, globex.token).get("/incidents"))[0] == 200


async def test_refused_requests_and_errors_count_and_probes_do_not(http, limited_settings, parts, acme):
    async with serving(limited_settings, parts) as url:
        client = Client(http, url, acme.token)
        await asyncio.gather(*(client.send("GET", "/health") for _ in range(20)))
        assert (await client.get("/incidents/1"))[0] == 404
        assert (await client.post("/incidents", {}))[0] == 400
        assert (await client.get("/incidents?limit=x"))[0] == 400
        status, _, headers = await client.patch("/incidents/1", {"title": "T"})
        assert (status, headers["RateLimit"].split(";")[1]) == (404, "r=1")
        assert await statuses(client, 2) == [200, 429]


async def test_a_limit_is_all_endpoints_together(http, limited_settings, parts, acme):
    async with serving(limited_settings, parts) as url:
        client = Client(http, url, acme.token)
        for path in ("/incidents", "/services", "/maintenance", "/incidents/active", "/health"):
            assert (await client.get(path))[0] == 200
        assert (await client.post("/incidents", {"title": "T"}))[0] == 429
    assert (await parts.database.fetchrow("SELECT count(*) AS n FROM incidents"))["n"] == 0


async def test_failed_authentications_have_a_limit_of_their_own(http, limited_settings, parts, acme):
    async with serving(limited_settings, parts) as url:
        stranger = Client(http, url, tokens.generate_token(api_tokens.API_TOKEN_MARK))
        answers = [await stranger.get("/incidents") for _ in range(5)]
        assert [status for status, _, _ in answers] == [401] * 3 + [429] * 2
        assert answers[-1][2]["RateLimit-Policy"] == '"default";q=3;w=60'
        assert 1 <= int(answers[-1][2]["Retry-After"]) <= 60
        assert await statuses(Client(http, url, None), 1) == [429]  # whatever is wrong with it
        assert await statuses(Client(http, url, acme.token), 6) == [200] * 5 + [429]


async def test_operators_have_buckets_of_their_own_and_the_same_limits(http, limited_settings, parts, acme):
    values = [await make_operator(parts), await make_operator(parts)]
    async with serving(limited_settings, parts) as url:
        one, two = (Client(http, url, value) for value in values)
        answers = [await one.send("GET", "/ops/projections") for _ in range(7)]
        assert [status for status, _, _ in answers] == [200] * 5 + [429] * 2
        assert answers[0][2]["RateLimit-Policy"] == '"default";q=5;w=60'
        assert answers[-1][1] == {"error": "rate limit of 5 requests in 60 s exceeded"}
        assert 1 <= int(answers[-1][2]["Retry-After"]) <= 60
        assert (await two.send("GET", "/ops/projections/halted"))[0] == 200
        assert await statuses(Client(http, url, acme.token), 6) == [200] * 5 + [429]
        stranger = Client(http, url, acme.token)
        failed = [(await stranger.send("GET", "/ops/projections"))[0] for _ in range(2)]
        failed += await statuses(one, 2)
        assert failed == [401] * 3 + [429]


async def test_forwarded_addresses_are_believed_only_from_proxies(http, limited_settings, parts, acme):
    async def spread(settings, addresses):
        async with serving(settings, parts) as url:
            client = Client(http, url, acme.token)
            return [(await client.get("/health", headers={"X-Forwarded-For": a}))[0] for a in addresses]

    trusting = replace(limited_settings, trusted_proxies=(ip_network("127.0.0.0/8"),))
    many = [f"203.0.113.{n}" for n in range(8)]
    assert await spread(replace(limited_settings, rate_limit="4/minute"), many) == [200] * 4 + [429] * 4
    assert await spread(trusting, many) == [200] * 8
    one_network = [f"2001:db8:1:2:{n}::1" for n in range(1, 9)]
    assert await spread(trusting, one_network) == [200] * 5 + [429] * 3
    assert await spread(trusting, [f"2001:db8:1:{n}::1" for n in range(3, 11)]) == [200] * 8
    made_up = [f"203.0.113.{n}, 198.51.100.7" for n in range(8)]
    assert await spread(trusting, made_up) == [200] * 5 + [429] * 3


async def test_a_line_that_the_client_made_up_before_the_proxys_own_is_not_believed(
    http, limited_settings, parts, acme
):
    trusting = replace(limited_settings, trusted_proxies=(ip_network("127.0.0.0/8"),))
    async with serving(trusting, parts) as url:
        client = Client(http, url, acme.token)
        found = []
        for number in range(7):
            lines = [
                *client.headers.items(),
                ("X-Forwarded-For", f"203.0.113.{number}"),
                ("X-Forwarded-For", "198.51.100.9"),
            ]
            async with http.get(f"{url}/api/v1/health", headers=lines) as response:
                found.append(response.status)
        assert found == [200] * 5 + [429] * 2


async def test_two_processes_share_one_limit(http, limited_settings, parts, acme):
    limit = replace(limited_settings, rate_limit="50/minute")
    async with serving(limit, parts) as one, serving(limit, parts) as two:
        clients = [Client(http, url, acme.token) for url in (one, two)]
        passed = 0
        for turn in range(200):
            status, _, _ = await clients[turn % 2].get("/health")
            passed += status == 200
            await asyncio.sleep(0)
        # A process admits requests until it learns of the other's count: here, a few in twenty milliseconds.
        assert 50 <= passed < 100


@pytest.fixture
def own_valkey(tmp_path):
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("end", ["frozen", "stopped"])
async def test_without_redis_limits_hold_and_when_it_is_back_they_are_shared(
    monkeypatch, http, limited_settings, parts, acme, own_valkey, end
):
    monkeypatch.setattr(rate_limit, "_RETRY_SECONDS", 0.05)
    limit = replace(limited_settings, redis_url=own_valkey.url, rate_limit="10/minute")
    async with serving(limit, parts) as one, serving(limit, parts) as two:
        here, there = (Client(http, url, acme.token) for url in (one, two))
        assert await statuses(here, 2) == [200] * 2
        if end == "frozen":
            os.kill(own_valkey.pid, signal.SIGSTOP)
        else:
            port = own_valkey.port
            own_valkey.stop()
        async with asyncio.timeout(GENEROUS_SECONDS / 2):  # a request that waited for Redis would take longer
            assert await statuses(here, 12) == [200] * 8 + [429] * 4
            assert await statuses(Client(http, one, tokens.generate_token(api_tokens.API_TOKEN_MARK)), 4) == [
                401
            ] * 3 + [429]
        if end == "frozen":
            os.kill(own_valkey.pid, signal.SIGCONT)
        else:
            own_valkey.start(port)
        async with asyncio.timeout(GENEROUS_SECONDS):
            passed = 0
            while (await statuses(there, 1)) == [200]:
                passed += 1
                await asyncio.sleep(0.05)
        assert passed < 10

import asyncio
import os
import signal
import time
from ipaddress import ip_network

import pytest

from opsentry.demo.embedded import EmbeddedValkey
from opsentry.infrastructure import rate_limit
from opsentry.infrastructure.rate_limit import RateLimiter, client_source
from opsentry.infrastructure.redis import connect
from tests.waiting import GENEROUS_SECONDS, until

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.9", None, "203.0.113.9"),
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),  # not a trusted proxy: not believed
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "6.6.6.6, 198.51.100.1", "198.51.100.1"),  # a client can invent what lies further left
        ("10.0.0.1", "198.51.100.1, 10.0.0.2", "198.51.100.1"),
        ("10.0.0.1", "198.51.100.1:4711", "198.51.100.1"),  # a port does not make another source
        ("10.0.0.1", "[2001:db8::1]:4711, 10.0.0.2:80", "2001:db8::/64"),
        ("10.0.0.1", "2001:db8::1", "2001:db8::/64"),
        ("fd00::1", "2001:db8:0:0:ffff::1", "2001:db8::/64"),
        ("10.0.0.1", "nonsense", "nonsense"),
        ("::ffff:10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "10.0.0.2, 10.0.0.3", "10.0.0.2"),
        ("2001:db8:1:2:3:4:5:6", None, "2001:db8:1:2::/64"),
        ("fe80::1%eth0", None, "fe80::/64"),
        ("::ffff:192.0.2.1", None, "192.0.2.1"),
        (None, None, "unknown"),
    ],
)
def test_the_source_that_a_request_counts_against(peer, forwarded, expected):
    assert client_source(peer, forwarded, PROXIES) == expected


async def test_buckets_are_independent_and_a_refused_hit_is_not_counted(valkey):
    client = connect(valkey.url, GENEROUS_SECONDS)
    limiter = RateLimiter(client, "3/minute", "apart")
    assert [limiter.hit(1, "a").allowed for _ in range(5)] == [True] * 3 + [False] * 2
    assert limiter.hit(2, "a").allowed
    assert limiter.hit(1, "b").allowed
    assert [limiter.hit(1, "a").remaining for _ in range(2)] == [0, 0]
    await limiter.close()
    await client.aclose()


async def test_processes_share_their_hits(valkey):
    client = connect(valkey.url, GENEROUS_SECONDS)
    here, there = (RateLimiter(client, "3/minute", "shared") for _ in range(2))
    for _ in range(3):
        assert here.hit("x").allowed
    assert here._sharing is not None
    await here._sharing
    assert there.hit("x").allowed  # the hits of `here` are not shared yet
    assert there._sharing is not None
    await there._sharing
    status = there.hit("x")
    assert (status.allowed, status.remaining) == (False, 0)
    assert 1 <= status.reset_seconds <= 60
    for limiter in (here, there):
        await limiter.close()
    await client.aclose()


@pytest.fixture
def own_valkey(tmp_path):
    """A server that the test may stop and freeze."""
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    yield server
    server.stop()


async def shared(limiter):
    """Return once the limiter has shared all its hits."""
    async with asyncio.timeout(GENEROUS_SECONDS):
        while limiter._sharing is not None and not limiter._sharing.done():
            await asyncio.wait([limiter._sharing])


@pytest.mark.parametrize("end", ["frozen", "stopped"])
async def test_a_limit_holds_without_redis_and_is_shared_again_once_redis_is_back(monkeypatch, own_valkey, end):
    monkeypatch.setattr(rate_limit, "_RETRY_SECONDS", 0.05)
    client = connect(own_valkey.url, 0.4)
    here, there = (RateLimiter(client, "6/minute", "back") for _ in range(2))
    assert here.hit("x").allowed
    await shared(here)
    if end == "frozen":
        os.kill(own_valkey.pid, signal.SIGSTOP)
    else:
        port = own_valkey.port
        own_valkey.stop()
    began = time.monotonic()
    assert [here.hit("x").remaining for _ in range(3)] == [4, 3, 2]
    assert time.monotonic() - began < 0.4  # no hit waits for Redis, whose timeout is 0.4 s

    async def noticed():
        return here._is_redis_away

    await until(noticed)
    assert here.hit("x").remaining == 1
    if end == "frozen":
        os.kill(own_valkey.pid, signal.SIGCONT)
    else:
        own_valkey.start(port)
    await shared(here)
    assert not here._is_redis_away
    # The other process sees the five hits; its own is the sixth and last.
    there.hit("x")
    await shared(there)
    assert there.hit("x").remaining == 0
    for limiter in (here, there):
        await limiter.close()
    await client.aclose()


async def test_a_new_window_begins_with_the_whole_limit(monkeypatch):
    client = connect("redis://127.0.0.1:1/0", 0.4)
    limiter = RateLimiter(client, "2/minute", "windows")
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began)
    assert [limiter.hit("x").allowed for _ in range(3)] == [True, True, False]
    monkeypatch.setattr(time, "time", lambda: began + 59.5)
    assert limiter.hit("x") == (False, 2, 60, 0, 1)
    monkeypatch.setattr(time, "time", lambda: began + 60)
    assert limiter.hit("x") == (True, 2, 60, 1, 60)
    await limiter.close()
    await client.aclose()


async def test_expired_buckets_are_removed_when_there_are_many(monkeypatch):
    monkeypatch.setattr(rate_limit, "_CLEANUP_MIN_BUCKETS", 10)
    client = connect("redis://127.0.0.1:1/0", 0.4)
    limiter = RateLimiter(client, "2/second", "many")
    for number in range(10):
        limiter.hit(number)
    later = time.time() + 1.5
    monkeypatch.setattr(time, "time", lambda: later)
    limiter.hit("new")
    assert list(limiter._buckets) == [("new",)]
    await limiter.close()
    await client.aclose()


async def test_many_live_buckets_are_not_searched_again_for_each_new_one(monkeypatch):
    monkeypatch.setattr(rate_limit, "_CLEANUP_MIN_BUCKETS", 10)
    client = connect("redis://127.0.0.1:1/0", 0.4)
    limiter = RateLimiter(client, "2/minute", "live")
    searches, kept = 0, limiter._buckets
    for number in range(40):
        limiter.hit(number)
        searches, kept = searches + (limiter._buckets is not kept), limiter._buckets
    assert (len(kept), searches) == (40, 2)
    await limiter.close()
    await client.aclose()


async def test_without_redis_the_limit_holds_within_the_process():
    client = connect("redis://127.0.0.1:1/0", 0.4)
    limiter = RateLimiter(client, "3/minute", "away")
    assert [limiter.hit("x").allowed for _ in range(4)] == [True, True, True, False]
    await limiter.close()
    await client.aclose()

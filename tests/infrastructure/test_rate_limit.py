import asyncio
import os
import signal
import time
from ipaddress import ip_network

import pytest

from opsentry.demo.embedded import EmbeddedValkey
from opsentry.infrastructure import rate_limit
from opsentry.infrastructure.rate_limit import RateLimiter, source
from opsentry.infrastructure.redis import connect

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.9", None, "203.0.113.9"),
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),  # no proxy of ours: not believed
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "6.6.6.6, 198.51.100.1", "198.51.100.1"),  # what a client made up lies further left
        ("10.0.0.1", "198.51.100.1, 10.0.0.2", "198.51.100.1"),
        ("10.0.0.1", "198.51.100.1:4711", "198.51.100.1"),  # a port is no source of its own
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
def test_whom_a_request_is_counted_against(peer, forwarded, expected):
    assert source(peer, forwarded, PROXIES) == expected


async def test_buckets_are_apart_and_refused_hits_cost_nothing(valkey):
    client = connect(valkey.url)
    limiter = RateLimiter(client, "3/minute", "apart")
    assert [limiter.hit(1, "a").allowed for _ in range(5)] == [True] * 3 + [False] * 2
    assert limiter.hit(2, "a").allowed
    assert limiter.hit(1, "b").allowed
    assert [limiter.hit(1, "a").remaining for _ in range(2)] == [0, 0]
    await limiter.close()
    await client.aclose()


async def test_another_process_hears_of_hits(valkey):
    client = connect(valkey.url)
    here, there = (RateLimiter(client, "3/minute", "heard") for _ in range(2))
    for _ in range(3):
        assert here.hit("x").allowed
    assert here._sharing is not None
    await here._sharing
    assert there.hit("x").allowed  # it cannot know yet
    assert there._sharing is not None
    await there._sharing
    standing = there.hit("x")
    assert (standing.allowed, standing.remaining) == (False, 0)
    assert 1 <= standing.reset <= 60
    for limiter in (here, there):
        await limiter.close()
    await client.aclose()


@pytest.fixture
def own_valkey(tmp_path):
    """A server of this test's own, which may be stopped and frozen."""
    server = EmbeddedValkey(tmp_path / "valkey")
    server.start()
    yield server
    server.stop()


async def shared(limiter):
    """Return once everything that was counted here has been added to the shared count."""
    async with asyncio.timeout(10):
        while limiter._sharing is not None and not limiter._sharing.done():
            await asyncio.wait([limiter._sharing])


@pytest.mark.parametrize("end", ["frozen", "stopped"])
async def test_a_limit_holds_while_redis_is_away_and_is_shared_again_when_it_is_back(monkeypatch, own_valkey, end):
    monkeypatch.setattr(rate_limit, "_RETRY_SECONDS", 0.05)
    client = connect(own_valkey.url)
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
    assert time.monotonic() - began < 0.05
    async with asyncio.timeout(5):
        while not here._away:  # noqa: ASYNC110 - nothing tells of it but the limiter itself
            await asyncio.sleep(0.01)
    assert here.hit("x").remaining == 1
    if end == "frozen":
        os.kill(own_valkey.pid, signal.SIGCONT)
    else:
        own_valkey.start(port)
    await shared(here)
    assert not here._away
    # What was counted alone has reached the others; with the first of theirs, nothing is left.
    there.hit("x")
    await shared(there)
    assert there.hit("x").remaining == 0
    for limiter in (here, there):
        await limiter.close()
    await client.aclose()


async def test_a_window_ends_and_the_next_begins_full(monkeypatch):
    client = connect("redis://127.0.0.1:1/0")
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


async def test_old_buckets_are_forgotten_when_there_are_many(monkeypatch):
    monkeypatch.setattr(rate_limit, "_MANY", 10)
    client = connect("redis://127.0.0.1:1/0")
    limiter = RateLimiter(client, "2/second", "many")
    for number in range(10):
        limiter.hit(number)
    later = time.time() + 1.5
    monkeypatch.setattr(time, "time", lambda: later)
    limiter.hit("new")
    assert list(limiter._buckets) == [("new",)]
    await limiter.close()
    await client.aclose()


async def test_without_redis_the_limit_holds_locally_and_nobody_waits():
    client = connect("redis://127.0.0.1:1/0")
    limiter = RateLimiter(client, "3/minute", "away")
    assert [limiter.hit("x").allowed for _ in range(4)] == [True, True, True, False]
    await limiter.close()
    await client.aclose()

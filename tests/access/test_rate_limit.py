from ipaddress import ip_network

import pytest

from opsentry.access.rate_limit import RateLimiter, source
from opsentry.redis import connect

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.9", None, "203.0.113.9"),
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),  # no proxy of ours: not believed
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "6.6.6.6, 198.51.100.1", "198.51.100.1"),  # what a client made up lies further left
        ("10.0.0.1", "198.51.100.1, 10.0.0.2", "198.51.100.1"),
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


async def test_without_redis_the_limit_holds_locally_and_nobody_waits():
    client = connect("redis://127.0.0.1:1/0")
    limiter = RateLimiter(client, "3/minute", "away")
    assert [limiter.hit("x").allowed for _ in range(4)] == [True, True, True, False]
    await limiter.close()
    await client.aclose()

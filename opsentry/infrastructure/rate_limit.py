"""Rate limits: counted here at once, and in Redis for all processes together a moment later.

No request waits for Redis. Each process counts its own hits and, every few milliseconds, adds them to the shared count
and takes over the total. So a limit is exact within a process, processes together may exceed it by what reaches them
within one such interval, and without Redis each process limits by what it has seen itself.
"""

import asyncio
import ipaddress
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import redis.asyncio
import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage
from redis.exceptions import RedisError

from opsentry.settings import Network

_log = structlog.get_logger()

SHARE_SECONDS = 0.02
_RETRY_SECONDS = 1.0
_MANY = 50_000


class Standing(NamedTuple):
    """How a bucket stands after a hit: fixed windows that begin with their first hit."""

    allowed: bool
    limit: int
    window: int
    """Seconds."""
    remaining: int
    reset: int
    """Seconds until the bucket is full again, rounded up."""


class _Bucket:
    __slots__ = ("ends", "key", "shared", "total", "unshared")

    def __init__(self, key: str, ends: float) -> None:
        self.key = key
        self.ends = ends
        self.total = 0  # as it was last shared
        self.unshared = 0
        self.shared = False  # whether `ends` is the shared window's


class RateLimiter:
    """Counts hits in buckets of `rate`, such as `600/minute`, under a name that keeps its buckets apart."""

    def __init__(self, client: "redis.asyncio.Redis", rate: str, name: str) -> None:
        self._item: RateLimitItem = parse(rate)
        self._limit, self._window = self._item.amount, self._item.get_expiry()
        self._name = name
        self._storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            connection_pool=client.connection_pool,  # type: ignore[arg-type]  # passed on as it is
        )
        self._buckets: dict[tuple[str | int, ...], _Bucket] = {}
        self._waiting: set[_Bucket] = set()
        self._sharing: asyncio.Task[None] | None = None
        self._away = False

    def hit(self, *bucket: str | int) -> Standing:
        """Count a hit in the bucket, if it is allowed, and return how the bucket stands. Waits for nothing."""
        now = time.time()
        found = self._buckets.get(bucket)
        if found is None or found.ends <= now:
            if len(self._buckets) >= _MANY:
                self._buckets = {key: other for key, other in self._buckets.items() if other.ends > now}
            found = _Bucket(self._item.key_for(self._name, *map(str, bucket)), now + self._window)
            self._buckets[bucket] = found
        # A refused hit is not counted: whoever loops on 429s costs nobody anything.
        allowed = found.total + found.unshared < self._limit
        if allowed:
            found.unshared += 1
            self._waiting.add(found)
            if self._sharing is None or self._sharing.done():
                self._sharing = asyncio.create_task(self._share())
        remaining = max(0, self._limit - found.total - found.unshared)
        return Standing(allowed, self._limit, self._window, remaining, max(1, -int((now - found.ends) // 1)))

    async def close(self) -> None:
        """Stop sharing."""
        if self._sharing is not None:
            self._sharing.cancel()
            await asyncio.wait([self._sharing])

    async def _share(self) -> None:
        """Add what was counted here to the shared counts until there is nothing more to add."""
        while self._waiting:
            buckets, self._waiting = self._waiting, set()
            try:
                for bucket in buckets:
                    await self._share_one(bucket)
            except (RedisError, OSError) as error:
                if not self._away:
                    _log.warning("redis is away, limiting locally", error=type(error).__name__)
                self._away = True
                now = time.time()
                self._waiting |= {bucket for bucket in buckets if bucket.unshared and bucket.ends > now}
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._away = False
                await asyncio.sleep(SHARE_SECONDS)

    async def _share_one(self, bucket: _Bucket) -> None:
        hits = bucket.unshared
        if not hits:
            return
        total = await self._storage.incr(bucket.key, self._window, amount=hits)
        bucket.unshared -= hits
        bucket.total = total
        if total == hits:
            bucket.ends = time.time() + self._window
        elif not bucket.shared:
            bucket.ends = await self._storage.get_expiry(bucket.key)
        bucket.shared = True


@lru_cache(maxsize=10_000)
def _subnet(address: str) -> str:
    """Return what counts as one source: an IPv4 address, or the /64 that an IPv6 address lies in."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


_WITH_PORT = re.compile(r"\[(?P<v6>[^\]]+)\](?::\d+)?|(?P<v4>[\d.]+):\d+")


def _hop(text: str) -> str:
    """Return the address of a hop; some proxies add the port, which changes with every connection."""
    match = _WITH_PORT.fullmatch(text.strip())
    return text.strip() if match is None else match["v6"] or match["v4"]


def source(peer: str | None, forwarded_for: str | None, trusted: Sequence[Network]) -> str:
    """Return whom to count a request against.

    Args:
        peer: The address that connected.
        forwarded_for: `X-Forwarded-For`, if sent. Only what trusted proxies added to it is believed: it is read
            from the right, up to the first address that is none of theirs.
        trusted: Networks of proxies.
    """
    address = peer or "unknown"
    if trusted and forwarded_for:
        hops = [_hop(hop) for hop in forwarded_for.split(",")]
        while hops and _within(address, trusted):
            address = hops.pop()
    return _subnet(address)


def _within(address: str, networks: Sequence[Network]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return any((mapped or parsed) in network for network in networks)

"""Limit rates: each process counts at once, and shares its counts through Redis a moment later.

No request waits for Redis. Each process counts its own hits; every `SHARE_INTERVAL_SECONDS` it adds them to the shared
count and adopts the total. The consequences:

- Within one process, a limit is exact.
- Processes together exceed a limit by at most the hits that they receive within one interval.
- Without Redis, each process enforces the limit on its own hits.
"""

import asyncio
import ipaddress
import math
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

SHARE_INTERVAL_SECONDS = 0.02
_RETRY_SECONDS = 1.0
# Expired buckets are removed when this many are kept, or twice as many as the last removal left.
_CLEANUP_MIN_BUCKETS = 50_000


class RateLimitStatus(NamedTuple):
    """Show a bucket after a hit. Windows are fixed, and begin with their first hit.

    Attributes:
        allowed: Whether the hit is within the limit.
        limit: Hits per window.
        window_seconds: Length of a window.
        remaining: Hits left in this window.
        reset_seconds: Time until the window ends, rounded up, at least 1.
    """

    allowed: bool
    limit: int
    window_seconds: int
    remaining: int
    reset_seconds: int


class _Bucket:
    """The hits of one source in one window."""

    __slots__ = ("ends_at", "has_shared_end", "key", "shared_total", "unshared")

    def __init__(self, key: str, ends_at: float) -> None:
        self.key = key
        self.ends_at = ends_at  # Unix time
        self.shared_total = 0  # all processes' hits, as of the last exchange
        self.unshared = 0  # own hits since then
        self.has_shared_end = False  # whether `ends_at` is the end of the shared window


class RateLimiter:
    """Count hits in buckets, and refuse those over the limit.

    Args:
        client: The Redis that shares the counts among processes.
        rate: The limit of each bucket, such as `600/minute`.
        name: Keeps the buckets of several limiters apart.
    """

    def __init__(self, client: "redis.asyncio.Redis", rate: str, name: str) -> None:
        self._item: RateLimitItem = parse(rate)
        self._limit, self._window_seconds = self._item.amount, self._item.get_expiry()
        self._name = name
        self._storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            connection_pool=client.connection_pool,  # type: ignore[arg-type]  # passed on as it is
        )
        self._buckets: dict[tuple[str | int, ...], _Bucket] = {}
        self._cleanup_at = _CLEANUP_MIN_BUCKETS
        self._to_share: set[_Bucket] = set()
        self._sharing: asyncio.Task[None] | None = None
        self._is_redis_away = False

    def hit(self, *bucket: str | int) -> RateLimitStatus:
        """Count a hit if the bucket has room for it, and return the bucket's status. Waits for nothing.

        Args:
            bucket: The parts of the bucket's name, such as a token id and a source.
        """
        now = time.time()
        found = self._buckets.get(bucket)
        if found is None or found.ends_at <= now:
            found = self._open_bucket(bucket, now)
        # A refused hit is not counted, so a client that retries in a loop does not prolong its own wait.
        allowed = found.shared_total + found.unshared < self._limit
        if allowed:
            found.unshared += 1
            self._to_share.add(found)
            if self._sharing is None or self._sharing.done():
                self._sharing = asyncio.create_task(self._share())
        remaining = max(0, self._limit - found.shared_total - found.unshared)
        reset_seconds = max(1, math.ceil(found.ends_at - now))
        return RateLimitStatus(allowed, self._limit, self._window_seconds, remaining, reset_seconds)

    async def close(self) -> None:
        """Stop sharing. The last interval's hits are not shared."""
        if self._sharing is not None:
            self._sharing.cancel()
            await asyncio.wait([self._sharing])

    def _open_bucket(self, name: tuple[str | int, ...], now: float) -> _Bucket:
        if len(self._buckets) >= self._cleanup_at:
            self._buckets = {name: bucket for name, bucket in self._buckets.items() if bucket.ends_at > now}
            # Many live buckets would otherwise cost a pass over all of them for each new one.
            self._cleanup_at = max(_CLEANUP_MIN_BUCKETS, 2 * len(self._buckets))
        bucket = _Bucket(self._item.key_for(self._name, *map(str, name)), now + self._window_seconds)
        self._buckets[name] = bucket
        return bucket

    async def _share(self) -> None:
        """Add own hits to the shared counts until none are left."""
        while self._to_share:
            buckets, self._to_share = self._to_share, set()
            try:
                for bucket in buckets:
                    await self._share_bucket(bucket)
            except (RedisError, OSError) as error:
                if not self._is_redis_away:
                    _log.warning("rate_limits_not_shared", error=str(error) or type(error).__name__)
                self._is_redis_away = True
                now = time.time()
                self._to_share |= {bucket for bucket in buckets if bucket.unshared and bucket.ends_at > now}
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._is_redis_away = False
                await asyncio.sleep(SHARE_INTERVAL_SECONDS)

    async def _share_bucket(self, bucket: _Bucket) -> None:
        hits = bucket.unshared
        if not hits:
            return
        total = await self._storage.incr(bucket.key, self._window_seconds, amount=hits)
        bucket.unshared -= hits
        bucket.shared_total = total
        if total == hits:  # these hits opened the shared window
            bucket.ends_at = time.time() + self._window_seconds
        elif not bucket.has_shared_end:
            bucket.ends_at = await self._storage.get_expiry(bucket.key)
        bucket.has_shared_end = True


_HOP_WITH_PORT = re.compile(r"\[(?P<v6>[^\]]+)\](?::\d+)?|(?P<v4>[\d.]+):\d+")


def client_source(peer: str | None, forwarded_for: str | None, trusted_proxies: Sequence[Network]) -> str:
    """Return the source that a request counts against: an IPv4 address, or the /64 network of an IPv6 address.

    Args:
        peer: The address that connected.
        forwarded_for: The header `X-Forwarded-For`, if sent. It is read from the right, up to the first address
            that is not a trusted proxy's: a client can invent everything further left.
        trusted_proxies: Networks of proxies whose entries are believed.
    """
    address = peer or "unknown"
    if trusted_proxies and forwarded_for:
        hops = [_without_port(hop) for hop in forwarded_for.split(",")]
        while hops and _is_within(address, trusted_proxies):
            address = hops.pop()
    return _source_of(address)


def _without_port(hop: str) -> str:
    """Return a hop's address. Some proxies add the port, which changes with every connection."""
    match = _HOP_WITH_PORT.fullmatch(hop.strip())
    return hop.strip() if match is None else match["v6"] or match["v4"]


def _is_within(address: str, networks: Sequence[Network]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return any((mapped or parsed) in network for network in networks)


@lru_cache(maxsize=10_000)
def _source_of(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)

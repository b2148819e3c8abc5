"""Rate limits: counted in Redis for all processes together, in this process alone while Redis is away."""

import asyncio
import ipaddress
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import redis.asyncio
import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from redis.exceptions import RedisError

from opsentry.config import Network

_log = structlog.get_logger()
_RETRY_AFTER = 1.0
_WINDOWS = 50_000


class Standing(NamedTuple):
    """How a bucket stands after a hit: fixed windows that begin with their first hit."""

    allowed: bool
    limit: int
    window: int
    """Seconds."""
    remaining: int
    reset: int
    """Seconds until the bucket is full again, rounded up."""


class RateLimiter:
    """Counts hits in buckets of `rate`.

    Redis is asked once for each hit. Once it fails to answer, nobody waits for it again until a probe in the
    background has heard from it.
    """

    def __init__(self, client: "redis.asyncio.Redis", rate: str, name: str) -> None:
        self._client = client
        self._item: RateLimitItem = parse(rate)
        self._name = name
        self._shared = RedisStorage(
            "async+redis://",
            implementation="redispy",
            connection_pool=client.connection_pool,  # type: ignore[arg-type]  # passed on as it is
        )
        self._local = MemoryStorage()
        self._ends: dict[str, float] = {}
        self._away = False
        self._probe: asyncio.Task[None] | None = None

    async def hit(self, *bucket: str | int) -> Standing:
        """Count a hit in the bucket and return how it stands; never fails."""
        key = self._item.key_for(self._name, *map(str, bucket))
        window = self._item.get_expiry()
        if not self._away:
            try:
                count = await self._shared.incr(key, window)
                return self._standing(count, await self._window_end(self._shared, key, count, window))
            except (RedisError, OSError) as error:
                self._lose(error)
        count = await self._local.incr(key, window)
        return self._standing(count, await self._window_end(self._local, key, count, window))

    async def close(self) -> None:
        """Stop probing."""
        if self._probe is not None:
            self._probe.cancel()

    async def _window_end(self, storage: RedisStorage | MemoryStorage, key: str, count: int, window: int) -> float:
        """Return when the window ends, in seconds since 1970; asks the storage only where this process missed it."""
        end = self._ends.get(key)
        now = time.time()
        if count == 1:
            end = now + window
        elif end is None or end <= now:
            end = await storage.get_expiry(key)
        else:
            return end
        if len(self._ends) >= _WINDOWS:
            self._ends.clear()
        self._ends[key] = end
        return end

    def _standing(self, count: int, end: float) -> Standing:
        limit, window = self._item.amount, self._item.get_expiry()
        reset = min(window, max(1, -int((time.time() - end) // 1)))
        return Standing(count <= limit, limit, window, max(0, limit - count), reset)

    def _lose(self, error: Exception) -> None:
        if not self._away:
            _log.warning("redis is away, limiting locally", error=type(error).__name__)
            self._away = True
            self._ends.clear()
            self._probe = asyncio.create_task(self._probe_until_back())

    async def _probe_until_back(self) -> None:
        while True:
            await asyncio.sleep(_RETRY_AFTER)
            try:
                await self._client.ping()
            except (RedisError, OSError):
                continue
            self._ends.clear()
            self._away = False
            return


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
        hops = [hop.strip() for hop in forwarded_for.split(",")]
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

"""The way to Redis: nothing in it needs keeping, and nobody waits for it longer than a moment."""

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

# No request waits for Redis, so this bounds only how long readiness and sharing wait. It has to leave room for a loop
# that is busy with a burst, and stay below the 500 ms of a readiness check.
TIMEOUT = 0.4


def connect(url: str) -> "redis.asyncio.Redis":
    """Return a client whose every command takes at most a moment; connects when first used.

    The client's own retries are off: with them a frozen server costs seconds for each command.
    """
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
        url,
        socket_timeout=TIMEOUT,
        socket_connect_timeout=TIMEOUT,
        retry=Retry(NoBackoff(), 0),
        max_connections=1024,
    )
    return client

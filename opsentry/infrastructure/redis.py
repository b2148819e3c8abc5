"""Connect to Redis, which holds nothing that cannot be lost: every wait for it is short."""

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

# Requests never wait for Redis: this bounds readiness checks and the sharing of rate limits. It leaves room for an
# event loop that is busy with a burst, and stays below the 0.5 s of a readiness check.
TIMEOUT_SECONDS = 0.4
_MAX_CONNECTIONS = 1024


def connect(url: str) -> "redis.asyncio.Redis":
    """Return a client whose connections open on first use and whose commands fail after `TIMEOUT_SECONDS`.

    The client's own retries are off: with them, a frozen server would cost seconds for each command.
    """
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
        url,
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
        max_connections=_MAX_CONNECTIONS,
    )
    return client

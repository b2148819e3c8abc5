"""Connect to Redis, which holds nothing that cannot be lost: every wait for it is short."""

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

_MAX_CONNECTIONS = 1024


def connect(url: str, timeout_seconds: float) -> "redis.asyncio.Redis":
    """Return a client whose connections open on first use and whose commands fail after `timeout_seconds`.

    The client's own retries are off: with them, a frozen server would cost seconds for each command.
    """
    client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
        max_connections=_MAX_CONNECTIONS,
    )
    return client

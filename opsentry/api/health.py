"""Health: a probe that needs nothing, liveness, readiness, and a ping that verifies a token."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import redis.asyncio
from aiohttp import web
from multidict import CIMultiDict
from redis.exceptions import RedisError

from opsentry.api.context import RequestContext
from opsentry.api.responses import object_response
from opsentry.infrastructure.postgres import Database, DatabaseUnavailable
from opsentry.infrastructure.single_flight import TtlCache
from opsentry.notifications.delivery import management

CACHE_SECONDS = 1.0
MAX_PENDING = 1000
MAX_AGE_SECONDS = 300

NO_STORE = {"Cache-Control": "no-store"}
# Made once: a load balancer asks this many times a second of every process.
_PROBE_HEADERS = CIMultiDict({"Content-Type": "text/plain; charset=utf-8", **NO_STORE})


class Unhealthy(Exception):
    """A check failed; the message says how, in words for anyone."""

    def __init__(self, message: str, **details: float) -> None:
        super().__init__(message)
        self.details = details


async def probe(_: web.Request) -> web.Response:
    """`GET /health`: the process can serve."""
    return web.Response(body=b"OK", headers=_PROBE_HEADERS)


async def live(_: web.Request) -> web.Response:
    """`GET /health/live`: the same, in JSON."""
    return web.Response(body=b'{"status":"ok"}', content_type="application/json", charset="utf-8", headers=NO_STORE)


class Readiness:
    """`GET /health/ready`: whether everything that this process needs is well.

    It has a pool of its own, so a busy pool is not taken for a broken database; the timeout of that pool bounds each
    check. One round of checks serves all requests within a second.
    """

    def __init__(self, database: Database, client: "redis.asyncio.Redis") -> None:
        self._database = database
        self._client = client
        self._checks: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
            "postgres": self._postgres,
            "redis": self._redis,
            "outbox": self._outbox,
        }
        self._answer: TtlCache[None, tuple[int, bytes]] = TtlCache(
            self._check_all, ttl_seconds=CACHE_SECONDS, max_entries=1
        )

    async def ready(self, _: web.Request) -> web.Response:
        """`GET /health/ready`."""
        status, body = await self._answer.get(None)
        return web.Response(
            status=status, body=body, content_type="application/json", charset="utf-8", headers=NO_STORE
        )

    async def _check_all(self, _: None) -> tuple[int, bytes]:
        results = await asyncio.gather(*map(self._check, self._checks.values()))
        checks = dict(zip(self._checks, results, strict=True))
        ready = all(check["status"] == "ok" for check in results)
        body = msgspec.json.encode({"status": "ready" if ready else "unavailable", "checks": checks})
        return 200 if ready else 503, body

    async def _check(self, check: Callable[[], Awaitable[dict[str, float]]]) -> dict[str, Any]:
        began = time.perf_counter()
        result: dict[str, Any] = {"status": "ok"}
        try:
            async with asyncio.timeout(self._database.timeout_seconds):
                result |= await check()
        except Unhealthy as problem:
            result = {"status": "fail", "error": str(problem), **problem.details}
        except (TimeoutError, OSError, RedisError, DatabaseUnavailable):
            result = {"status": "fail", "error": "no answer"}
        result["duration_ms"] = round((time.perf_counter() - began) * 1000, 3)
        return result

    async def _postgres(self) -> dict[str, float]:
        # Also that the schema is there: without it every request fails.
        await self._database.fetchrow("SELECT number FROM schema_migrations LIMIT 1")
        return {}

    async def _redis(self) -> dict[str, float]:
        await self._client.ping()
        return {}

    async def _outbox(self) -> dict[str, float]:
        async with self._database.transaction() as connection:
            row = await management.backlog(connection, MAX_PENDING + 1)
        details = {
            "pending": row["pending"],
            "oldest_pending_seconds": round(row["pending_seconds"] or 0.0, 3),
            "lag_events": row["unseen"],
            "lag_seconds": round(row["unseen_seconds"] or 0.0, 3),
            "halted": row["halted"],
            # What need not drain the fleet: it waits for its hour, or for an operator.
            "waiting": max(0, row["waiting"] - row["due"]),
            "parked_deliveries": row["parked_deliveries"],
            "paused": row["paused"],
        }
        if details["pending"] + details["lag_events"] > MAX_PENDING:
            raise Unhealthy(f"more than {MAX_PENDING} notifications wait", **details)
        if max(details["oldest_pending_seconds"], details["lag_seconds"]) > MAX_AGE_SECONDS:
            raise Unhealthy(f"a notification has waited for more than {MAX_AGE_SECONDS} s", **details)
        return details


async def ping(call: RequestContext) -> web.Response:
    """`GET /api/v1/health`: whether the token works, and what it carries."""
    token = call.token
    answer = {
        "ok": True,
        "tenant_id": token.tenant_id,
        "token_prefix": token.prefix,
        "scopes": sorted(token.scopes),
    }
    return object_response(msgspec.json.encode(answer))

"""Readiness: whether the parts that this process depends on are healthy."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import redis.asyncio
from redis.exceptions import RedisError

from opsentry.infrastructure.postgres import Database, DatabaseUnavailable
from opsentry.infrastructure.single_flight import TtlCache
from opsentry.notifications.delivery import management

CACHE_SECONDS = 1.0
MAX_PENDING = 1000
MAX_PENDING_AGE_SECONDS = 300


class Unhealthy(Exception):
    """A check failed. The message is for anyone to read."""

    def __init__(self, message: str, **details: float) -> None:
        super().__init__(message)
        self.details = details


class ReadinessReport(NamedTuple):
    """Whether all checks passed, and the report of each by its name."""

    is_ready: bool
    checks: Mapping[str, Mapping[str, Any]]


class Readiness:
    """Checks PostgreSQL, Redis and the outbox.

    Its pool is its own, so that a busy pool does not look like a broken database; the timeout of that pool bounds each
    check. All who ask within a second share one round of checks.
    """

    def __init__(self, database: Database, client: "redis.asyncio.Redis") -> None:
        self._database = database
        self._client = client
        self._checks: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
            "postgres": self._check_postgres,
            "redis": self._check_redis,
            "outbox": self._check_outbox,
        }
        self._report: TtlCache[None, ReadinessReport] = TtlCache(
            self._check_all, ttl_seconds=CACHE_SECONDS, max_entries=1
        )

    async def report(self) -> ReadinessReport:
        """Return the report, at most a second old."""
        return await self._report.get(None)

    async def _check_all(self, _: None) -> ReadinessReport:
        results = await asyncio.gather(*map(self._check, self._checks.values()))
        checks = dict(zip(self._checks, results, strict=True))
        return ReadinessReport(all(check["status"] == "ok" for check in results), checks)

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

    async def _check_postgres(self) -> dict[str, float]:
        # Without the schema every request fails, so a connection alone is not enough.
        await self._database.check_schema()
        return {}

    async def _check_redis(self) -> dict[str, float]:
        await self._client.ping()
        return {}

    async def _check_outbox(self) -> dict[str, float]:
        async with self._database.transaction() as connection:
            backlog = await management.measure_backlog(connection, MAX_PENDING + 1)
        details = {
            "pending": backlog.due,
            "oldest_pending_seconds": round(backlog.oldest_due_seconds or 0.0, 3),
            "lag_events": backlog.unseen_events,
            "lag_seconds": round(backlog.oldest_unseen_seconds or 0.0, 3),
            "halted": backlog.halted_tenants,
            # Deliveries that wait for their time, or for an operator, never fail the check.
            "scheduled": max(0, backlog.pending_deliveries - backlog.due_deliveries),
            "exhausted_deliveries": backlog.exhausted_deliveries,
            "paused": backlog.is_paused,
        }
        if details["pending"] + details["lag_events"] > MAX_PENDING:
            raise Unhealthy(f"more than {MAX_PENDING} notifications wait", **details)
        if max(details["oldest_pending_seconds"], details["lag_seconds"]) > MAX_PENDING_AGE_SECONDS:
            raise Unhealthy(f"a notification has waited for more than {MAX_PENDING_AGE_SECONDS} s", **details)
        return details

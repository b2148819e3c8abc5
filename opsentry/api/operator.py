"""`/ops/…`: how read models and sending stand, of all tenants, for operators. Reads, and changes nothing."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

import asyncpg
import msgspec
from aiohttp import web

from opsentry.api.health import CACHE_SECONDS, NO_STORE
from opsentry.api.responses import object_response
from opsentry.infrastructure.postgres import Connection, Database
from opsentry.infrastructure.single_flight import TtlCache
from opsentry.notifications.delivery import management as sending
from opsentry.projections.engine import management
from opsentry.projections.engine.projection import Projection

# Longer than these queries take with 100,000 tenants, and so many rows at most.
_PATIENCE = 10.0
_MOST = 1_000

Query = Callable[[Connection], Awaitable[Sequence[asyncpg.Record]]]


class Ops:
    """What operators' tokens open. Its queries go over all tenants, so each is run once for all who ask."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._queries: Mapping[str, Query] = {
            "projections": lambda connection: management.projection_status(connection, projections),
            "outbox": lambda connection: sending.status(connection, limit=_MOST),
            "halted": lambda connection: management.halted(connection, limit=_MOST),
        }
        self._answers: TtlCache[str, bytes] = TtlCache(
            self._query, ttl_seconds=CACHE_SECONDS, max_entries=len(self._queries)
        )

    async def projections(self, _: web.Request) -> web.Response:
        """`GET /ops/projections`: for each, how many tenants are done, behind and halted, and the lag."""
        return _answer(await self._answers.get("projections"))

    async def halted(self, _: web.Request) -> web.Response:
        """`GET /ops/projections/halted`: what stopped at an event that it cannot apply, and why."""
        return _answer(await self._answers.get("halted"))

    async def outbox(self, _: web.Request) -> web.Response:
        """`GET /ops/outbox`: for each tenant that anything waits for, what is due, waits, is halted or paused."""
        return _answer(await self._answers.get("outbox"))

    async def _query(self, name: str) -> bytes:
        async with self._database.connection(_PATIENCE) as connection:
            rows = await self._queries[name](connection)
        return msgspec.json.encode({name: [dict(row) for row in rows]})


def _answer(body: bytes) -> web.Response:
    response = object_response(body)
    response.headers.update(NO_STORE)
    return response

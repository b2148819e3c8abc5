"""`/ops/…`: how read models and sending stand, of all tenants, for operators. Reads, and changes nothing."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import asyncpg
import msgspec
from aiohttp import web

from opsentry.api.health import NO_STORE, Shared
from opsentry.api.responses import object_response
from opsentry.infrastructure.postgres import Connection, Database
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
        self._standing = Shared(
            partial(
                self._encoded, "projections", lambda connection: management.projection_status(connection, projections)
            )
        )
        self._outbox = Shared(partial(self._encoded, "outbox", partial(sending.status, limit=_MOST)))
        self._parked = Shared(
            partial(self._encoded, "halted", lambda connection: management.halted(connection, limit=_MOST))
        )

    async def projections(self, _: web.Request) -> web.Response:
        """`GET /ops/projections`: for each, how many tenants are done, behind and halted, and the lag."""
        return _answer(await self._standing.get())

    async def halted(self, _: web.Request) -> web.Response:
        """`GET /ops/projections/halted`: what stopped at an event that it cannot apply, and why."""
        return _answer(await self._parked.get())

    async def outbox(self, _: web.Request) -> web.Response:
        """`GET /ops/outbox`: for each tenant that anything waits for, what is due, waits, is halted or paused."""
        return _answer(await self._outbox.get())

    async def _encoded(self, name: str, query: Query) -> bytes:
        async with self._database.connection(_PATIENCE) as connection:
            rows = await query(connection)
        return msgspec.json.encode({name: [dict(row) for row in rows]})


def _answer(body: bytes) -> web.Response:
    response = object_response(body)
    response.headers.update(NO_STORE)
    return response

"""`/ops/…`: how the read models of all tenants stand, for operators. Reads, and changes nothing."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import asyncpg
import msgspec
from aiohttp import web

from opsentry.api.answers import object_response
from opsentry.api.health import NO_STORE, Shared
from opsentry.projections.runner import Runner


class Ops:
    """What operators' tokens open. Its queries go over all tenants, so each is run once for all who ask."""

    def __init__(self, runner: Runner) -> None:
        self._standing = Shared(partial(_encoded, "projections", runner.standing))
        self._parked = Shared(partial(_encoded, "parked", runner.parked))

    async def projections(self, _: web.Request) -> web.Response:
        """`GET /ops/projections`: for each, how many tenants are done, behind and parked, and the lag."""
        return _answer(await self._standing.get())

    async def parked(self, _: web.Request) -> web.Response:
        """`GET /ops/projections/parked`: what stopped at an event that it cannot apply, and why."""
        return _answer(await self._parked.get())


async def _encoded(name: str, query: Callable[[], Awaitable[Sequence[asyncpg.Record]]]) -> bytes:
    return msgspec.json.encode({name: [dict(row) for row in await query()]})


def _answer(body: bytes) -> web.Response:
    response = object_response(body)
    response.headers.update(NO_STORE)
    return response

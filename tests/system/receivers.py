"""Receive webhooks on loopback and remember them in order."""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgspec
from aiohttp import web


class Arrival(NamedTuple):
    """A received request: message id, lower-case headers and body."""

    id: str
    headers: dict[str, str]
    body: bytes

    @property
    def payload(self):
        return msgspec.json.decode(self.body)


class Receivers:
    """An endpoint for each path."""

    def __init__(self) -> None:
        self.base = ""
        self.arrived: dict[str, list[Arrival]] = defaultdict(list)
        self.count = 0
        self.answers: dict[str, int] = {}
        self.quiet: Callable[[], bool] = lambda: True
        """Returns whether no connection is open, so that nothing of a killed sender is still on its way."""

    def url(self, name: object) -> str:
        return f"{self.base}/{name}"

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.arrived[request.path[1:]].append(Arrival(headers["webhook-id"], headers, body))
        self.count += 1
        return web.Response(status=self.answers.get(request.path[1:], 204))


@asynccontextmanager
async def receivers() -> AsyncIterator[Receivers]:
    """Listen on a free port of 127.0.0.1."""
    made = Receivers()
    app = web.Application()
    app.router.add_route("POST", "/{path:.*}", made.receive)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()

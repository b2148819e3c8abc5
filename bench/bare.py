"""The peer of our server: aiohttp alone, and aiohttp with asyncpg that runs the same SQL.

`python -m bench.bare [DATABASE_URL TENANT_ID]` prints its URL.
"""

import asyncio
import sys
from typing import Any

import asyncpg
import uvloop
from aiohttp import web

from opsentry.projections import incidents
from opsentry.projections.incident_view import IncidentFilter
from opsentry.projections.page_request import PageRequest


async def keep(_: Any) -> None:
    return None


async def serve() -> None:
    async def health(_: web.Request) -> web.Response:
        return web.Response(text="OK")

    app = web.Application()
    app.router.add_get("/health", health)
    if len(sys.argv) > 1:
        pool = await asyncpg.create_pool(sys.argv[1], min_size=0, max_size=16, reset=keep)
        tenant_id = int(sys.argv[2])

        async def listing(_: web.Request) -> web.Response:
            async with pool.acquire() as connection:
                row = await incidents.select_incidents(connection, tenant_id, IncidentFilter(), PageRequest(50))
            body = b'{"incidents":[' + row["items"] + b'],"total":%d,"limit":50,"offset":0}' % row["total"]
            return web.Response(body=body, content_type="application/json")

        app.router.add_get("/incidents", listing)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve())

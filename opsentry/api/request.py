"""What every request brings, whoever sends it: its id, the address that it is counted against, its body."""

import asyncio
from collections.abc import Sequence

from aiohttp import web

from opsentry.api.errors import BodyBroken, BodyTooLarge, BodyTooSlow
from opsentry.http.server import REQUEST_ID
from opsentry.infrastructure.rate_limit import client_source
from opsentry.settings import Network

__all__ = ["MAX_BODY", "REQUEST_ID", "address", "octets"]

MAX_BODY = 64 * 1024


def address(request: web.Request, trusted: Sequence[Network]) -> str:
    """Return whom to count a request against; `trusted` are networks of proxies."""
    # A proxy may add its address in a line of its own, after whatever line the client made up.
    forwarded_for = ",".join(request.headers.getall("X-Forwarded-For", ()))
    return client_source(request.remote, forwarded_for, trusted)


async def octets(request: web.Request, timeout: float) -> bytes:  # noqa: ASYNC109 - what it raises is ours
    """Return the whole body, which may take `timeout` seconds to arrive.

    Raises:
        BodyTooLarge, BodyTooSlow, BodyBroken: It has not arrived, or not whole.
    """
    if (request.content_length or 0) > MAX_BODY:
        raise BodyTooLarge
    try:
        async with asyncio.timeout(timeout):
            return await request.read()
    except TimeoutError:
        raise BodyTooSlow from None
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLarge from None
    except (web.RequestPayloadError, ConnectionResetError):
        raise BodyBroken from None

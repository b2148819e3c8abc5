"""All pages, by path and method."""

from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler

from opsentry.access.rate_limit import RateLimiter
from opsentry.api.http import Parts
from opsentry.web.agreeing import Agreeing
from opsentry.web.pages import bounded
from opsentry.web.subscribing import Subscribing


def pages(parts: Parts, asking: RateLimiter) -> Mapping[str, Mapping[str, Handler]]:
    """Return the handlers of all pages; `asking` counts who asks to be told."""
    subscribing, agreeing = Subscribing(parts, asking), Agreeing(parts)
    return {
        "/status/{slug}/subscribe": _methods(GET=subscribing.form, POST=subscribing.ask),
        "/status/{slug}/subscribe/sent": _methods(GET=subscribing.sent),
        "/confirm/{token}": _methods(GET=agreeing.confirmation, POST=agreeing.confirm),
        "/unsubscribe/{token}": _methods(GET=agreeing.farewell, POST=agreeing.unsubscribe),
    }


def _methods(**handlers: Handler) -> Mapping[str, Handler]:
    """Return the handlers of one page; what it does not know is refused with a page, too."""
    allowed = {*handlers, "HEAD"}

    async def refuse(request: web.Request) -> web.StreamResponse:
        raise web.HTTPMethodNotAllowed(request.method, allowed)

    known = {**handlers, "HEAD": handlers["GET"], "*": refuse}
    return {method: bounded(handler) for method, handler in known.items()}

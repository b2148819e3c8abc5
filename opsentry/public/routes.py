"""All pages, by path and method."""

from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler

from opsentry.api.context import Dependencies
from opsentry.infrastructure.rate_limit import RateLimiter
from opsentry.public.confirmation import Confirmation
from opsentry.public.pages import bounded
from opsentry.public.sign_up import SignUp


def pages(parts: Dependencies, asking: RateLimiter) -> Mapping[str, Mapping[str, Handler]]:
    """Return the handlers of all pages; `asking` counts who asks to be told."""
    subscribing, agreeing = SignUp(parts, asking), Confirmation(parts)
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

"""Map the paths and methods of the public pages to their handlers."""

from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler

from opsentry.http.context import Dependencies
from opsentry.infrastructure.rate_limit import RateLimiter
from opsentry.public.confirmation import ConfirmationPages
from opsentry.public.pages import render_errors
from opsentry.public.sign_up import SignUpPages


def pages(dependencies: Dependencies, sign_up_limiter: RateLimiter) -> Mapping[str, Mapping[str, Handler]]:
    """Return the handlers of all public pages, by path and method.

    Args:
        dependencies: The parts that HTTP works with.
        sign_up_limiter: Counts sign-ups by client address.
    """
    sign_up, confirmation = SignUpPages(dependencies, sign_up_limiter), ConfirmationPages(dependencies)
    return {
        "/status/{slug}/subscribe": _by_method(GET=sign_up.show_form, POST=sign_up.submit_form),
        "/status/{slug}/subscribe/sent": _by_method(GET=sign_up.show_sent),
        "/confirm/{token}": _by_method(GET=confirmation.show_confirm, POST=confirmation.confirm),
        "/unsubscribe/{token}": _by_method(GET=confirmation.show_unsubscribe, POST=confirmation.unsubscribe),
    }


def _by_method(**handlers: Handler) -> Mapping[str, Handler]:
    """Return the handlers of one path; every other method gets an error page with status 405."""
    allowed = {*handlers, "HEAD"}

    async def refuse(request: web.Request) -> web.StreamResponse:
        raise web.HTTPMethodNotAllowed(request.method, allowed)

    by_method = {**handlers, "HEAD": handlers["GET"], "*": refuse}
    return {method: render_errors(handler) for method, handler in by_method.items()}

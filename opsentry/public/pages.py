"""Render public pages with their security headers, and errors as pages without internal details."""

import base64
import math
from collections.abc import Mapping
from hashlib import sha256

import jinja2
from aiohttp import web
from aiohttp.typedefs import Handler

from opsentry.http.errors import error_response
from opsentry.http.server import REQUEST_ID
from opsentry.notifications.messages.text import status_updates

_LOADER = jinja2.PackageLoader("opsentry.public")
_TEMPLATES = jinja2.Environment(
    loader=_LOADER,
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    auto_reload=False,
    trim_blocks=True,
    lstrip_blocks=True,
)
_STYLE = _LOADER.get_source(_TEMPLATES, "page.css")[0]
_TEMPLATES.globals["style"] = _STYLE
_TEMPLATES.filters["status_updates"] = status_updates

# Pages load nothing, run no script and allow one style. `no-referrer` keeps the tokens in their URLs secret.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; "
    f"style-src 'sha256-{base64.b64encode(sha256(_STYLE.encode()).digest()).decode()}'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
    "Cache-Control": "no-store",
}

_UNREADABLE = ("We could not read the form", "Nothing has changed. Go back and send the form again.")
_ERRORS: Mapping[int, tuple[str, str]] = {
    400: _UNREADABLE,
    404: (
        "Page not found",
        "If you followed a link in an email, check that the link is complete. If you typed the address, check it.",
    ),
    405: ("This page cannot do that", "Nothing has changed. Open the page in a browser and use its form."),
    408: ("The form took too long to arrive", "Nothing has changed. Go back and send the form again."),
    413: ("The form is too large", "Nothing has changed. Go back and shorten your answers."),
    415: _UNREADABLE,
    429: ("Too many requests", "Nothing has changed. You can try again in {wait}."),
    503: (
        "This page is unavailable right now",
        "Try again in a minute. It is safe to repeat what you did.",
    ),
}
_UNEXPECTED = ("Sorry, there is a problem", "Try again later. It is safe to repeat what you did.")


def page(template: str, *, status: int = 200, **values: object) -> web.Response:
    """Return the page that a template renders from `values`."""
    text = _TEMPLATES.get_template(template).render(values)
    return web.Response(status=status, text=text, content_type="text/html", headers=_HEADERS)


def render_errors(handler: Handler) -> Handler:
    """Return a handler that answers every exception with an error page.

    Status and headers such as `Retry-After` come from the API's table of errors.
    """

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:  # noqa: BLE001 - nothing above this handler renders pages
            request_id = request[REQUEST_ID]
            response = error_response(error, request, request_id)
            title, advice = _ERRORS.get(response.status, _UNEXPECTED)
            advice = advice.replace("{wait}", _wait(response.headers.get("Retry-After", "")))
            error_page = page("error.html", title=title, advice=advice, request_id=request_id)
            response.body = error_page.body
            response.content_type = error_page.content_type
            response.headers.update(_HEADERS)
            return response

    return handle


def _wait(retry_after: str) -> str:
    """Return the seconds of a `Retry-After` header as people say them, rounded up to minutes."""
    minutes = math.ceil(int(retry_after or 0) / 60)
    return "a minute" if minutes <= 1 else f"{minutes} minutes"

"""How a page is made: templates, the headers that every page carries, and errors without details."""

import base64
from collections.abc import Mapping
from hashlib import sha256

import jinja2
from aiohttp import web
from aiohttp.typedefs import Handler

from opsentry.api import errors
from opsentry.api.request import REQUEST_ID

_LOADER = jinja2.PackageLoader("opsentry.public")
_TEMPLATES = jinja2.Environment(
    loader=_LOADER, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_STYLE = _LOADER.get_source(_TEMPLATES, "page.css")[0]
_TEMPLATES.globals["style"] = _STYLE

# Nothing is loaded, nothing runs, nobody frames it, and the one style is ours. Links with tokens stay here.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; "
    f"style-src 'sha256-{base64.b64encode(sha256(_STYLE.encode()).digest()).decode()}'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
    "Cache-Control": "no-store",
}

_AWAY = ("This does not work at the moment", "Please try again in a minute.")
_WORDS: Mapping[int, tuple[str, str]] = {
    400: ("This could not be read", "Please go back and try again."),
    404: ("There is no such page", "If you followed a link in an e-mail, make sure that all of it was copied."),
    405: ("This page cannot be used like that", "Please open it in a browser."),
    408: ("This took too long to arrive", "Please go back and try again."),
    413: ("This is too much", "Please go back and try again with less."),
    415: ("This could not be read", "Please use the form of the page."),
    429: ("Too many tries", "Please try again later."),
    503: _AWAY,
}


def page(name: str, *, status: int = 200, **filled: object) -> web.Response:
    """Return the page that the template `name` makes of what it is filled with."""
    text = _TEMPLATES.get_template(name).render(filled)
    return web.Response(status=status, text=text, content_type="text/html", headers=_HEADERS)


def bounded(handler: Handler) -> Handler:
    """Return a handler that answers with a page whatever goes wrong, by the API's table of errors."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:  # noqa: BLE001 - the outermost place of pages
            request_id = request[REQUEST_ID]
            answer = errors.answer(error, request, request_id)
            title, text = _WORDS.get(answer.status, ("Something went wrong", "Please try again later."))
            shown = page("error.html", title=title, text=text, request_id=request_id)
            # Its status and headers stay, such as Retry-After.
            answer.body = shown.body
            answer.content_type = shown.content_type
            answer.headers.update(_HEADERS)
            return answer

    return handle

"""All routes, and the way every request goes, readable at a glance."""

import os
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from opsentry.access.rate_limit import source
from opsentry.access.tokens import BadToken, Token
from opsentry.api import errors, health, incidents, maintenance, services
from opsentry.api.errors import MissingScope, RateLimited, rate_headers
from opsentry.api.health import Readiness
from opsentry.api.http import MAX_BODY, Call, Parts

Endpoint = Callable[[Call], Awaitable[web.Response]]

READ = "read:status"
INCIDENTS = "write:incidents"
MAINTENANCE = "write:maintenance"

# (method, path below /api/v1, scope that the token needs, handler)
ROUTES: tuple[tuple[str, str, str | None, Endpoint], ...] = (
    ("GET", "/health", None, health.ping),
    ("GET", "/services", READ, services.listing),
    ("GET", "/services/{id}", READ, services.one),
    ("GET", "/services/{id}/uptime", READ, services.uptime),
    ("GET", "/incidents", READ, incidents.listing),
    ("POST", "/incidents", INCIDENTS, incidents.create),
    ("GET", "/incidents/active", READ, incidents.active),
    ("GET", "/incidents/{id}", READ, incidents.one),
    ("PATCH", "/incidents/{id}", INCIDENTS, incidents.change),
    ("POST", "/incidents/{id}/updates", INCIDENTS, incidents.post_update),
    ("POST", "/incidents/{id}/resolve", INCIDENTS, incidents.resolve),
    ("GET", "/maintenance", READ, maintenance.listing),
    ("POST", "/maintenance", MAINTENANCE, maintenance.create),
    ("GET", "/maintenance/upcoming", READ, maintenance.upcoming),
    ("GET", "/maintenance/{id}", READ, maintenance.one),
    ("POST", "/maintenance/{id}/{action}", MAINTENANCE, maintenance.act),
)

_REQUEST_ID = web.RequestKey("request_id", str)


def create_app(parts: Parts, readiness: Readiness) -> web.Application:
    """Return the HTTP application."""
    app = web.Application(middlewares=[boundary], client_max_size=MAX_BODY)
    app.router.add_get("/health", health.probe)
    app.router.add_get("/health/live", health.live)
    app.router.add_get("/health/ready", readiness.ready)
    for method, path, scope, endpoint in ROUTES:
        handler = _guarded(parts, scope, endpoint)
        if method == "GET":
            app.router.add_get(f"/api/v1{path}", handler)  # answers HEAD too
        else:
            app.router.add_route(method, f"/api/v1{path}", handler)
    return app


@web.middleware
async def boundary(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, and turn every error into an answer: nothing else leaves."""
    request_id = os.urandom(8).hex()
    request[_REQUEST_ID] = request_id
    try:
        response = await handler(request)
    except Exception as error:  # noqa: BLE001 - the outermost place, where all of them end
        response = errors.answer(error, request, request_id)
    response.headers["X-Request-ID"] = request_id
    return response


def _guarded(parts: Parts, scope: str | None, endpoint: Endpoint) -> Handler:
    """Return a handler that lets in who may: a working token, within its rate, with the scope."""

    async def handle(request: web.Request) -> web.StreamResponse:
        address = source(request.remote, request.headers.get("X-Forwarded-For"), parts.settings.trusted_proxies)
        token = await _authenticate(parts, request, address)
        standing = await parts.limiter.hit(token.token_id, address)
        if not standing.allowed:
            raise RateLimited(standing)
        try:
            _require(token, scope)
            response = await endpoint(Call(request, request[_REQUEST_ID], token, parts))
        except Exception as error:  # noqa: BLE001 - answered here, so that the answer shows the rate as well
            response = errors.answer(error, request, request[_REQUEST_ID])
        response.headers.update(rate_headers(standing))
        return response

    return handle


def _require(token: Token, scope: str | None) -> None:
    if scope is not None and scope not in token.scopes:
        raise MissingScope(scope)


async def _authenticate(parts: Parts, request: web.Request, address: str) -> Token:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    try:
        return await parts.tokens.authenticate(value.strip() if kind.lower() == "bearer" else "")
    except BadToken:
        # Counted after the fact: a token that works is let in however many others failed from the same address.
        standing = await parts.failures.hit(address)
        if not standing.allowed:
            raise RateLimited(standing) from None
        raise

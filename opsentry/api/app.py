"""All routes, and the way every request goes, readable at a glance."""

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import TypeVar

import structlog
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from opsentry.api import deliveries, errors, health, incidents, ledger, maintenance, services, subscriptions, uptime
from opsentry.api.context import Dependencies, RequestContext
from opsentry.api.errors import MissingScope, NotFound, RateLimited, rate_headers
from opsentry.api.health import Readiness
from opsentry.api.operator import Ops
from opsentry.api.request import MAX_BODY, REQUEST_ID, address
from opsentry.api.responses import unless_known
from opsentry.identity.api_tokens import ApiToken
from opsentry.identity.operator_tokens import OperatorToken
from opsentry.identity.tokens import AuthenticatedToken, InvalidToken, TokenDirectory
from opsentry.infrastructure.rate_limit import RateLimiter

_log = structlog.get_logger()

T = TypeVar("T", bound=AuthenticatedToken)

Endpoint = Callable[[RequestContext], Awaitable[web.StreamResponse]]

READ = ("read:status",)
INCIDENTS = ("write:incidents",)
MAINTENANCE = ("write:maintenance",)
AUDIT = ("read:audit",)
SUBSCRIPTIONS = ("write:subscriptions",)

# (method, path below /api/v1, scopes that the token needs, handler)
ROUTES: tuple[tuple[str, str, tuple[str, ...], Endpoint], ...] = (
    ("GET", "/health", (), health.ping),
    ("GET", "/services", READ, services.listing),
    ("GET", "/services/{id}", READ, services.one),
    ("GET", "/services/{id}/uptime", READ, uptime.one),
    ("GET", "/services/{id}/uptime/daily", READ, uptime.daily),
    ("GET", "/uptime", READ, uptime.everything),
    ("GET", "/incidents", READ, incidents.listing),
    ("POST", "/incidents", INCIDENTS, incidents.create),
    ("GET", "/incidents/active", READ, incidents.active),
    ("GET", "/incidents/{id}", READ, incidents.one),
    ("PATCH", "/incidents/{id}", INCIDENTS, incidents.change),
    ("POST", "/incidents/{id}/updates", INCIDENTS, incidents.post_update),
    ("POST", "/incidents/{id}/resolve", INCIDENTS, incidents.resolve),
    ("GET", "/incidents/{id}/events", READ, incidents.history),
    ("POST", "/incidents/{id}/redactions", AUDIT + INCIDENTS, incidents.redact),
    ("GET", "/maintenance", READ, maintenance.listing),
    ("POST", "/maintenance", MAINTENANCE, maintenance.create),
    ("GET", "/maintenance/upcoming", READ, maintenance.upcoming),
    ("GET", "/maintenance/{id}", READ, maintenance.one),
    ("PATCH", "/maintenance/{id}", MAINTENANCE, maintenance.change),
    ("GET", "/maintenance/{id}/events", READ, maintenance.history),
    ("POST", "/maintenance/{id}/redactions", AUDIT + MAINTENANCE, maintenance.redact),
    ("POST", "/maintenance/{id}/{action}", MAINTENANCE, maintenance.act),
    # Whoever is told is nobody else's business: reading needs the writing scope.
    ("GET", "/subscriptions", SUBSCRIPTIONS, subscriptions.listing),
    ("POST", "/subscriptions", SUBSCRIPTIONS, subscriptions.create),
    ("GET", "/subscriptions/{id}", SUBSCRIPTIONS, subscriptions.one),
    ("PATCH", "/subscriptions/{id}", SUBSCRIPTIONS, subscriptions.change),
    ("DELETE", "/subscriptions/{id}", SUBSCRIPTIONS, subscriptions.remove),
    ("POST", "/subscriptions/{id}/test", SUBSCRIPTIONS, subscriptions.test),
    ("POST", "/subscriptions/{id}/rotate-secret", SUBSCRIPTIONS, subscriptions.rotate_secret),
    ("GET", "/subscriptions/{id}/deliveries", SUBSCRIPTIONS, deliveries.listing),
    ("GET", "/subscriptions/{id}/deliveries/{delivery_id}", SUBSCRIPTIONS, deliveries.one),
    ("POST", "/subscriptions/{id}/deliveries/{delivery_id}/redeliver", SUBSCRIPTIONS, deliveries.redeliver),
    ("GET", "/events", AUDIT, ledger.page),
    ("GET", "/events/head", AUDIT, ledger.head),
    ("GET", "/events/export", AUDIT, ledger.export_lines),
)

# Request ids: random for each process, then counted. Nothing depends on their being hard to guess.
_PROCESS = os.urandom(6).hex()
_requests = count(1)


def create_app(
    parts: Dependencies, readiness: Readiness, ops: Ops, pages: Mapping[str, Mapping[str, Handler]]
) -> web.Application:
    """Return the HTTP application; `pages` are handlers for people, by path and method.

    Handlers are wrapped where they are registered: a middleware of aiohttp costs every request, probes above all, more
    than the wrapping itself.
    """
    app = web.Application(client_max_size=MAX_BODY)
    routes: dict[str, dict[str, Handler]] = {
        **{path: dict(handlers) for path, handlers in pages.items()},
        "/health": {"GET": health.probe},
        "/health/live": {"GET": health.live},
        "/health/ready": {"GET": readiness.ready},
        "/ops/outbox": {"GET": _for_operators(parts, ops.outbox)},
        "/ops/projections": {"GET": _for_operators(parts, ops.projections)},
        "/ops/projections/halted": {"GET": _for_operators(parts, ops.halted)},
    }
    for method, path, scopes, endpoint in ROUTES:
        routes.setdefault(f"/api/v1{path}", {})[method] = _for_tenants(parts, scopes, endpoint)
    resources = []
    for path, handlers in routes.items():
        resource = app.router.add_resource(path)
        resources.append(resource)
        methods = {**handlers, **({"HEAD": handlers["GET"]} if "GET" in handlers else {})}
        for method, handler in methods.items():
            resource.add_route(method, _bounded(handler), expect_handler=_expect)
    # Only what matched nothing above comes here.
    app.router.add_route("*", "/{path:.*}", _bounded(_unrouted(resources)), expect_handler=_expect)
    return app


def _bounded(handler: Handler) -> Handler:
    """Return a handler that gives the request its id and turns every error into an answer: nothing else leaves."""

    async def handle(request: web.Request) -> web.StreamResponse:
        request_id = f"{_PROCESS}{next(_requests):08x}"
        request[REQUEST_ID] = request_id
        try:
            response = await handler(request)
        except Exception as error:  # noqa: BLE001 - the outermost place, where all of them end
            response = errors.answer(error, request, request_id)
        response.headers["X-Request-ID"] = request_id
        return response

    return handle


async def _expect(request: web.Request) -> None:
    """Ask for the body where the client waits to be asked. An expectation of another kind is none that binds us."""
    if request.version == HttpVersion11 and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun


def _unrouted(resources: Sequence[web.Resource]) -> Handler:
    """Return the handler of paths and methods that there are not."""

    async def handle(request: web.Request) -> web.StreamResponse:
        allowed: set[str] = set()
        for resource in resources:
            _, methods = await resource.resolve(request)
            allowed |= methods
        if allowed:
            raise web.HTTPMethodNotAllowed(request.method, allowed)
        raise NotFound

    return handle


def _for_tenants(parts: Dependencies, scopes: Sequence[str], endpoint: Endpoint) -> Handler:
    """Return a handler that lets in tenants' tokens with the scopes."""

    async def respond(request: web.Request, token: ApiToken, rate: Mapping[str, str]) -> web.StreamResponse:
        _require(token, scopes)
        request_id = request[REQUEST_ID]
        return await endpoint(RequestContext(request, request_id, token, parts, {**rate, "X-Request-ID": request_id}))

    return _guarded(parts, parts.tokens, respond)


def _for_operators(parts: Dependencies, handler: Handler) -> Handler:
    """Return a handler that lets in operators' tokens, and logs which one asked."""

    async def respond(request: web.Request, token: OperatorToken, _: Mapping[str, str]) -> web.StreamResponse:
        _log.info("operator asked", request_id=request[REQUEST_ID], path=request.path, token_prefix=token.prefix)
        return await handler(request)

    return _guarded(parts, parts.operators, respond)


def _guarded(
    parts: Dependencies,
    tokens: TokenDirectory[T],
    respond: Callable[[web.Request, T, Mapping[str, str]], Awaitable[web.StreamResponse]],
) -> Handler:
    """Return a handler that lets in who may: a working token of the kind, within its rate, as `respond` decides."""

    async def handle(request: web.Request) -> web.StreamResponse:
        sender = address(request, parts.settings.trusted_proxies)
        token = await _authenticate(tokens, parts.failures, request, sender)
        standing = parts.limiter.hit(tokens.mark, token.token_id, sender)
        if not standing.allowed:
            raise RateLimited(standing)
        rate = rate_headers(standing)
        try:
            response = unless_known(request, await respond(request, token, rate))
        except Exception as error:  # noqa: BLE001 - answered here, so that the answer shows the rate as well
            response = errors.answer(error, request, request[REQUEST_ID])
        response.headers.update(rate)
        return response

    return handle


def _require(token: ApiToken, scopes: Sequence[str]) -> None:
    for scope in scopes:
        if scope not in token.scopes:
            raise MissingScope(scope)


async def _authenticate(tokens: TokenDirectory[T], failures: RateLimiter, request: web.Request, sender: str) -> T:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    try:
        return await tokens.authenticate(value.strip() if kind.lower() == "bearer" else "")
    except InvalidToken:
        # Counted after the fact: a token that works is let in however many others failed from the same address.
        standing = failures.hit(sender)
        if not standing.allowed:
            raise RateLimited(standing) from None
        raise

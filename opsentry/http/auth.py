"""Authentication and rate limits of a request: one token, one source address, one bucket."""

from collections.abc import Sequence
from typing import TypeVar

from aiohttp import web

from opsentry.http.context import Dependencies
from opsentry.http.errors import RateLimited
from opsentry.identity.api_tokens import ApiToken
from opsentry.identity.tokens import AuthenticatedToken, InvalidToken, TokenDirectory
from opsentry.infrastructure.postgres import DatabaseUnavailable
from opsentry.infrastructure.rate_limit import RateLimiter, RateLimitStatus, client_source
from opsentry.settings import Network

T = TypeVar("T", bound=AuthenticatedToken)


def source_address(request: web.Request, trusted_proxies: Sequence[Network]) -> str:
    """Return the address that a request counts against."""
    # A proxy may add its address in a header line of its own, after a line that the client made up.
    forwarded_for = ",".join(request.headers.getall("X-Forwarded-For", ()))
    return client_source(request.remote, forwarded_for, trusted_proxies)


async def admit(
    tokens: TokenDirectory[T],
    request: web.Request,
    limiter: RateLimiter,
    failures: RateLimiter,
    proxies: Sequence[Network],
) -> tuple[T, RateLimitStatus]:
    """Authenticate a request and count it; return its token and how the token's rate limit stands.

    Raises:
        InvalidToken: It has no valid token.
        RateLimited: The token sent too many requests, or the address failed too often.
        DatabaseUnavailable: The token could not be looked up.
    """
    address = source_address(request, proxies)
    try:
        token = await tokens.authenticate(_bearer_token(request))
    except InvalidToken:
        # Counted afterwards: failures of others at the same address never keep a valid token out.
        status = failures.hit(address)
        if not status.allowed:
            raise RateLimited(status) from None
        raise
    status = limiter.hit(*_bucket(token), address)
    if not status.allowed:
        raise RateLimited(status)
    return token, status


async def is_operator(dependencies: Dependencies, request: web.Request) -> bool:
    """Return whether a request that anyone may make has an operator's token; it counts as in `admit`."""
    tokens = dependencies.operator_tokens
    if not _bearer_token(request).startswith(tokens.mark):
        return False
    limiter, failures = dependencies.request_limiter, dependencies.failure_limiter
    try:
        await admit(tokens, request, limiter, failures, dependencies.settings.trusted_proxies)
    except (InvalidToken, RateLimited, DatabaseUnavailable):
        return False
    return True


def _bearer_token(request: web.Request) -> str:
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _bucket(token: AuthenticatedToken) -> tuple[str | int, ...]:
    # Token ids count within their tenant.
    return (token.tenant_id, token.token_id) if isinstance(token, ApiToken) else ("operator", token.token_id)

"""The argument of a handler: the authenticated request, its caller, its parameters and its body."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.identity.api_tokens import ApiTokens
from opsentry.identity.operator_tokens import OperatorTokens
from opsentry.infrastructure.rate_limit import RateLimiter
from opsentry.settings import Settings

Q = TypeVar("Q", bound=msgspec.Struct)
B = TypeVar("B", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The parts that HTTP works with; `bootstrap` builds them."""

    settings: Settings
    application: Application
    api_tokens: ApiTokens
    operator_tokens: OperatorTokens
    request_limiter: RateLimiter
    failure_limiter: RateLimiter


class RequestContext(msgspec.Struct, Generic[Q, B], kw_only=True):
    """One authenticated request of an operation.

    Attributes:
        request: The request itself.
        application: The use cases' parts.
        caller: The caller of the use case.
        token_prefix: The public prefix of the token.
        query: The parsed query parameters.
        body: The decoded body.
        id: The id in the path; 0 where the path has none.
        headers: Headers that every response to the request carries, for streamed responses.
    """

    request: web.Request
    application: Application
    caller: Caller
    token_prefix: str
    query: Q
    body: B
    id: int
    headers: Mapping[str, str]

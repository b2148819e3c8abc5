"""The one table that turns errors into HTTP."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import structlog
from aiohttp import web

from opsentry.domain.decider import DomainError, IllegalTransition, InvalidField
from opsentry.events.appender import TenantBusy
from opsentry.events.command_handler import ConcurrencyConflict, IdempotencyKeyReused, StreamNotFound
from opsentry.identity.tokens import InvalidToken
from opsentry.infrastructure.encryption import DecryptionFailed, EncryptionKeyMissing
from opsentry.infrastructure.postgres import DatabaseUnavailable, OutcomeUnknown
from opsentry.infrastructure.rate_limit import RateLimitStatus
from opsentry.projections.engine.projector import PositionNotReached

_log = structlog.get_logger()

RETRY_AFTER = "1"


class BadRequest(Exception):
    """Something that was sent cannot be used; the message names the field."""


class NotFound(Exception):
    """There is no such thing, or it is another tenant's: which of them is not said."""


class PreconditionFailed(Exception):
    """The thing is not the one that `If-Match` names any more."""

    def __init__(self) -> None:
        super().__init__("If-Match: it was changed since; read it again")
        self.etag: str | None = None
        """The inside of the entity tag that it has now."""


class MissingScope(Exception):
    """The token works, but not for this."""

    def __init__(self, scope: str) -> None:
        super().__init__(f"missing required scope: {scope}")


class RateLimited(Exception):
    """Too many requests."""

    def __init__(self, standing: RateLimitStatus) -> None:
        super().__init__(f"rate limit of {standing.limit} requests in {standing.window_seconds} s exceeded")
        self.standing = standing


class BodyTooSlow(Exception):
    """The request did not arrive whole in time."""


class BodyTooLarge(Exception):
    """The request's body is larger than any that makes sense."""


class BodyBroken(Exception):
    """The request's body ended too early, or is not encoded the way its headers say."""


class NotJson(Exception):
    """The request's body is declared to be something else than JSON."""


class Row(NamedTuple):
    """How one kind of error is answered. `says` is the message where the error's own is not for outsiders."""

    status: int
    says: str | None = None
    headers: Callable[[Exception], Mapping[str, str]] = lambda _: {}
    closes: bool = False


def _retry(_: Exception) -> Mapping[str, str]:
    return {"Retry-After": RETRY_AFTER}


def _current(error: Exception) -> Mapping[str, str]:
    return {"ETag": f'"{error.etag}"'} if isinstance(error, PreconditionFailed) and error.etag else {}


def _wait_for_window(error: Exception) -> Mapping[str, str]:
    if not isinstance(error, RateLimited):
        return {}
    return {"Retry-After": str(error.standing.reset_seconds), **rate_headers(error.standing)}


# The first row that the error is an instance of counts.
TABLE: Mapping[type[Exception], Row] = {
    BadRequest: Row(400),
    InvalidField: Row(400),
    InvalidToken: Row(
        401, "missing, unknown, expired or revoked API token", lambda _: {"WWW-Authenticate": 'Bearer realm="opsentry"'}
    ),
    BodyBroken: Row(400, "body: did not arrive whole, or is not encoded as Content-Encoding says", closes=True),
    MissingScope: Row(403),
    NotFound: Row(404, "not found"),
    StreamNotFound: Row(404, "not found"),
    BodyTooSlow: Row(408, "the request body did not arrive in time", closes=True),
    IllegalTransition: Row(409),
    ConcurrencyConflict: Row(409, "changed by others at the same time; read it and try again"),
    PreconditionFailed: Row(412, headers=_current),
    DomainError: Row(400),
    BodyTooLarge: Row(413, "the request body must have at most 65536 bytes", closes=True),
    NotJson: Row(415, "the request body must be JSON, with Content-Type: application/json"),
    IdempotencyKeyReused: Row(422, "Idempotency-Key: was used before for another request; take a new one"),
    RateLimited: Row(429, headers=_wait_for_window),
    TenantBusy: Row(503, "too many writers at once; nothing was changed, try again", _retry),
    OutcomeUnknown: Row(
        503,
        "the database was lost while it wrote: the change may or may not be recorded; send it again with the same"
        " Idempotency-Key if it had one, or read before trying again",
        _retry,
    ),
    PositionNotReached: Row(503, headers=_retry),
    EncryptionKeyMissing: Row(503),
    DecryptionFailed: Row(503),
    DatabaseUnavailable: Row(503, "the database does not answer; nothing was changed", _retry),
}


def rate_headers(standing: RateLimitStatus) -> dict[str, str]:
    """Return the fields of draft-ietf-httpapi-ratelimit-headers (version 10) for a bucket."""
    return {
        "RateLimit-Policy": f'"default";q={standing.limit};w={standing.window_seconds}',
        "RateLimit": f'"default";r={standing.remaining};t={standing.reset_seconds}',
    }


def answer(error: Exception, request: web.Request, request_id: str) -> web.Response:
    """Return the response for `error`. What is not in the table is a defect: logged, and answered without details."""
    row = next((row for kind, row in TABLE.items() if isinstance(error, kind)), None)
    if row is None:
        if isinstance(error, web.HTTPException):
            return _framework(error)
        _log.error("unexpected error", request_id=request_id, path=request.path, exc_info=error)
        row = Row(500, "internal error")
    elif row.status >= 500:  # noqa: PLR2004 - the class of server errors
        _log.warning("dependency failed", request_id=request_id, path=request.path, error=str(error))
    message = str(error) if row.says is None else row.says
    response = _json(row.status, message, request_id)
    response.headers.update(row.headers(error))
    if row.closes:
        response.force_close()
    return response


def _json(status: int, message: str, request_id: str) -> web.Response:
    body = {"error": message}
    if status >= 500:  # noqa: PLR2004
        body["request_id"] = request_id
    return web.Response(status=status, body=msgspec.json.encode(body), content_type="application/json", charset="utf-8")


def _framework(error: web.HTTPException) -> web.Response:
    """Return what aiohttp itself refuses, in the standard shape."""
    says = {404: "not found", 405: "method not allowed", 413: TABLE[BodyTooLarge].says}
    response = _json(error.status, says.get(error.status) or error.reason.lower(), "")
    if isinstance(error, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    return response

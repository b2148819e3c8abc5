"""The one table that turns errors into HTTP responses."""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

import msgspec
import structlog
from aiohttp import web

from opsentry.application.caller import MissingPermission
from opsentry.application.errors import NotFound, PreconditionFailed
from opsentry.domain.decider import DomainError, IllegalTransition, InvalidField, StreamRemoved
from opsentry.events.appender import TenantBusy
from opsentry.events.command_handler import ConcurrencyConflict, IdempotencyKeyReused
from opsentry.http.body import MAX_BODY_BYTES, BodyBroken, BodyTooLarge, BodyTooSlow, NotJson
from opsentry.http.operation import ErrorBody
from opsentry.http.responses import json_response
from opsentry.identity.tokens import InvalidToken
from opsentry.infrastructure.encryption import DecryptionFailed, EncryptionKeyMissing
from opsentry.infrastructure.postgres import DatabaseUnavailable, OutcomeUnknown
from opsentry.infrastructure.rate_limit import RateLimitStatus
from opsentry.projections.engine.projector import PositionNotReached

_log = structlog.get_logger()

RETRY_AFTER_SECONDS = "1"


class RateLimited(Exception):
    """The caller sent more requests than its limit allows."""

    def __init__(self, status: RateLimitStatus) -> None:
        super().__init__(f"rate limit of {status.limit} requests in {status.window_seconds} s exceeded")
        self.status = status


class ErrorRow(NamedTuple):
    """How one kind of error is answered.

    Attributes:
        status: The status.
        message: The message, where the error's own is not for clients.
        headers: Returns the headers.
        closes: Whether the connection closes after the response.
    """

    status: int
    message: str | None = None
    headers: Callable[[Exception], Mapping[str, str]] = lambda _: {}
    closes: bool = False


def _retry(_: Exception) -> Mapping[str, str]:
    return {"Retry-After": RETRY_AFTER_SECONDS}


def _current_etag(error: Exception) -> Mapping[str, str]:
    return {"ETag": f'"{error.etag}"'} if isinstance(error, PreconditionFailed) else {}


def _window_end(error: Exception) -> Mapping[str, str]:
    if not isinstance(error, RateLimited):
        return {}
    return {"Retry-After": str(error.status.reset_seconds), **rate_headers(error.status)}


# The first row whose class the error is an instance of counts.
TABLE: Mapping[type[Exception], ErrorRow] = {
    InvalidField: ErrorRow(400),
    InvalidToken: ErrorRow(
        401, "missing, unknown, expired or revoked API token", lambda _: {"WWW-Authenticate": 'Bearer realm="opsentry"'}
    ),
    BodyBroken: ErrorRow(400, "body: did not arrive whole, or is not encoded as Content-Encoding says", closes=True),
    MissingPermission: ErrorRow(403),
    NotFound: ErrorRow(404, "not found"),
    StreamRemoved: ErrorRow(404, "not found"),
    BodyTooSlow: ErrorRow(408, "the request body did not arrive in time", closes=True),
    IllegalTransition: ErrorRow(409),
    ConcurrencyConflict: ErrorRow(409, "changed by others at the same time; read it and try again"),
    PreconditionFailed: ErrorRow(412, headers=_current_etag),
    DomainError: ErrorRow(400),
    BodyTooLarge: ErrorRow(413, f"the request body must have at most {MAX_BODY_BYTES} bytes", closes=True),
    NotJson: ErrorRow(415, "the request body must be JSON, with Content-Type: application/json"),
    IdempotencyKeyReused: ErrorRow(422, "Idempotency-Key: was used before for another request; take a new one"),
    RateLimited: ErrorRow(429, headers=_window_end),
    TenantBusy: ErrorRow(503, "too many writers at once; nothing was changed, try again", _retry),
    OutcomeUnknown: ErrorRow(
        503,
        "the database was lost while it wrote: the change may or may not be recorded; send it again with the same"
        " Idempotency-Key if it had one, or read before trying again",
        _retry,
    ),
    PositionNotReached: ErrorRow(503, headers=_retry),
    EncryptionKeyMissing: ErrorRow(503),
    DecryptionFailed: ErrorRow(503),
    DatabaseUnavailable: ErrorRow(503, "the database does not answer; nothing was changed", _retry),
}


def rate_headers(status: RateLimitStatus) -> dict[str, str]:
    """Return the headers of draft-ietf-httpapi-ratelimit-headers (version 10) for a bucket."""
    return {
        "RateLimit-Policy": f'"default";q={status.limit};w={status.window_seconds}',
        "RateLimit": f'"default";r={status.remaining};t={status.reset_seconds}',
    }


def error_response(error: Exception, request: web.Request, request_id: str) -> web.Response:
    """Return the response for `error`. An error outside of the table is a defect: logged, answered without details."""
    row = next((row for kind, row in TABLE.items() if isinstance(error, kind)), None)
    if row is None:
        if isinstance(error, web.HTTPException):
            return _framework_response(error, request_id)
        _log.error("request_failed", request_id=request_id, path=request.path, exc_info=error)
        row = ErrorRow(500, "internal error")
    elif row.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.warning("dependency_failed", request_id=request_id, path=request.path, error=str(error))
    message = str(error) if row.message is None else row.message
    response = _response(row.status, message, request_id, error.field if isinstance(error, InvalidField) else None)
    response.headers.update(row.headers(error))
    if row.closes:
        response.force_close()
    return response


def _response(status: int, message: str, request_id: str, field: str | None = None) -> web.Response:
    is_ours = status >= HTTPStatus.INTERNAL_SERVER_ERROR
    body = ErrorBody(error=message, field=field, request_id=request_id if is_ours else None)
    return json_response(msgspec.json.encode(body), status=status)


def _framework_response(error: web.HTTPException, request_id: str) -> web.Response:
    """Return the standard shape for a refusal of aiohttp itself."""
    messages = {404: "not found", 405: "method not allowed", 413: TABLE[BodyTooLarge].message}
    response = _response(error.status, messages.get(error.status) or error.reason.lower(), request_id)
    if isinstance(error, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    return response

"""Make one HTTP POST and describe its outcome for the tenant, revealing neither the URL nor our network."""

import asyncio
import errno
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version

import aiohttp

from opsentry.notifications.channel import Outcome
from opsentry.notifications.transport.egress import BlockedAddress

USER_AGENT = f"Opsentry/{version('opsentry')}"
REQUEST_TIMEOUT_SECONDS = 15
CONNECT_TIMEOUT_SECONDS = 5
_MAX_RETRY_AFTER_SECONDS = 86_400.0
# A short response is read to its end, so that the connection can be reused. After a longer one it is closed.
_MAX_BODY_BYTES = 1024
_TIMEOUT = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_SECONDS, sock_connect=CONNECT_TIMEOUT_SECONDS)
_HEADERS = {"Content-Type": "application/json", "User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
_GONE = 410
# This machine has run out of file descriptors or memory, so the endpoint was not asked. EADDRNOTAVAIL is absent: a host
# without IPv6 reports it for any IPv6 address.
_EXHAUSTED_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


async def post(http: aiohttp.ClientSession, url: str, body: bytes, headers: Mapping[str, str] = {}) -> Outcome:
    """Post JSON to `url` and return the outcome, within `REQUEST_TIMEOUT_SECONDS`. Redirects are not followed.

    Args:
        http: A session of `egress.http_session`.
        url: The target.
        body: JSON.
        headers: Headers in addition to the content type and user agent.
    """
    try:
        async with http.post(
            url, data=body, headers={**_HEADERS, **headers}, allow_redirects=False, timeout=_TIMEOUT
        ) as response:
            outcome = _outcome(response.status, response.headers.get("Retry-After"))
            try:
                await response.content.readexactly(_MAX_BODY_BYTES)
                response.close()
            except asyncio.IncompleteReadError:
                pass
            except (aiohttp.ClientError, OSError):
                response.close()  # the status is known, and that is the outcome
            return outcome
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if getattr(getattr(error, "os_error", error), "errno", None) in _EXHAUSTED_ERRNOS:
            return Outcome("too many open connections on our side", internal_failure=True)
        return Outcome(_describe(error))


def _outcome(status: int, retry_after: str | None) -> Outcome:
    if 200 <= status < 300:  # noqa: PLR2004
        return Outcome(response_status=status)
    error = f"answered {status}"
    if 300 <= status < 400:  # noqa: PLR2004
        error += ": redirects are not followed"
    return Outcome(error, status, endpoint_gone=status == _GONE, retry_after=_parse_retry_after(retry_after))


def _parse_retry_after(retry_after: str | None) -> float | None:
    """Return a Retry-After header (RFC 9110, 10.2.3) in seconds, from 0 to a day; `None` if absent or malformed."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:10]), _MAX_RETRY_AFTER_SECONDS)
    try:
        retry_at = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if retry_at.tzinfo is None:
        retry_at = retry_at.replace(tzinfo=UTC)
    return max(0.0, min((retry_at - datetime.now(UTC)).total_seconds(), _MAX_RETRY_AFTER_SECONDS))


def _describe(error: Exception) -> str:
    """Return the reason of a failure. The words are ours, because the texts of libraries contain URLs and addresses."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(error.certificate_error, "verify_message", "") or "the certificate is not valid"
            return f"TLS: {reason}"
        case aiohttp.ClientConnectorDNSError():
            return "the host name cannot be resolved"
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, BlockedAddress):
            return str(error.os_error.strerror)
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, ssl.SSLError):
            reason = (error.os_error.reason or "no secure connection could be made").replace("_", " ").lower()
            return f"TLS: {reason}"
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, ConnectionRefusedError):
            return "connection refused"
        case aiohttp.ConnectionTimeoutError():
            return f"no connection within {CONNECT_TIMEOUT_SECONDS} s"
        case TimeoutError():
            return f"no answer within {REQUEST_TIMEOUT_SECONDS} s"
        case aiohttp.ClientConnectorError():
            return "no connection could be made"
        case aiohttp.InvalidURL():
            return "the URL cannot be used"
        case aiohttp.ClientResponseError() | aiohttp.ClientPayloadError():
            return "the response is not HTTP"
        case aiohttp.ServerDisconnectedError() | ConnectionError() | aiohttp.ClientOSError():
            return "the connection was closed without a response"
    return "the message could not be sent"

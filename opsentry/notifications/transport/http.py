"""One HTTP POST, and what came of it in words for the tenant: nothing of the URL, nothing of our network."""

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
TOTAL_SECONDS = 15
CONNECT_SECONDS = 5
_MAX_RETRY_AFTER = 86_400.0
# A short answer is read to its end, so that the connection can be used again; whoever says more is hung up on.
_READ_BYTES = 1024
_TIMEOUT = aiohttp.ClientTimeout(total=TOTAL_SECONDS, sock_connect=CONNECT_SECONDS)
_HEADERS = {"Content-Type": "application/json", "User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
_GONE = 410
# Files or memory that this machine has no more of: the endpoint was not even asked. Not EADDRNOTAVAIL: that is said of
# any IPv6 address too, where there is no IPv6.
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


async def post(http: aiohttp.ClientSession, url: str, body: bytes, headers: Mapping[str, str] = {}) -> Outcome:
    """Post JSON to `url` and return what came of it, within `TOTAL_SECONDS`."""
    try:
        async with http.post(
            url, data=body, headers={**_HEADERS, **headers}, allow_redirects=False, timeout=_TIMEOUT
        ) as response:
            outcome = _outcome(response.status, response.headers.get("Retry-After"))
            try:
                await response.content.readexactly(_READ_BYTES)
                response.close()
            except asyncio.IncompleteReadError:
                pass
            except (aiohttp.ClientError, OSError):
                response.close()  # the status says it all
            return outcome
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if getattr(getattr(error, "os_error", error), "errno", None) in _OURS:
            return Outcome("there are too many connections just now", internal_failure=True)
        return Outcome(_words(error))


def _outcome(status: int, retry_after: str | None) -> Outcome:
    if 200 <= status < 300:  # noqa: PLR2004
        return Outcome(response_status=status)
    error = f"answered {status}"
    if 300 <= status < 400:  # noqa: PLR2004
        error += ": redirects are not followed"
    return Outcome(error, status, endpoint_gone=status == _GONE, retry_after=_seconds(retry_after))


def _seconds(retry_after: str | None) -> float | None:
    """Return a Retry-After (RFC 9110, 10.2.3) in seconds, from 0 to a day; `None` if there is none that makes sense."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:10]), _MAX_RETRY_AFTER)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, min((moment - datetime.now(UTC)).total_seconds(), _MAX_RETRY_AFTER))


def _words(error: Exception) -> str:
    """Return what went wrong, without what libraries say of it: that has URLs and addresses in it."""
    match error:
        case aiohttp.ClientConnectorCertificateError():
            reason = getattr(error.certificate_error, "verify_message", "") or "the certificate is not valid"
            return f"TLS: {reason}"
        case aiohttp.ClientConnectorDNSError():
            return "the name of the host cannot be resolved"
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, BlockedAddress):
            return str(error.os_error.strerror)
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, ssl.SSLError):
            reason = (error.os_error.reason or "no secure connection could be made").replace("_", " ").lower()
            return f"TLS: {reason}"
        case aiohttp.ClientConnectorError() if isinstance(error.os_error, ConnectionRefusedError):
            return "connection refused"
        case aiohttp.ConnectionTimeoutError():
            return f"no connection within {CONNECT_SECONDS} s"
        case TimeoutError():
            return f"no answer within {TOTAL_SECONDS} s"
        case aiohttp.ClientConnectorError():
            return "no connection could be made"
        case aiohttp.InvalidURL():
            return "the URL cannot be used"
        case aiohttp.ClientResponseError() | aiohttp.ClientPayloadError():
            return "the answer is not HTTP"
        case aiohttp.ServerDisconnectedError() | ConnectionError() | aiohttp.ClientOSError():
            return "the connection was closed without an answer"
    return "nothing could be sent"

"""The SMTP pool: reuse connections to the mail relay, and stop using the relay for a while once it fails."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from urllib.parse import unquote, urlsplit

import aiosmtplib

from opsentry.notifications.channel import Outcome

MAX_CONNECTIONS = 8
SEND_TIMEOUT_SECONDS = 15
# The circuit breaker: after a relay could not be used, sending fails at once for this time.
CIRCUIT_OPEN_SECONDS = 15
# A reply code from here on is permanent (RFC 5321, 4.2.1).
_PERMANENT_REPLY = 500
# Relays close connections that are idle for minutes.
_IDLE_SECONDS = 30.0


class SmtpPool:
    """Send e-mails through a mail relay.

    The caller limits the e-mails in flight; each uses a connection of its own.

    Args:
        url: `smtp://` or `smtps://`, with user and password if the relay needs them. `smtp://` uses STARTTLS if the
            relay offers it, and requires it if there is a password.
        local_name: The host name to greet with.
    """

    def __init__(self, url: str, local_name: str) -> None:
        self._url = urlsplit(url)
        self._local_name = local_name
        self._circuit_open_until = 0.0
        self._circuit_reason = ""
        self._idle: list[tuple[aiosmtplib.SMTP, asyncio.TimerHandle]] = []

    async def send(self, sender: str, recipient: str, email: bytes) -> Outcome:
        """Hand an e-mail over to the relay, within `SEND_TIMEOUT_SECONDS`.

        A rejection of the recipient, or of this e-mail for good, counts against the endpoint. Any other failure is an
        internal failure.
        """
        if time.monotonic() < self._circuit_open_until:
            return Outcome(self._circuit_reason, internal_failure=True)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_SECONDS), self._connection() as connection:
                await connection.sendmail(sender, [recipient], email)
        except aiosmtplib.SMTPRecipientsRefused as error:
            refused = error.recipients[0]
            # The relay's own words repeat the address, which must not outlive its subscription.
            return Outcome(f"the mail relay answered {refused.code} for this address", refused.code)
        except aiosmtplib.SMTPDataError as error:
            is_transient = error.code < _PERMANENT_REPLY
            return Outcome(
                f"the mail relay answered {error.code} to the message", error.code, internal_failure=is_transient
            )
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            if isinstance(error, TimeoutError):
                self._open_circuit(_describe(error))
            return Outcome(_describe(error), getattr(error, "code", None), internal_failure=True)
        return Outcome(response_status=250)

    async def close(self) -> None:
        """Close all idle connections."""
        while self._idle:
            connection, timer = self._idle.pop()
            timer.cancel()
            connection.close()

    def _open_circuit(self, reason: str) -> None:
        self._circuit_reason = reason
        self._circuit_open_until = time.monotonic() + CIRCUIT_OPEN_SECONDS

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosmtplib.SMTP]:
        connection = await self._reuse_or_connect()
        try:
            yield connection
        except aiosmtplib.SMTPRecipientsRefused:
            self._keep(connection)  # the address was refused, not the connection
            raise
        except BaseException:
            connection.close()
            raise
        self._keep(connection)

    async def _reuse_or_connect(self) -> aiosmtplib.SMTP:
        while self._idle:
            connection, timer = self._idle.pop()
            timer.cancel()
            # The relay may have closed it. A check before sending leaves no doubt whether an e-mail was accepted.
            try:
                await connection.noop()
            except (aiosmtplib.SMTPException, OSError):
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        return await self._connect()

    async def _connect(self) -> aiosmtplib.SMTP:
        url, uses_implicit_tls = self._url, self._url.scheme == "smtps"
        connection = aiosmtplib.SMTP(
            hostname=url.hostname,
            port=url.port or (465 if uses_implicit_tls else 25),
            username=None if url.username is None else unquote(url.username),
            password=None if url.password is None else unquote(url.password),
            use_tls=uses_implicit_tls,
            # A password is never sent in clear, even if somebody on the path hides the relay's offer of TLS.
            start_tls=None if uses_implicit_tls or url.password is None else True,
            local_hostname=self._local_name,
            timeout=SEND_TIMEOUT_SECONDS,
            tls_context=self._tls_context,
        )
        try:
            await connection.connect()
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            self._open_circuit(_describe(error))
            raise
        except BaseException:
            connection.close()
            raise
        return connection

    @cached_property
    def _tls_context(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # cached, because it reads files

    def _keep(self, connection: aiosmtplib.SMTP) -> None:
        if connection.is_connected:
            timer = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._discard, connection)
            self._idle.append((connection, timer))

    def _discard(self, connection: aiosmtplib.SMTP) -> None:
        self._idle = [idle for idle in self._idle if idle[0] is not connection]
        connection.close()


def _describe(error: Exception) -> str:
    """Return the reason of a failure, without the relay's address and words: tenants see it."""
    match error:
        case aiosmtplib.SMTPAuthenticationError():
            return "the mail relay rejected our login"
        case aiosmtplib.SMTPResponseException():
            return f"the mail relay answered {error.code}"
        case TimeoutError():
            return f"no answer from the mail relay within {SEND_TIMEOUT_SECONDS} s"
        case _ if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
            return "no secure connection to the mail relay"
        case aiosmtplib.SMTPConnectError() | OSError():
            return "no connection to the mail relay"
    return "the mail relay cannot be used"

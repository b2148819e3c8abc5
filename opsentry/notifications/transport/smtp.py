"""The mail relay: a few SMTP connections that are used again, and what it said in words."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from urllib.parse import unquote, urlsplit

import aiosmtplib

from opsentry.notifications.channel import Outcome

CONNECTIONS = 8
SECONDS = 15
# A relay that cannot be used is left alone for so long: who waits for it is told at once what is wrong.
DOWN_SECONDS = 15
_FOR_GOOD = 500
# Relays hang up on who says nothing for some minutes.
_IDLE_SECONDS = 30.0


class SmtpPool:
    """Sends through the relay at an `smtp://` URL (STARTTLS where it is offered, or a must with a password) or `smtps://`."""

    def __init__(self, url: str, local_name: str) -> None:
        self._url = urlsplit(url)
        self._local_name = local_name
        self._down_until = 0.0
        self._down = ""
        self._idle: list[tuple[aiosmtplib.SMTP, asyncio.TimerHandle]] = []

    async def send(self, sender: str, recipient: str, letter: bytes) -> Outcome:
        """Hand the letter over, within `SECONDS`. There are as many connections as there are letters at once."""
        if time.monotonic() < self._down_until:
            return Outcome(self._down, internal_failure=True)
        try:
            async with asyncio.timeout(SECONDS), self._connection() as connection:
                await connection.sendmail(sender, [recipient], letter)
        except aiosmtplib.SMTPRecipientsRefused as error:
            refused = error.recipients[0]
            # Not in the relay's own words: they repeat the address, which has to be forgotten with its subscription.
            return Outcome(f"the mail relay answered {refused.code} for this address", refused.code)
        except aiosmtplib.SMTPDataError as error:
            # For good: it is about this letter, and no other one says so.
            is_transient = error.code < _FOR_GOOD
            return Outcome(
                f"the mail relay answered {error.code} to the letter", error.code, internal_failure=is_transient
            )
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            if isinstance(error, TimeoutError):
                self._rest(_words(error))
            return Outcome(_words(error), getattr(error, "code", None), internal_failure=True)
        return Outcome(response_status=250)

    def _rest(self, why: str) -> None:
        """Leave the relay alone for a while."""
        self._down, self._down_until = why, time.monotonic() + DOWN_SECONDS

    async def close(self) -> None:
        """Close all connections that are idle."""
        while self._idle:
            connection, timer = self._idle.pop()
            timer.cancel()
            connection.close()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosmtplib.SMTP]:
        connection = await self._connected()
        try:
            yield connection
        except aiosmtplib.SMTPRecipientsRefused:
            self._keep(connection)  # it is the address that was refused
            raise
        except BaseException:
            connection.close()
            raise
        self._keep(connection)

    async def _connected(self) -> aiosmtplib.SMTP:
        while self._idle:
            connection, timer = self._idle.pop()
            timer.cancel()
            # It may have been closed meanwhile; asked before, it is not in doubt whether a letter was taken.
            try:
                await connection.noop()
            except (aiosmtplib.SMTPException, OSError):
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        url, implicit = self._url, self._url.scheme == "smtps"
        connection = aiosmtplib.SMTP(
            hostname=url.hostname,
            port=url.port or (465 if implicit else 25),
            username=None if url.username is None else unquote(url.username),
            password=None if url.password is None else unquote(url.password),
            use_tls=implicit,
            # A password is never sent in clear, also where somebody on the way hides that TLS is offered.
            start_tls=None if implicit or url.password is None else True,
            local_hostname=self._local_name,
            timeout=SECONDS,
            tls_context=self._tls,
        )
        try:
            await connection.connect()
        except (aiosmtplib.SMTPException, OSError, ValueError) as error:
            self._rest(_words(error))
            raise
        except BaseException:
            connection.close()
            raise
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # it reads files: once

    def _keep(self, connection: aiosmtplib.SMTP) -> None:
        if connection.is_connected:
            timer = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._drop, connection)
            self._idle.append((connection, timer))

    def _drop(self, connection: aiosmtplib.SMTP) -> None:
        self._idle = [idle for idle in self._idle if idle[0] is not connection]
        connection.close()


def _words(error: Exception) -> str:
    """Return what went wrong: without the relay's address or words, which are for the operator."""
    match error:
        case aiosmtplib.SMTPAuthenticationError():
            return "the mail relay refuses our password"
        case aiosmtplib.SMTPResponseException():
            return f"the mail relay answered {error.code}"
        case TimeoutError():
            return f"no answer from the mail relay within {SECONDS} s"
        case _ if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
            return "no secure connection to the mail relay"
        case aiosmtplib.SMTPConnectError() | OSError():
            return "no connection to the mail relay"
    return "the mail relay cannot be used"

"""Send messages as emails through the operator's mail relay."""

import re

from opsentry.infrastructure.encryption import EncryptionKeyMissing
from opsentry.notifications.channel import BadTarget, Channel, Endpoint, Message, Outcome
from opsentry.notifications.channels import Dependencies
from opsentry.notifications.messages.email import EmailRenderer
from opsentry.notifications.transport.smtp import MAX_CONNECTIONS, SmtpPool
from opsentry.settings import Settings

_MAX_ADDRESS = 254
_MAX_LOCAL_PART = 64
# A dot-atom of RFC 5322. Quoted local parts are not in use, and many relays refuse characters outside ASCII.
_LOCAL_PART = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_DOMAIN = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]", re.IGNORECASE)


def make(parts: Dependencies) -> Channel:
    """Return the channel `email`."""
    return Email(parts.settings)


class Email:
    """Send rendered emails through a pool of SMTP connections."""

    name = "email"
    signs_messages = False
    has_secret_target = False
    max_concurrency: int | None = MAX_CONNECTIONS

    def __init__(self, settings: Settings) -> None:
        self._renderer = EmailRenderer(settings)
        self._smtp = SmtpPool(settings.smtp_url, self._renderer.domain) if settings.smtp_url else None

    def validate_target(self, target: str) -> str:
        """Return the address unchanged.

        Raises:
            BadTarget: No email can be sent to it.
        """
        _ascii_address(target)
        return target

    def display_target(self, target: str) -> str:
        """Return the whole address."""
        return target

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Render one email and hand it to the relay."""
        if self._smtp is None:
            return Outcome(f"no mail relay is set up ({Settings.variable('smtp_url')})", internal_failure=True)
        try:
            address = _ascii_address(endpoint.target)
            email = self._renderer.render(endpoint, address, message)
        except EncryptionKeyMissing as error:
            return Outcome(str(error), internal_failure=True)
        except BadTarget as error:
            return Outcome(str(error))
        return await self._smtp.send(self._renderer.sender, address, email)

    async def close(self) -> None:
        """Close the connections to the relay."""
        if self._smtp is not None:
            await self._smtp.close()


def _ascii_address(address: str) -> str:
    """Return the address with its domain in ASCII (RFC 3490).

    Raises:
        BadTarget: The address is malformed or too long.
    """
    if len(address) > _MAX_ADDRESS:
        raise BadTarget(f"must have at most {_MAX_ADDRESS} characters")
    local_part, at, domain = address.rpartition("@")
    if not at or not _LOCAL_PART.fullmatch(local_part) or len(local_part) > _MAX_LOCAL_PART:
        raise BadTarget("must be in the form name@example.com")
    try:
        ascii_domain = domain.encode("idna").decode()
    except UnicodeError:
        ascii_domain = ""
    if not _DOMAIN.fullmatch(ascii_domain):
        raise BadTarget("must end with a domain such as example.com")
    return f"{local_part}@{ascii_domain}"

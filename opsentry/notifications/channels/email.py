"""The channel `email`: text and HTML, through the operator's mail relay."""

import re

from opsentry.infrastructure.encryption import EncryptionKeyMissing
from opsentry.notifications.channel import BadTarget, Channel, Endpoint, Message, Outcome
from opsentry.notifications.channels import Dependencies
from opsentry.notifications.messages.email import EmailRenderer
from opsentry.notifications.transport.smtp import CONNECTIONS, SmtpPool
from opsentry.settings import Settings

_MAX_ADDRESS = 254
_MAX_LOCAL = 64
# A dot-atom of RFC 5322. Quoted forms exist and nobody has them; letters outside ASCII many relays do not take.
_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_DOMAIN = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]", re.IGNORECASE)


def make(parts: Dependencies) -> Channel:
    """Return the channel."""
    return Email(parts.settings)


class Email:
    """Sends what `letters` writes."""

    name = "email"
    signs_messages = False
    has_secret_target = False
    max_concurrency: int | None = CONNECTIONS

    def __init__(self, settings: Settings) -> None:
        self._letters = EmailRenderer(settings)
        self._relay = SmtpPool(settings.smtp_url, self._letters.domain) if settings.smtp_url else None

    def validate_target(self, target: str) -> str:
        """Return the address as it is; raises `BadTarget`."""
        _ascii(target)
        return target

    def display_target(self, target: str) -> str:
        """Return all of it."""
        return target

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Hand it to the relay."""
        if self._relay is None:
            return Outcome(f"no mail relay is set up ({Settings.variable('smtp_url')})", internal_failure=True)
        try:
            to = _ascii(endpoint.target)
            letter = self._letters.letter(endpoint, to, message)
        except EncryptionKeyMissing as error:
            return Outcome(str(error), internal_failure=True)
        except BadTarget as error:
            return Outcome(str(error))
        return await self._relay.send(self._letters.sender, to, letter)

    async def close(self) -> None:
        """Close what is open to the relay."""
        if self._relay is not None:
            await self._relay.close()


def _ascii(address: str) -> str:
    """Return the address with its domain as DNS has it (RFC 3490); raises `BadTarget`."""
    if len(address) > _MAX_ADDRESS:
        raise BadTarget(f"must have at most {_MAX_ADDRESS} characters")
    local, at, domain = address.rpartition("@")
    if not at or not _LOCAL.fullmatch(local) or len(local) > _MAX_LOCAL:
        raise BadTarget("must be an e-mail address such as someone@example.com")
    try:
        encoded = domain.encode("idna").decode()
    except UnicodeError:
        encoded = ""
    if not _DOMAIN.fullmatch(encoded):
        raise BadTarget("must be an e-mail address with a domain such as example.com")
    return f"{local}@{encoded}"

"""Sign the links in emails, so that only the recipient of an email can open its page.

A token is the URL-safe base64 of the tenant id, the subscription id (8 bytes each, big-endian) and their HMAC-SHA256:
64 characters. It stays valid as long as its key is set, because people keep emails for years.
"""

import base64
import binascii
import hmac
import struct
from hashlib import sha256

from opsentry.infrastructure.encryption import EncryptionKeyMissing
from opsentry.settings import Settings

CONFIRM = "confirm"
UNSUBSCRIBE = "unsubscribe"

_IDS = struct.Struct(">qq")
_TOKEN_CHARACTERS = 64


class SignedLinks:
    """Sign links with the first key, and verify them with every key that is set."""

    def __init__(self, settings: Settings) -> None:
        self._base_url = settings.public_url.rstrip("/")
        self._keys = settings.encryption_keys

    def url(self, purpose: str, tenant_id: int, subscription_id: int) -> str:
        """Return the absolute URL of the page for `purpose`; raises like `token`."""
        return f"{self._base_url}/{purpose}/{self.token(purpose, tenant_id, subscription_id)}"

    def token(self, purpose: str, tenant_id: int, subscription_id: int) -> str:
        """Return a token for one subscription and one purpose (`CONFIRM` or `UNSUBSCRIBE`).

        Raises:
            EncryptionKeyMissing: No key is set.
        """
        if not self._keys:
            raise EncryptionKeyMissing
        ids = _IDS.pack(tenant_id, subscription_id)
        return base64.urlsafe_b64encode(ids + _signature(self._keys[0], purpose, ids)).decode()

    def verify(self, purpose: str, token: str) -> tuple[int, int] | None:
        """Return (tenant id, subscription id), or `None` if no key of ours signed the token for this purpose."""
        if len(token) != _TOKEN_CHARACTERS:
            return None
        try:
            decoded = base64.urlsafe_b64decode(token.encode("ascii"))
        except (UnicodeEncodeError, binascii.Error):
            return None
        ids, given = decoded[: _IDS.size], decoded[_IDS.size :]
        # The list compares with every key, so the time does not reveal which key matches.
        is_signed = any([hmac.compare_digest(_signature(key, purpose, ids), given) for key in self._keys])  # noqa: C419
        # Decoding ignores some characters. Encoding again rejects a second spelling of the same token.
        if not is_signed or base64.urlsafe_b64encode(decoded).decode() != token:
            return None
        tenant_id, subscription_id = _IDS.unpack(ids)
        return tenant_id, subscription_id


def _signature(key: str, purpose: str, ids: bytes) -> bytes:
    # Each purpose has a derived key: a token for one purpose is invalid for the other, and for encryption.
    purpose_key = hmac.digest(key.encode(), f"opsentry links: {purpose}".encode(), sha256)
    return hmac.digest(purpose_key, ids, sha256)

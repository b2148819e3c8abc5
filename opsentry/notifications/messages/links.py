"""Links in e-mails: tokens that say which subscription they are for, and that nobody else can make.

A token is URL-safe base64 of tenant id and subscription id, 8 bytes each, and their HMAC-SHA256: 64 characters. It
holds for as long as its key does, since e-mails are kept for years.
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
_CHARACTERS = 64


class Links:
    """Makes and reads tokens; all keys are good for reading, the first makes."""

    def __init__(self, settings: Settings) -> None:
        self._base = settings.public_url.rstrip("/")
        self._keys = settings.encryption_keys

    def url(self, purpose: str, tenant_id: int, subscription_id: int) -> str:
        """Return the address of the page for `purpose`; raises as `token`."""
        return f"{self._base}/{purpose}/{self.token(purpose, tenant_id, subscription_id)}"

    def token(self, purpose: str, tenant_id: int, subscription_id: int) -> str:
        """Return the token that is good for `purpose` (`CONFIRM` or `UNSUBSCRIBE`) with this subscription.

        Raises:
            EncryptionKeyMissing: There is no key.
        """
        if not self._keys:
            raise EncryptionKeyMissing
        ids = _IDS.pack(tenant_id, subscription_id)
        return base64.urlsafe_b64encode(ids + _mark(self._keys[0], purpose, ids)).decode()

    def read(self, purpose: str, token: str) -> tuple[int, int] | None:
        """Return tenant id and subscription id; `None` if the token is none of ours for this purpose."""
        if len(token) != _CHARACTERS:
            return None
        try:
            # Decoding skips characters that mean nothing, so that two texts could be one token: encoded again below.
            whole = base64.urlsafe_b64decode(token.encode("ascii"))
        except (UnicodeEncodeError, binascii.Error):
            return None
        ids, mark = whole[: _IDS.size], whole[_IDS.size :]
        known = any([hmac.compare_digest(_mark(key, purpose, ids), mark) for key in self._keys])  # noqa: C419 - in constant time
        if not known or base64.urlsafe_b64encode(whole).decode() != token:
            return None
        tenant_id, subscription_id = _IDS.unpack(ids)
        return tenant_id, subscription_id


def _mark(key: str, purpose: str, ids: bytes) -> bytes:
    # A key of its own for each purpose: what is signed for one is good for no other, nor for what the key seals.
    own = hmac.digest(key.encode(), f"opsentry links: {purpose}".encode(), sha256)
    return hmac.digest(own, ids, sha256)

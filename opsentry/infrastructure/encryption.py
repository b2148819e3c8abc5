"""SecretBox: what must lie nowhere in clear, such as signing secrets, is kept encrypted under the operator's keys."""

from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet


class EncryptionKeyMissing(Exception):
    """There is no key to seal with."""

    def __init__(self) -> None:
        super().__init__("secrets cannot be kept: OPSENTRY_ENCRYPTION_KEYS has no key; nothing was changed")


class DecryptionFailed(Exception):
    """None of the keys opens what was encrypted_secret."""

    def __init__(self) -> None:
        super().__init__("a secret cannot be read: none of OPSENTRY_ENCRYPTION_KEYS opens it")


class SecretBox:
    """Seals with the first of `keys` and opens with any of them (Fernet: AES-128-CBC and HMAC-SHA256)."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = MultiFernet([Fernet(key) for key in keys]) if keys else None

    def seal(self, text: str) -> str:
        """Return `text` encrypted_secret, another time differently; raises `EncryptionKeyMissing`."""
        if self._keys is None:
            raise EncryptionKeyMissing
        return self._keys.encrypt(text.encode()).decode()

    def open(self, text: str) -> str:
        """Return what was encrypted_secret as `text`; raises `DecryptionFailed`."""
        if self._keys is None:
            raise DecryptionFailed
        try:
            return self._keys.decrypt(text.encode()).decode()
        except InvalidToken:
            raise DecryptionFailed from None


def new_key() -> str:
    """Return a new key to seal with."""
    return Fernet.generate_key().decode()

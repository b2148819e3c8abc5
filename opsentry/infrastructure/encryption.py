"""Encrypt secrets, such as signing secrets and webhook URLs, under the keys in OPSENTRY_ENCRYPTION_KEYS."""

from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet


class EncryptionKeyMissing(Exception):
    """OPSENTRY_ENCRYPTION_KEYS has no key to encrypt with."""

    def __init__(self) -> None:
        super().__init__(
            "a secret cannot be encrypted: OPSENTRY_ENCRYPTION_KEYS is empty; nothing was stored;"
            " add a key made by `opsentry keys generate`"
        )


class DecryptionFailed(Exception):
    """No key in OPSENTRY_ENCRYPTION_KEYS decrypts a stored secret."""

    def __init__(self) -> None:
        super().__init__(
            "a stored secret cannot be decrypted: no key in OPSENTRY_ENCRYPTION_KEYS fits; the secret is unchanged;"
            " add the key that encrypted it"
        )


class SecretBox:
    """Encrypt with the first of `keys`, and decrypt with any of them, so that keys can be rotated.

    The cipher is Fernet: AES-128-CBC with HMAC-SHA256 (https://github.com/fernet/spec).

    Args:
        keys: Keys made by `generate_key`. Without any, the box can neither encrypt nor decrypt.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys]) if keys else None

    def encrypt(self, text: str) -> str:
        """Return `text` encrypted, as URL-safe base64; each call returns a different result.

        Raises:
            EncryptionKeyMissing: The box has no key.
        """
        if self._fernet is None:
            raise EncryptionKeyMissing
        return self._fernet.encrypt(text.encode()).decode()

    def decrypt(self, encrypted: str) -> str:
        """Return the text that `encrypt` encrypted.

        Raises:
            DecryptionFailed: No key of the box fits, or `encrypted` was altered.
        """
        if self._fernet is None:
            raise DecryptionFailed
        try:
            return self._fernet.decrypt(encrypted.encode()).decode()
        except InvalidToken:
            raise DecryptionFailed from None


def generate_key() -> str:
    """Return a new random key: 32 bytes as URL-safe base64."""
    return Fernet.generate_key().decode()

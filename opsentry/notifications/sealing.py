"""Secrets of subscriptions, sealed: what lies in the ledger and in the database cannot be read without a key."""

from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

_SETTING = "OPSENTRY_SECRET_KEYS"


class NoKey(Exception):
    """There is no key to seal or sign with."""

    def __init__(self) -> None:
        super().__init__(f"{_SETTING} is not set: make a key with `opsentry secret-key`")


class CannotOpen(Exception):
    """What was sealed cannot be opened with the keys there are."""


class Sealing:
    """Seals with the first of its keys and opens with all of them (Fernet: AES-128-CBC with HMAC-SHA256)."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys]) if keys else None

    def seal(self, text: str) -> str:
        """Return `text`, sealed.

        Raises:
            NoKey: There is no key.
        """
        if self._fernet is None:
            raise NoKey
        return self._fernet.encrypt(text.encode()).decode()

    def open(self, sealed: str) -> str:
        """Return the text that was sealed.

        Raises:
            CannotOpen: No key opens it.
        """
        if self._fernet is None:
            raise CannotOpen(f"a secret is sealed, but {_SETTING} is not set")
        try:
            return self._fernet.decrypt(sealed.encode()).decode()
        except InvalidToken:
            raise CannotOpen(
                f"none of {_SETTING} opens a secret: was its key taken out, or another one put in?"
            ) from None


def new_key() -> str:
    """Return a new random key: 32 bytes in URL-safe base64."""
    return Fernet.generate_key().decode()

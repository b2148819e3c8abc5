"""Sealing: what must lie nowhere in clear, such as signing secrets, is kept encrypted under the operator's keys."""

from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet


class NoKey(Exception):
    """There is no key to seal with."""

    def __init__(self) -> None:
        super().__init__("secrets cannot be kept: OPSENTRY_SECRET_KEYS has no key; nothing was changed")


class CannotOpen(Exception):
    """None of the keys opens what was sealed."""

    def __init__(self) -> None:
        super().__init__("a secret cannot be read: none of OPSENTRY_SECRET_KEYS opens it")


class Sealing:
    """Seals with the first of `keys` and opens with any of them (Fernet: AES-128-CBC and HMAC-SHA256)."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = MultiFernet([Fernet(key) for key in keys]) if keys else None

    def seal(self, text: str) -> str:
        """Return `text` sealed, another time differently; raises `NoKey`."""
        if self._keys is None:
            raise NoKey
        return self._keys.encrypt(text.encode()).decode()

    def open(self, text: str) -> str:
        """Return what was sealed as `text`; raises `CannotOpen`."""
        if self._keys is None:
            raise CannotOpen
        try:
            return self._keys.decrypt(text.encode()).decode()
        except InvalidToken:
            raise CannotOpen from None


def new_key() -> str:
    """Return a new key to seal with."""
    return Fernet.generate_key().decode()

"""Generate and authenticate tokens, those of tenants and those of operators alike.

A token's value is a mark of its kind (`ops_`, `opo_`), a public prefix of 8 hex digits, a secret of 40, and 8 digits of
CRC-32 over both. The database holds only the SHA-256 of the value: a fast hash is safe for 160 random bits.
"""

import math
import re
import secrets
import zlib
from datetime import UTC, datetime
from hashlib import sha256
from typing import Generic, TypeVar

import msgspec

from opsentry.infrastructure.postgres import Database
from opsentry.infrastructure.single_flight import TtlCache

# A process trusts a lookup for this long, so a revoked token stops working everywhere within it.
CACHE_SECONDS = 3.0
_MAX_CACHED_TOKENS = 20_000

_VALUE = re.compile(r"([a-z]{3}_)([0-9a-f]{48})([0-9a-f]{8})")


class InvalidToken(Exception):
    """There is no token, or it is malformed, unknown, expired or revoked. The caller does not learn which."""


class TokenNotFound(Exception):
    """No active token has this prefix; nothing was revoked."""

    def __init__(self, prefix: str) -> None:
        super().__init__(f"no active token has the prefix {prefix}; nothing was revoked")


class AuthenticatedToken(msgspec.Struct, frozen=True):
    """Describe a valid token of any kind.

    Attributes:
        token_id: Its id; API tokens count within their tenant.
        prefix: The public part of its value, 8 hex digits.
        name: The name that people gave it.
        expires_at: The end of its validity, if it has one.
    """

    token_id: int
    prefix: str
    name: str
    expires_at: datetime | None


T = TypeVar("T", bound=AuthenticatedToken)


def generate_token(mark: str) -> str:
    """Return a new token value that begins with `mark`. Nobody can recover it from what is stored."""
    body = secrets.token_hex(24)
    return f"{mark}{body}{_checksum(body)}"


def public_prefix(value: str) -> str:
    """Return the public prefix of a token's value."""
    return value[4:12]


def token_digest(value: str) -> bytes:
    """Return the SHA-256 under which a token is stored."""
    return sha256(value.encode(errors="replace")).digest()


def is_well_formed(value: str, mark: str) -> bool:
    """Return whether `value` can be a token with this mark. Typing errors are found here, without a query."""
    match = _VALUE.fullmatch(value)
    return match is not None and match[1] == mark and _checksum(match[2]) == match[3]


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


class TokenDirectory(Generic[T]):
    """Authenticate tokens of one kind, with one query for each token in `CACHE_SECONDS`.

    Args:
        database: The database with the tokens.
        mark: The beginning of each token's value.
        query: Selects the row of a valid token by its digest, with the columns that `token_type` has as fields.
        token_type: The description of a token of this kind.

    Attributes:
        mark: As the argument.
    """

    def __init__(self, database: Database, mark: str, query: str, token_type: type[T]) -> None:
        self.mark = mark
        self._database = database
        self._query = query
        self._token_type = token_type
        # By digest, so that no secret stays in memory. Unknown tokens are cached too, as `None`.
        self._tokens: TtlCache[bytes, T | None] = TtlCache(
            self._fetch, ttl_seconds=CACHE_SECONDS, max_entries=_MAX_CACHED_TOKENS, ttl_of=_seconds_left
        )

    async def authenticate(self, value: str) -> T:
        """Return the description of a valid token.

        Raises:
            InvalidToken: The token is malformed, unknown, expired or revoked.
            DatabaseUnavailable: The token could not be looked up.
        """
        key = token_digest(value)
        token = self._tokens.peek(key, None)
        if token is None and is_well_formed(value, self.mark):
            token = await self._tokens.get(key)
        if token is None:
            raise InvalidToken
        return token

    async def _fetch(self, key: bytes) -> T | None:
        row = await self._database.fetchrow(self._query, key)
        return None if row is None else msgspec.convert(dict(row), self._token_type)


def _seconds_left(token: AuthenticatedToken | None) -> float:
    """Return how long a token stays valid, so that the cache does not outlive it."""
    if token is None or token.expires_at is None:
        return math.inf
    return (token.expires_at - datetime.now(UTC)).total_seconds()

"""API tokens: `ops_` + 8 hex digits of public prefix + 40 of secret + 8 of checksum; only a SHA-256 is stored.

What is the same for operators' tokens, which begin with another mark, is used by them too.
"""

import math
import re
import secrets
import zlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Generic, TypeVar

import asyncpg
import msgspec

from opsentry.domain.decider import InvalidField, check_title
from opsentry.domain.identity import TOKEN, TokenCreated, TokenRevoked
from opsentry.events import store
from opsentry.events.codec import Meta
from opsentry.events.store import Append, NewEvent
from opsentry.infrastructure.postgres import Connection, Database
from opsentry.infrastructure.single_flight import TtlCache

SCOPES = ("read:status", "write:incidents", "write:maintenance", "read:audit", "write:subscriptions")

# A token that was looked up is believed for this long, so a revoked one stops working within it everywhere.
CACHE_SECONDS = 3.0
_CACHE_SIZE = 20_000

MARK = "ops_"

_FORMAT = re.compile(r"([a-z]{3}_)([0-9a-f]{48})([0-9a-f]{8})")

# The one query that cannot name its tenant: it finds it.
_BY_DIGEST = (
    "SELECT tenant_id, token_id, prefix, name, scopes, expires_at FROM api_tokens"
    " WHERE digest = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"
)

_CREATE = (
    "INSERT INTO api_tokens (tenant_id, prefix, digest, name, scopes, expires_at) VALUES ($1, $2, $3, $4, $5, $6)"
    " RETURNING token_id"
)

_REVOKE = """
UPDATE api_tokens SET revoked_at = now() WHERE tenant_id = $1 AND prefix = $2 AND revoked_at IS NULL RETURNING token_id
"""

_LIST = (
    "SELECT token_id, prefix, name, scopes, created_at, expires_at, revoked_at FROM api_tokens WHERE tenant_id = $1"
    " ORDER BY token_id"
)

_NAMES = "SELECT token_id, name FROM api_tokens WHERE tenant_id = $1 AND token_id = ANY($2)"


class InvalidToken(Exception):
    """No token, or one that is unknown, expired or revoked: which of them is not said."""


class TokenNotFound(Exception):
    """There is no such token that could be revoked."""


class TokenFacts(msgspec.Struct, frozen=True):
    """What every token that works carries."""

    token_id: int
    prefix: str
    name: str
    expires_at: datetime | None


class Token(TokenFacts, frozen=True):
    """What a tenant's token that works carries."""

    tenant_id: int
    scopes: frozenset[str]


T = TypeVar("T", bound=TokenFacts)


def mint(mark: str = MARK) -> str:
    """Return a new token value that begins with `mark`. It cannot be recovered from what is stored of it."""
    body = secrets.token_hex(24)
    return f"{mark}{body}{_checksum(body)}"


def prefix(value: str) -> str:
    """Return the public part of a token's value."""
    return value[4:12]


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def well_formed(value: str, mark: str = MARK) -> bool:
    """Tell whether `value` can be such a token at all; a typing error is found here, without asking the database."""
    match = _FORMAT.fullmatch(value)
    return match is not None and match[1] == mark and _checksum(match[2]) == match[3]


class TokenLookup(Generic[T]):
    """Looks tokens of one kind up, remembering each answer for a moment.

    Args:
        database: Where they are.
        mark: What their values begin with.
        query: Finds the row of one that works by the digest of its value; has the columns that `kind` has fields.
        kind: What one carries.
    """

    def __init__(self, database: Database, mark: str, query: str, kind: type[T]) -> None:
        self.mark = mark
        self._database = database
        self._query = query
        self._kind = kind
        # By digest, so that no secret stays in memory. Unknown tokens are cached too, as `None`.
        self._tokens: TtlCache[bytes, T | None] = TtlCache(
            self._fetch, ttl_seconds=CACHE_SECONDS, max_entries=_CACHE_SIZE, ttl_of=_seconds_left
        )

    async def authenticate(self, value: str) -> T:
        """Return what the token carries.

        Raises:
            InvalidToken: It is malformed, unknown, expired or revoked.
            DatabaseUnavailable: That could not be found out.
        """
        digest = sha256(value.encode(errors="replace")).digest()
        token = self._tokens.peek(digest, None)
        if token is None:
            if not well_formed(value, self.mark):
                raise InvalidToken
            token = await self._tokens.get(digest)
        if token is None:
            raise InvalidToken
        return token

    async def _fetch(self, digest: bytes) -> T | None:
        row = await self._database.fetchrow(self._query, digest)
        return None if row is None else msgspec.convert(dict(row), self._kind)


def _seconds_left(token: TokenFacts | None) -> float:
    """Return how long a token still works, so that the cache does not outlive it."""
    if token is None or token.expires_at is None:
        return math.inf
    return (token.expires_at - datetime.now(UTC)).total_seconds()


class ApiTokens(TokenLookup[Token]):
    """Looks tenants' tokens up."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, MARK, _BY_DIGEST, Token)


def check_scopes(scopes: Iterable[str]) -> list[str]:
    """Return `scopes` in their usual order, each once; raise `InvalidField` if one is unknown or there are none."""
    wanted = set(scopes)
    if not wanted or wanted - set(SCOPES):
        raise InvalidField("scopes", f"must be one or more of {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in wanted]


async def create_api_token(
    connection: Connection,
    tenant_id: int,
    *,
    name: str,
    scopes: Iterable[str],
    meta: Meta,
    expires_at: datetime | None = None,
    value: str | None = None,
) -> str:
    """Create a token and put that on the tenant's record, in one transaction; return its value, this once.

    Raises:
        InvalidField: The name or a scope cannot be used.
    """
    value = mint() if value is None else value
    granted = check_scopes(scopes)
    check_title("name", name)
    async with connection.transaction():
        token_id: int = await connection.fetchval(
            _CREATE, tenant_id, prefix(value), sha256(value.encode()).digest(), name, granted, expires_at
        )
        event = TokenCreated(prefix=prefix(value), name=name, scopes=tuple(granted), expires_at=expires_at)
        await _record(connection, tenant_id, token_id, 0, event, meta)
    return value


async def revoke_api_token(connection: Connection, tenant_id: int, token_prefix: str, meta: Meta) -> None:
    """Revoke the token with this prefix and put that on the tenant's record, in one transaction.

    Raises:
        TokenNotFound: The tenant has none that still works.
    """
    async with connection.transaction():
        token_id = await connection.fetchval(_REVOKE, tenant_id, token_prefix)
        if token_id is None:
            raise TokenNotFound(f"no token {token_prefix} that could be revoked")
        await _record(connection, tenant_id, token_id, 1, TokenRevoked(), meta)


async def _record(
    connection: Connection, tenant_id: int, token_id: int, version: int, event: TokenCreated | TokenRevoked, meta: Meta
) -> None:
    append = Append(
        tenant_id=tenant_id,
        kind=TOKEN,
        stream_id=token_id,
        expected_version=version,
        events=[NewEvent(event, meta)],
    )
    (outcome,) = await store.append_events(connection, [append], wait=True)
    if not isinstance(outcome, store.Appended):
        raise TypeError(f"the record of a token was refused: {outcome}")


async def list_api_tokens(connection: Connection, tenant_id: int) -> Sequence[asyncpg.Record]:
    """Return the rows of the tenant's tokens, oldest first; none holds a secret."""
    return list(await connection.fetch(_LIST, tenant_id))


async def find_api_token_names(connection: Connection, tenant_id: int, token_ids: Iterable[int]) -> dict[int, str]:
    """Return the names of the tenant's tokens with these ids."""
    rows = await connection.fetch(_NAMES, tenant_id, list(token_ids))
    return {row["token_id"]: row["name"] for row in rows}

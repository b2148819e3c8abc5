"""Operators' tokens: as tenants' tokens, but `opo_`, of no tenant, and good for reading how all of them stand.

No ledger records them, since each ledger is a tenant's; their rows are never deleted.
"""

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256

import asyncpg

from opsentry.domain.decider import check_title
from opsentry.identity.api_tokens import TokenFacts, TokenLookup, TokenNotFound, mint, prefix
from opsentry.infrastructure.postgres import Connection, Database

MARK = "opo_"

# None of these names a tenant: there is none.
_BY_DIGEST = (
    "SELECT token_id, prefix, name, expires_at FROM operator_tokens"
    " WHERE digest = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())"
)

_CREATE = "INSERT INTO operator_tokens (prefix, digest, name, expires_at) VALUES ($1, $2, $3, $4)"

_REVOKE = "UPDATE operator_tokens SET revoked_at = now() WHERE prefix = $1 AND revoked_at IS NULL RETURNING token_id"

_LIST = "SELECT token_id, prefix, name, created_at, expires_at, revoked_at FROM operator_tokens ORDER BY token_id"


class OperatorToken(TokenFacts, frozen=True):
    """What an operator's token that works carries."""


class OperatorTokens(TokenLookup[OperatorToken]):
    """Looks operators' tokens up."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, MARK, _BY_DIGEST, OperatorToken)


async def create_operator_token(connection: Connection, *, name: str, expires_at: datetime | None = None) -> str:
    """Create an operator's token; return its value, this once.

    Raises:
        InvalidField: The name cannot be used.
    """
    check_title("name", name)
    value = mint(MARK)
    await connection.execute(_CREATE, prefix(value), sha256(value.encode()).digest(), name, expires_at)
    return value


async def revoke_operator_token(connection: Connection, token_prefix: str) -> None:
    """Revoke the operator's token with this prefix.

    Raises:
        TokenNotFound: There is none that still works.
    """
    if await connection.fetchval(_REVOKE, token_prefix) is None:
        raise TokenNotFound(f"no token {token_prefix} that could be revoked")


async def list_operator_tokens(connection: Connection) -> Sequence[asyncpg.Record]:
    """Return the rows of operators' tokens, oldest first; none holds a secret."""
    return list(await connection.fetch(_LIST))

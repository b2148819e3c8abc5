"""Operator tokens: they belong to no tenant, and read the state of all tenants' projections and deliveries.

No ledger records them, since each ledger is a tenant's. Their rows are never deleted.
"""

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from opsentry.domain.decider import check_title
from opsentry.identity.tokens import (
    AuthenticatedToken,
    TokenDirectory,
    TokenNotFound,
    generate_token,
    public_prefix,
    token_digest,
)
from opsentry.infrastructure.postgres import Connection, Database

OPERATOR_TOKEN_MARK = "opo_"  # noqa: S105 - the public beginning of each value

# None of these statements names a tenant, since operator tokens have none.
_SELECT_BY_DIGEST = """
SELECT token_id, prefix, name, expires_at FROM operator_tokens
WHERE digest = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
"""

_INSERT = "INSERT INTO operator_tokens (prefix, digest, name, expires_at) VALUES ($1, $2, $3, $4)"

_REVOKE = "UPDATE operator_tokens SET revoked_at = now() WHERE prefix = $1 AND revoked_at IS NULL RETURNING token_id"

_SELECT_ALL = "SELECT token_id, prefix, name, created_at, expires_at, revoked_at FROM operator_tokens ORDER BY token_id"


class OperatorToken(AuthenticatedToken, frozen=True):
    """Describe a valid operator token."""


class OperatorTokens(TokenDirectory[OperatorToken]):
    """Authenticate operator tokens."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, OPERATOR_TOKEN_MARK, _SELECT_BY_DIGEST, OperatorToken)


async def create_operator_token(connection: Connection, *, name: str, expires_at: datetime | None = None) -> str:
    """Create an operator token, and return its value. This is the only time that the value can be read.

    Raises:
        InvalidField: The name is empty, too long, or has control characters.
    """
    check_title("name", name)
    value = generate_token(OPERATOR_TOKEN_MARK)
    await connection.execute(_INSERT, public_prefix(value), token_digest(value), name, expires_at)
    return value


async def revoke_operator_token(connection: Connection, token_prefix: str) -> None:
    """Revoke the operator token with this prefix.

    Raises:
        TokenNotFound: There is no such token, or it is revoked already.
    """
    if await connection.fetchval(_REVOKE, token_prefix) is None:
        raise TokenNotFound(token_prefix)


async def list_operator_tokens(connection: Connection) -> Sequence[asyncpg.Record]:
    """Return the rows of all operator tokens, oldest first, without secrets."""
    return list(await connection.fetch(_SELECT_ALL))

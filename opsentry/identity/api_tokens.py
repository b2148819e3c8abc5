"""API tokens: each opens one tenant, within its scopes. The tenant's ledger records their creation and revocation."""

from collections.abc import Iterable, Sequence
from datetime import datetime

import asyncpg

from opsentry.domain.decider import check_title
from opsentry.domain.identity import TOKEN, TokenCreated, TokenRevoked
from opsentry.events import store
from opsentry.events.codec import Meta
from opsentry.events.store import Append, NewEvent
from opsentry.identity.scopes import check_scopes
from opsentry.identity.tokens import (
    AuthenticatedToken,
    TokenDirectory,
    TokenNotFound,
    generate_token,
    public_prefix,
    token_digest,
)
from opsentry.infrastructure.postgres import Connection, Database

API_TOKEN_MARK = "ops_"  # noqa: S105 - the public beginning of each value

# This statement alone does not name a tenant: it finds the tenant.
_SELECT_BY_DIGEST = """
SELECT tenant_id, token_id, prefix, name, scopes, expires_at FROM api_tokens
WHERE digest = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
"""

_CREATE = (
    "INSERT INTO api_tokens (tenant_id, token_id, prefix, digest, name, scopes, expires_at)"
    " VALUES ($1, $2, $3, $4, $5, $6, $7)"
)

_REVOKE = """
UPDATE api_tokens SET revoked_at = now() WHERE tenant_id = $1 AND prefix = $2 AND revoked_at IS NULL RETURNING token_id
"""

_SELECT_ALL = """
SELECT token_id, prefix, name, scopes, created_at, expires_at, revoked_at FROM api_tokens
WHERE tenant_id = $1 ORDER BY token_id
"""

_SELECT_NAMES = "SELECT token_id, name FROM api_tokens WHERE tenant_id = $1 AND token_id = ANY($2)"


class ApiToken(AuthenticatedToken, frozen=True):
    """Describe a valid API token.

    Attributes:
        tenant_id: The tenant that it opens.
        scopes: Its permissions. A newer version may have stored scopes that this one does not know.
    """

    tenant_id: int
    scopes: frozenset[str]


class ApiTokens(TokenDirectory[ApiToken]):
    """Authenticate API tokens."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, API_TOKEN_MARK, _SELECT_BY_DIGEST, ApiToken)


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
    """Create a token, record it in the tenant's ledger in the same transaction, and return its value.

    This is the only time that the value can be read.

    Args:
        connection: A connection of the application.
        tenant_id: The tenant that the token opens.
        name: Tells people what the token is for.
        scopes: Its permissions, one or more of `SCOPES`.
        meta: The actor and the request, for the ledger.
        expires_at: The end of its validity, if any.
        value: The value to give it instead of a random one.

    Raises:
        InvalidField: The name is empty, too long or has control characters, or a scope is unknown.
    """
    value = generate_token(API_TOKEN_MARK) if value is None else value
    granted = check_scopes(scopes)
    check_title("name", name)
    async with connection.transaction():
        event = TokenCreated(prefix=public_prefix(value), name=name, scopes=tuple(granted), expires_at=expires_at)
        token_id = await _record(connection, tenant_id, 0, 0, event, meta)
        await connection.execute(
            _CREATE, tenant_id, token_id, public_prefix(value), token_digest(value), name, granted, expires_at
        )
    return value


async def revoke_api_token(connection: Connection, tenant_id: int, token_prefix: str, meta: Meta) -> None:
    """Revoke the token with this prefix and record it in the tenant's ledger, in one transaction.

    Raises:
        TokenNotFound: The tenant has no such token, or it is revoked already.
    """
    async with connection.transaction():
        token_id = await connection.fetchval(_REVOKE, tenant_id, token_prefix)
        if token_id is None:
            raise TokenNotFound(token_prefix)
        await _record(connection, tenant_id, token_id, 1, TokenRevoked(), meta)


async def _record(
    connection: Connection, tenant_id: int, token_id: int, version: int, event: TokenCreated | TokenRevoked, meta: Meta
) -> int:
    """Append the event to the token's stream and return the stream's id, which is the token's."""
    append = Append(
        tenant_id=tenant_id,
        kind=TOKEN,
        stream_id=token_id,
        expected_version=version,
        events=[NewEvent(event, meta)],
    )
    (outcome,) = await store.append_events(connection, [append], wait=True)
    if not isinstance(outcome, store.Appended):
        raise TypeError(f"the ledger refused the event of token {token_id}: {outcome}")
    return outcome.stream_id


async def list_api_tokens(connection: Connection, tenant_id: int) -> Sequence[asyncpg.Record]:
    """Return the rows of the tenant's tokens, oldest first, without secrets."""
    return list(await connection.fetch(_SELECT_ALL, tenant_id))


async def find_api_token_names(connection: Connection, tenant_id: int, token_ids: Iterable[int]) -> dict[int, str]:
    """Return the names of the tenant's tokens with these ids, by id. Unknown ids are left out."""
    rows = await connection.fetch(_SELECT_NAMES, tenant_id, list(token_ids))
    return {row["token_id"]: row["name"] for row in rows}

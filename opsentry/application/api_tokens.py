"""Use cases of API tokens: create, revoke, list. Only operators run them."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.events.codec import Meta
from opsentry.identity import api_tokens
from opsentry.infrastructure.postgres import Record


async def create_api_token(
    app: Application, caller: Caller, *, name: str, scopes: Iterable[str], expires_at: datetime | None = None
) -> str:
    """Create a token of the caller's tenant; return its value, which no later call returns.

    Raises:
        InvalidField: The name is unusable, or a scope is unknown.
        DatabaseUnavailable: The database was lost.
    """
    meta = Meta(caller.actor, caller.request_id)
    async with app.database.connection() as connection:
        return await api_tokens.create_api_token(
            connection, caller.tenant_id, name=name, scopes=scopes, meta=meta, expires_at=expires_at
        )


async def revoke_api_token(app: Application, caller: Caller, prefix: str) -> None:
    """Revoke the token with this prefix.

    Raises:
        TokenNotFound: The tenant has no such token, or it is revoked already.
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection() as connection:
        await api_tokens.revoke_api_token(connection, caller.tenant_id, prefix, Meta(caller.actor, caller.request_id))


async def list_api_tokens(app: Application, caller: Caller) -> Sequence[Record]:
    """Return the tenant's tokens without their secrets, oldest first.

    Raises:
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection() as connection:
        return await api_tokens.list_api_tokens(connection, caller.tenant_id)

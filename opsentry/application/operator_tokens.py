"""Use cases of operator tokens, which belong to no tenant and appear in no ledger."""

from collections.abc import Sequence
from datetime import datetime

from opsentry.application.application import Application
from opsentry.identity import operator_tokens
from opsentry.infrastructure.postgres import Record


async def create_operator_token(app: Application, *, name: str, expires_at: datetime | None = None) -> str:
    """Create an operator token; return its value, which no later call returns.

    Raises:
        InvalidField: The name is unusable.
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection() as connection:
        return await operator_tokens.create_operator_token(connection, name=name, expires_at=expires_at)


async def revoke_operator_token(app: Application, prefix: str) -> None:
    """Revoke the operator token with this prefix.

    Raises:
        TokenNotFound: No such token exists, or it is revoked already.
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection() as connection:
        await operator_tokens.revoke_operator_token(connection, prefix)


async def list_operator_tokens(app: Application) -> Sequence[Record]:
    """Return the operator tokens without their secrets, oldest first.

    Raises:
        DatabaseUnavailable: The database was lost.
    """
    async with app.database.connection() as connection:
        return await operator_tokens.list_operator_tokens(connection)

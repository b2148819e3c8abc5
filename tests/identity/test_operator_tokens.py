from datetime import UTC, datetime
from hashlib import sha256

import asyncpg
import pytest

from opsentry.domain.decider import InvalidField
from opsentry.identity import api_tokens, operator_tokens, tokens
from opsentry.identity.api_tokens import ApiTokens
from opsentry.identity.operator_tokens import OperatorToken, OperatorTokens
from opsentry.identity.tokens import InvalidToken, TokenNotFound


async def make_operator(parts, **fields):
    async with parts.database.connection() as connection:
        return await operator_tokens.create_operator_token(connection, **{"name": "on call", **fields})


async def test_a_values_mark_differs_from_an_api_tokens(parts):
    value = await make_operator(parts)
    assert (value[:4], len(value)) == ("opo_", 4 + 8 + 40 + 8)
    assert tokens.is_well_formed(value, operator_tokens.OPERATOR_TOKEN_MARK)
    assert not tokens.is_well_formed(value, api_tokens.API_TOKEN_MARK)
    assert not tokens.is_well_formed("ops_" + value[4:], operator_tokens.OPERATOR_TOKEN_MARK)


async def test_a_valid_token_is_described(parts):
    expires = datetime(2999, 1, 1, tzinfo=UTC)
    value = await make_operator(parts, expires_at=expires)
    found = await OperatorTokens(parts.database).authenticate(value)
    assert found == OperatorToken(token_id=1, prefix=value[4:12], name="on call", expires_at=expires)


async def test_neither_kind_passes_for_the_other(parts, acme):
    value = await make_operator(parts)
    for directory, foreign in ((OperatorTokens(parts.database), acme.token), (ApiTokens(parts.database), value)):
        for wrong in (foreign, directory.mark + foreign[4:]):
            with pytest.raises(InvalidToken):
                await directory.authenticate(wrong)


async def test_unknown_expired_and_revoked_tokens_raise_one_error(parts):
    expired = await make_operator(parts, expires_at=datetime(2020, 1, 1, tzinfo=UTC))
    revoked = await make_operator(parts)
    async with parts.database.connection() as connection:
        await operator_tokens.revoke_operator_token(connection, tokens.public_prefix(revoked))
    for value in (tokens.generate_token(operator_tokens.OPERATOR_TOKEN_MARK), expired, revoked):
        with pytest.raises(InvalidToken):
            await OperatorTokens(parts.database).authenticate(value)


async def test_a_token_is_revoked_once_and_stays_listed(parts, acme):
    value = await make_operator(parts)
    async with parts.database.connection() as connection:
        with pytest.raises(TokenNotFound):
            await operator_tokens.revoke_operator_token(connection, tokens.public_prefix(acme.token))
        await operator_tokens.revoke_operator_token(connection, tokens.public_prefix(value))
        with pytest.raises(TokenNotFound):
            await operator_tokens.revoke_operator_token(connection, tokens.public_prefix(value))
        (row,) = await operator_tokens.list_operator_tokens(connection)
    assert (row["prefix"], row["name"], row["expires_at"]) == (tokens.public_prefix(value), "on call", None)
    assert row["revoked_at"] >= row["created_at"]


async def test_the_secret_is_not_stored_and_no_ledger_records_the_token(parts, owner, acme):
    before = await owner.fetchval("SELECT count(*) FROM events")
    value = await make_operator(parts)
    assert await owner.fetchval("SELECT digest FROM operator_tokens") == sha256(value.encode()).digest()
    assert value[12:52] not in str(await owner.fetch("SELECT * FROM operator_tokens"))
    assert await owner.fetchval("SELECT count(*) FROM events") == before


@pytest.mark.parametrize("name", ["", " ", "a\x00b", "x" * 301])
async def test_an_invalid_name_is_refused(parts, owner, name):
    with pytest.raises(InvalidField) as refused:
        await make_operator(parts, name=name)
    assert refused.value.field == "name"
    assert await owner.fetchval("SELECT count(*) FROM operator_tokens") == 0


@pytest.mark.parametrize("statement", ["UPDATE operator_tokens SET expires_at = NULL", "DELETE FROM operator_tokens"])
async def test_the_application_can_neither_extend_nor_delete_a_token(app_connection, statement):
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await app_connection.execute(statement)

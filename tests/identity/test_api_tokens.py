import asyncio
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest

from opsentry.domain.decider import InvalidField
from opsentry.domain.identity import TokenCreated, TokenRevoked
from opsentry.events import store
from opsentry.identity import api_tokens, tokens
from opsentry.identity.api_tokens import ApiTokens
from opsentry.identity.tokens import InvalidToken, TokenNotFound
from opsentry.infrastructure.postgres import Database, DatabaseUnavailable
from tests.conftest import META
from tests.waiting import GENEROUS_SECONDS


class CountingDatabase(Database):
    """Counts its queries."""

    def __init__(self, settings):
        super().__init__(settings.database_url, size=2, timeout_seconds=GENEROUS_SECONDS)
        self.queries = 0

    async def fetchrow(self, query, *values, **options):
        self.queries += 1
        return await super().fetchrow(query, *values, **options)


@pytest.fixture
async def counting(settings):
    database = CountingDatabase(settings)
    await database.open()
    yield database
    await database.close()


async def make_token(parts, tenant_id, **fields):
    async with parts.database.connection() as connection:
        return await api_tokens.create_api_token(
            connection, tenant_id, **{"name": "t", "scopes": ["read:status"], "meta": META, **fields}
        )


def test_a_value_is_mark_prefix_secret_and_checksum():
    value = tokens.generate_token(api_tokens.API_TOKEN_MARK)
    assert len(value) == 4 + 8 + 40 + 8
    assert tokens.is_well_formed(value, api_tokens.API_TOKEN_MARK)
    assert tokens.public_prefix(value) == value[4:12]
    assert tokens.generate_token(api_tokens.API_TOKEN_MARK) != value


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "",
        lambda value: value[:-1],
        lambda value: value + "0",
        lambda value: value.upper(),
        lambda value: value.replace("ops_", "opt_"),
        lambda value: value[:20] + ("0" if value[20] != "0" else "1") + value[21:],
        lambda value: value + "\n",
        lambda value: value[:12] + "٣" * 40 + value[52:],
        lambda _: "ops_\udcff",
    ],
)
async def test_a_malformed_token_is_refused_without_a_query(counting, spoil):
    with pytest.raises(InvalidToken):
        await ApiTokens(counting).authenticate(spoil(tokens.generate_token(api_tokens.API_TOKEN_MARK)))
    assert counting.queries == 0


async def test_concurrent_lookups_share_one_query(counting, acme):
    directory = ApiTokens(counting)
    found = await asyncio.gather(*(directory.authenticate(acme.token) for _ in range(50)))
    assert {token.tenant_id for token in found} == {acme.id}
    assert counting.queries == 1


async def test_a_lookup_is_cached_and_then_repeated(monkeypatch, counting, parts, acme):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    directory = ApiTokens(counting)
    await directory.authenticate(acme.token)
    async with parts.database.connection() as connection:
        await api_tokens.revoke_api_token(connection, acme.id, tokens.public_prefix(acme.token), META)
    now += tokens.CACHE_SECONDS - 0.1
    await directory.authenticate(acme.token)
    now += 0.2
    with pytest.raises(InvalidToken):
        await directory.authenticate(acme.token)
    assert counting.queries == 2
    assert tokens.CACHE_SECONDS + 0.1 < 5


async def test_an_unknown_token_is_cached_too(counting):
    directory, value = ApiTokens(counting), tokens.generate_token(api_tokens.API_TOKEN_MARK)
    for _ in range(3):
        with pytest.raises(InvalidToken):
            await directory.authenticate(value)
    assert counting.queries == 1


async def test_a_cached_token_expires_on_time(counting, parts, acme, owner, monkeypatch, clock):
    monkeypatch.setattr(tokens, "CACHE_SECONDS", 1000.0)
    value = await make_token(parts, acme.id, expires_at=datetime.now(UTC) + timedelta(seconds=500))
    directory = ApiTokens(counting)
    await directory.authenticate(value)
    clock.now += 400
    await directory.authenticate(value)
    assert counting.queries == 1
    await owner.execute("UPDATE api_tokens SET expires_at = now()")
    clock.now += 100
    with pytest.raises(InvalidToken):
        await directory.authenticate(value)
    assert counting.queries == 2


async def test_the_cache_is_bounded(monkeypatch, counting):
    monkeypatch.setattr(tokens, "_MAX_CACHED_TOKENS", 5)
    directory = ApiTokens(counting)
    for _ in range(12):
        with pytest.raises(InvalidToken):
            await directory.authenticate(tokens.generate_token(api_tokens.API_TOKEN_MARK))
    assert len(directory._tokens) == 5


async def test_a_lost_database_is_not_an_invalid_token_and_is_not_cached(settings, counting, acme):
    lost = Database("postgresql://127.0.0.1:1/nowhere", size=2, timeout_seconds=GENEROUS_SECONDS)
    await lost.open()
    directory = ApiTokens(lost)
    with pytest.raises(DatabaseUnavailable):
        await directory.authenticate(acme.token)
    directory._database = counting
    assert (await directory.authenticate(acme.token)).tenant_id == acme.id
    await lost.close()


async def test_creation_and_revocation_are_recorded_without_the_secret(parts, owner, acme):
    expires = datetime(2036, 1, 1, tzinfo=UTC)
    value = await make_token(parts, acme.id, name="CI", scopes=["write:incidents", "read:status"], expires_at=expires)
    async with parts.database.connection() as connection:
        await api_tokens.revoke_api_token(connection, acme.id, tokens.public_prefix(value), META)
        recorded = (await store.read_after(connection, acme.id, 0, 100))[-2:]
        rows = await api_tokens.list_api_tokens(connection, acme.id)
    assert [e.event for e in recorded] == [
        TokenCreated(
            prefix=tokens.public_prefix(value), name="CI", scopes=("read:status", "write:incidents"), expires_at=expires
        ),
        TokenRevoked(),
    ]
    assert (rows[-1]["name"], rows[-1]["expires_at"]) == ("CI", expires)
    assert rows[-1]["revoked_at"] is not None
    assert await owner.fetchval("SELECT digest FROM api_tokens WHERE name = 'CI'") == sha256(value.encode()).digest()
    everything = str([dict(row) for row in rows]) + str(await owner.fetch("SELECT * FROM events"))
    assert value[12:52] not in everything


async def test_a_token_is_revoked_once_and_only_by_its_tenant(parts, acme, globex):
    async with parts.database.connection() as connection:
        with pytest.raises(TokenNotFound):
            await api_tokens.revoke_api_token(connection, globex.id, tokens.public_prefix(acme.token), META)
        await api_tokens.revoke_api_token(connection, acme.id, tokens.public_prefix(acme.token), META)
        with pytest.raises(TokenNotFound):
            await api_tokens.revoke_api_token(connection, acme.id, tokens.public_prefix(acme.token), META)
        assert await api_tokens.find_api_token_names(connection, globex.id, [1, 2]) == {1: "globex token"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["admin"]}, "scopes"),
        ({"scopes": ["read:status", "write:everything"]}, "scopes"),
        ({"name": " "}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"name": "x" * 301}, "name"),
    ],
)
async def test_an_invalid_token_is_not_created(parts, owner, acme, fields, field):
    with pytest.raises(InvalidField) as refused:
        await make_token(parts, acme.id, **fields)
    assert refused.value.field == field
    assert await owner.fetchval("SELECT count(*) FROM api_tokens") == 1
    assert await owner.fetchval("SELECT count(*) FROM events WHERE type = 'token.created'") == 1

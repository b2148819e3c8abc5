import logging
from datetime import UTC, datetime, timedelta

import pytest
import structlog

from opsentry.api.v1 import OPERATIONS
from opsentry.bootstrap import serving
from opsentry.identity import api_tokens, tokens
from opsentry.infrastructure import single_flight
from tests.api.conftest import make_token
from tests.conftest import META, Client

MESSAGE = "missing, unknown, expired or revoked API token"


async def revoke(parts, tenant):
    async with parts.database.connection() as connection:
        await api_tokens.revoke_api_token(connection, tenant.id, tokens.public_prefix(tenant.token), META)


async def test_the_token_says_what_it_carries(http, base_url, parts, acme):
    value = await make_token(parts, acme.id, "write:incidents", "read:status")
    status, body, _ = await Client(http, base_url, value).get("/health")
    assert status == 200
    assert body == {
        "ok": True,
        "tenant_id": acme.id,
        "token_prefix": value[4:12],
        "scopes": ["read:status", "write:incidents"],
    }


async def test_every_bad_token_is_the_same_401_on_every_route(http, base_url, parts, acme):
    expired = await make_token(parts, acme.id, "read:status", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    revoked = await make_token(parts, acme.id, "read:status")
    async with parts.database.connection() as connection:
        await api_tokens.revoke_api_token(connection, acme.id, tokens.public_prefix(revoked), META)
    values = [
        "",
        "nonsense",
        "ops_" + "0" * 56,
        tokens.generate_token(api_tokens.API_TOKEN_MARK),
        expired,
        revoked,
        acme.token[:-1] + "x",
        acme.token[4:],
    ]
    headers = [{}, *({"Authorization": f"Bearer {value}"} for value in values)]
    headers += [{"Authorization": value} for value in (acme.token, f"Basic {acme.token}", f"Bearer{acme.token}")]
    headers += [{"X-Api-Key": acme.token}, {"Cookie": f"session={acme.token}"}]
    client = Client(http, base_url, None)
    for sent in headers:
        for method, path in ((o.method, o.path.removeprefix("/api/v1")) for o in OPERATIONS):
            where = path.replace("{id}", "1").replace("{delivery_id}", f"msg_{1:032x}")
            status, body, answered = await client.send(method, f"/api/v1{where}", headers=sent)
            assert (status, body) == (401, {"error": MESSAGE}), (method, path, sent)
            assert answered["WWW-Authenticate"] == 'Bearer realm="opsentry"'
            assert "RateLimit" not in answered
    assert (await client.get(f"/incidents?token={acme.token}&access_token={acme.token}"))[0] == 401


@pytest.mark.parametrize("kind", ["Bearer", "bearer", "BEARER"])
async def test_the_scheme_is_written_in_any_case(anonymous, acme, kind):
    assert (await anonymous.get("/health", headers={"Authorization": f"{kind} {acme.token}"}))[0] == 200


async def test_a_revoked_token_stops_working_once_it_is_forgotten(monkeypatch, http, settings, parts, acme):
    monkeypatch.setattr(tokens, "CACHE_SECONDS", 0.0)
    async with serving(settings, parts) as url:
        client = Client(http, url, acme.token)
        assert (await client.get("/health"))[0] == 200
        await revoke(parts, acme)
        assert (await client.get("/health"))[0] == 401


async def test_a_revoked_token_stops_working_within_five_seconds(monkeypatch, http, settings, parts, acme):
    now = 1000.0

    class Clock:
        @staticmethod
        def monotonic():
            return now

    monkeypatch.setattr(single_flight, "time", Clock)
    async with serving(settings, parts) as one, serving(settings, parts) as other:
        clients = [Client(http, url, acme.token) for url in (one, other)]
        assert [(await client.get("/health"))[0] for client in clients] == [200, 200]
        await revoke(parts, acme)
        now += 5
        assert [(await client.get("/health"))[0] for client in clients] == [401, 401]


async def test_no_token_is_in_the_database(owner, api, parts, acme, things):
    await revoke(parts, acme)
    tables = await owner.fetch("SELECT relname FROM pg_stat_user_tables")
    assert len(tables) > 5
    for row in tables:
        text = await owner.fetchval(f"SELECT string_agg(t::text, '') FROM {row['relname']} t") or ""
        for part in (acme.token, acme.token[12:52], acme.token[4:]):
            assert part not in text, row["relname"]
    recorded = await owner.fetch("SELECT type FROM events WHERE tenant_id = $1 AND type LIKE 'token.%'", acme.id)
    assert [row["type"] for row in recorded] == ["token.created", "token.revoked"]


async def test_no_token_is_in_the_logs_even_where_something_breaks(monkeypatch, caplog, capsys, api, parts, acme):
    async def breaks(*_, **__):
        raise RuntimeError("broken")

    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as lines:
        assert (await api.post("/incidents", {"title": "T"}))[0] == 201
        assert (await api.get("/incidents/abc"))[0] == 404
        monkeypatch.setattr(parts.projector, "read", breaks)
        assert (await api.get("/incidents"))[0] == 500
    assert [line["event"] for line in lines] == ["request_failed"]
    printed = capsys.readouterr()
    said = f"{lines}{caplog.text}{printed.out}{printed.err}"
    assert acme.token[12:] not in said
    assert acme.token[4:] not in said

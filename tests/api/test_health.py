from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from opsentry.application import readiness
from opsentry.bootstrap import serving
from opsentry.identity import operator_tokens, tokens
from tests.conftest import Client, expire_caches


async def test_the_probe_is_plain_and_needs_nothing(anonymous):
    status, body, headers = await anonymous.send("GET", "/health")
    assert (status, body, headers["Content-Type"]) == (200, "OK", "text/plain; charset=utf-8")
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Request-ID"]


async def test_liveness(anonymous):
    status, body, _ = await anonymous.send("GET", "/health/live")
    assert (status, body) == (200, {"status": "ok"})


async def test_ready_says_how_each_check_went(anonymous):
    status, body, _ = await anonymous.send("GET", "/health/ready")
    assert (status, body["status"]) == (200, "ready")
    assert set(body["checks"]) == {"postgres", "redis", "outbox"}
    for check in body["checks"].values():
        assert check["status"] == "ok"
        assert 0 < check["duration_ms"] < 500


async def add_intents(owner, tenant_id, count, created_at, *, suppressed=False):
    rows = [
        (tenant_id, uuid4(), 1, 1, "webhook", "incident.opened", "incident", 1, suppressed, created_at)
        for _ in range(count)
    ]
    await owner.copy_records_to_table("outbox_intents", records=rows)


async def ready_again(monkeypatch, operator):
    expire_caches(monkeypatch)
    return await operator.send("GET", "/health/ready")


@pytest.mark.parametrize(
    ("count", "age", "suppressed", "expected"),
    [
        (1000, 0, False, 200),
        (1001, 0, False, 503),
        (1, 299, False, 200),
        (1, 301, False, 503),
        (2000, 900, True, 200),
    ],
)
async def test_readiness_follows_the_backlog(
    monkeypatch, operator, acme, parts, owner, count, age, suppressed, expected
):
    await parts.projector.catch_up(acme.id, 0)
    created_at = datetime.now(UTC) - timedelta(seconds=age)
    await add_intents(owner, acme.id, count, created_at, suppressed=suppressed)
    status, body, _ = await ready_again(monkeypatch, operator)
    assert status == expected
    outbox = body["checks"]["outbox"]
    assert outbox["status"] == ("ok" if expected == 200 else "fail")
    assert outbox["pending"] == (0 if suppressed else count)
    await owner.execute("DELETE FROM outbox_intents")
    assert (await ready_again(monkeypatch, operator))[0] == 200


async def test_a_halted_outbox_is_reported_as_unhealthy(monkeypatch, operator, api, parts, acme, owner):
    await api.post("/incidents", {"title": "A"})
    await owner.execute("UPDATE checkpoints SET position = 0, halted_at = 1 WHERE projection = 'outbox'")
    _, body, _ = await ready_again(monkeypatch, operator)
    assert body["checks"]["outbox"]["lag_events"] == 3
    monkeypatch.setattr(readiness, "MAX_PENDING_AGE_SECONDS", 0)
    status, body, _ = await ready_again(monkeypatch, operator)
    assert (status, body["checks"]["outbox"]["status"]) == (503, "fail")


async def test_counts_are_for_operators(anonymous, api, operator, parts):
    forged = tokens.generate_token(operator_tokens.OPERATOR_TOKEN_MARK)
    for client in (anonymous, api, Client(api.session, api.base_url, forged)):
        status, body, _ = await client.send("GET", "/health/ready")
        assert status == 200
        for check in body["checks"].values():
            assert set(check) == {"status", "duration_ms"}
    _, body, _ = await operator.send("GET", "/health/ready")
    assert body["checks"]["outbox"]["pending"] == 0


async def test_a_forged_operators_token_counts_as_a_failure(limited_settings, http, parts):
    async with serving(limited_settings, parts) as url:
        client = Client(http, url, tokens.generate_token(operator_tokens.OPERATOR_TOKEN_MARK))
        for _ in range(4):
            status, body, _ = await client.send("GET", "/health/ready")
            assert (status, set(body["checks"]["outbox"])) == (200, {"status", "duration_ms"})
        assert (await client.send("GET", "/ops/projections"))[0] == 429


async def test_many_probes_are_one_round_of_checks(anonymous):
    answers = {str((await anonymous.send("GET", "/health/ready"))[1]) for _ in range(5)}
    assert len(answers) == 1
    assert readiness.CACHE_SECONDS <= 1


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/api/v1/incidents", "GET, HEAD, POST"),
        ("PUT", "/api/v1/incidents/1", "GET, HEAD, PATCH"),
        ("GET", "/api/v1/incidents/1/updates", "POST"),
        ("PATCH", "/api/v1/services", "GET, HEAD"),
    ],
)
async def test_an_unsupported_method_is_answered_with_the_allowed_ones(anonymous, method, path, allow):
    status, body, headers = await anonymous.send(method, path)
    assert (status, body, headers["Allow"]) == (405, {"error": "method not allowed"}, allow)
    assert headers["X-Request-ID"]


@pytest.mark.parametrize("path", ["/", "/nope", "/api/v1", "/api/v1/", "/api/v1/nope", "/api/v1/incidents/1/nope"])
async def test_another_path_is_not_found(anonymous, path):
    status, body, headers = await anonymous.send("GET", path)
    assert (status, body) == (404, {"error": "not found"})
    assert headers["X-Request-ID"]


async def test_head_answers_like_get_without_a_body(api):
    status, body, headers = await api.send("HEAD", "/api/v1/incidents")
    assert (status, body) == (200, None)
    assert int(headers["Content-Length"]) > 0

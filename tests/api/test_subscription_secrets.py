"""Check that signing secrets and secret targets are shown once, stored encrypted and never in clear."""

from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from opsentry.bootstrap import core, serving
from opsentry.domain import subscription
from opsentry.domain.subscription import CreateSubscription
from opsentry.infrastructure.encryption import SecretBox, generate_key
from tests import commands
from tests.api.conftest import HOOK, MAIL, SLACK, head, raw, recorded, types
from tests.conftest import META, SECRET_KEY, Client

# Every column of every table that holds text, JSON or octets.
COLUMNS = """
SELECT c.relname AS table, a.attname AS column FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_type t ON t.oid = a.atttypid
WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p', 'm') AND a.attnum > 0 AND NOT a.attisdropped
    AND (t.typcategory IN ('S', 'A', 'U') OR t.typname IN ('bytea', 'json', 'jsonb'))
"""


async def found_in_clear(owner, *secrets):
    """Return each (table, column, secret) that holds a secret as text or within octets."""
    places = []
    for table, column in await owner.fetch(COLUMNS):
        for secret in secrets:
            found = await owner.fetchval(
                f'SELECT count(*) FROM "{table}" WHERE position($1 IN "{column}"::text) > 0'
                f' OR position($2 IN "{column}"::text) > 0',
                secret,
                secret.encode().hex(),
            )
            places += [(table, column, secret)] if found else []
    return places


async def test_no_secret_is_stored_or_answered_in_clear(api, parts, acme, owner):
    _, hook, _ = await api.post("/subscriptions", HOOK, headers={"Idempotency-Key": "k"})
    _, slack, _ = await api.post("/subscriptions", SLACK, headers={"Idempotency-Key": "l"})
    _, rotated, _ = await api.post(f"/subscriptions/{hook['id']}/rotate-secret")
    other = "https://hooks.slack.com/services/T111/B111/AAAABBBBCCCC"
    await api.patch(f"/subscriptions/{slack['id']}", {"target": other})
    await api.post(f"/subscriptions/{hook['id']}/test")
    await parts.projector.catch_up(acme.id, await head(parts, acme.id))
    secrets = [hook["secret"], rotated["secret"], "XXXXYYYYZZZZ", "AAAABBBBCCCC"]
    secrets += [secret.removeprefix("whsec_") for secret in secrets[:2]]
    assert await found_in_clear(owner, *secrets) == []
    assert await found_in_clear(owner, "example.com/hook")  # a target that is no secret proves the search
    paths = ["/subscriptions", "/events", "/events/export"]
    paths += [f"/subscriptions/{number}{more}" for number in (hook["id"], slack["id"]) for more in ("", "/deliveries")]
    for path in paths:
        status, octets = await raw(api, "GET", path)
        assert status == 200
        assert not [secret for secret in [*secrets, "whsec_"] if secret.encode() in octets], path


# ---------------------------------------------------------------------------------------------------- rotation


async def test_a_rotation_shows_the_new_secret_once(api, parts, acme):
    _, made, _ = await api.post("/subscriptions", HOOK)
    path = f"/subscriptions/{made['id']}"
    status, rotated, headers = await api.post(f"{path}/rotate-secret")
    assert (status, headers["ETag"]) == (200, '"2"')
    assert rotated["secret"].startswith("whsec_")
    assert rotated["secret"] != made["secret"]
    until = datetime.fromisoformat(rotated["previous_valid_until"])
    assert timedelta(hours=23.9) < until - datetime.now(UTC) < timedelta(hours=24.1)
    _, read, _ = await api.get(path)
    assert rotated == {**read, "secret": rotated["secret"], "previous_valid_until": rotated["previous_valid_until"]}
    event = (await recorded(parts, acme.id, "subscription", made["id"]))[1]
    assert (event.TYPE, event.previous_until) == ("subscription.secret_rotated", until)
    assert SecretBox([SECRET_KEY]).decrypt(event.encrypted_secret) == rotated["secret"]


async def test_a_rotation_that_is_sent_again_is_one_rotation(api, parts, acme):
    _, made, _ = await api.post("/subscriptions", HOOK)
    path = f"/subscriptions/{made['id']}/rotate-secret"
    body, headers = {"overlap_hours": 0}, {"Idempotency-Key": "k"}
    first = await api.post(path, body, headers=headers)
    await api.post(path)
    again = await api.post(path, body, headers=headers)
    assert first[:2] == again[:2]
    assert (first[2]["ETag"], again[2]["ETag"], again[2]["Idempotency-Replayed"]) == ('"2"', '"2"', "true")
    assert await types(parts, acme.id, "subscription", made["id"]) == [
        "subscription.created", "subscription.secret_rotated", "subscription.secret_rotated",
    ]  # fmt: skip


async def secrets_of(parts, tenant_id, number):
    """Return the current secret, the previous one, and the time at which that expires."""
    state = subscription.DECIDER.fold(await recorded(parts, tenant_id, "subscription", number))
    assert state is not None
    box = SecretBox([SECRET_KEY])
    present, previous = (
        encrypted_secret and box.decrypt(encrypted_secret)
        for encrypted_secret in (state.encrypted_secret, state.previous_encrypted_secret)
    )
    return present, previous, state.previous_until


async def test_a_webhook_without_a_secret_gets_its_first_one(api, parts, acme):
    command = CreateSubscription(channel="webhook", target=HOOK["target"])
    made = await commands.create(parts, subscription.DECIDER, acme.id, command, META)
    await parts.projector.catch_up(acme.id, made.position)
    path, headers = f"/subscriptions/{made.stream_id}/rotate-secret", {"Idempotency-Key": "k"}
    status, first, _ = await api.post(path, headers=headers)
    assert (status, first["secret"][:6], first["previous_valid_until"]) == (200, "whsec_", None)
    state = await secrets_of(parts, acme.id, made.stream_id)
    assert state == (first["secret"], None, None)
    _, second, _ = await api.post(path)
    assert second["previous_valid_until"]
    state = await secrets_of(parts, acme.id, made.stream_id)
    assert state[:2] == (second["secret"], first["secret"])
    assert (await api.post(path, headers=headers))[:2] == (200, first)


@pytest.mark.parametrize("body", [SLACK, MAIL])
async def test_a_channel_without_signatures_has_no_secret_to_rotate(api, parts, acme, body):
    _, made, _ = await api.post("/subscriptions", body)
    status, answer, _ = await api.post(f"/subscriptions/{made['id']}/rotate-secret")
    assert (status, answer) == (409, {"error": f"messages to {body['channel']} are not signed"})
    assert await types(parts, acme.id, "subscription", made["id"]) == ["subscription.created"]


@pytest.mark.parametrize("hours", [-1, 169, "1", 1.5, None, 2**70])
async def test_an_overlap_is_at_most_a_week(api, parts, acme, hours):
    _, made, _ = await api.post("/subscriptions", HOOK)
    status, answer, _ = await api.post(f"/subscriptions/{made['id']}/rotate-secret", {"overlap_hours": hours})
    assert (status, answer["error"].split(":")[0]) == (400, "overlap_hours")
    assert await types(parts, acme.id, "subscription", made["id"]) == ["subscription.created"]


# ---------------------------------------------------------------------------------------------------- keys


@asynccontextmanager
async def served_with_keys(settings, *keys):
    async with core(replace(settings, encryption_keys=keys)) as parts, serving(parts.settings, parts) as url:
        yield url


async def test_without_an_encryption_key_no_secret_is_accepted(http, settings, parts, acme):
    async with served_with_keys(settings) as url:
        api = Client(http, url, acme.token)
        before = await head(parts, acme.id)
        for body in (HOOK, SLACK):
            status, answer, _ = await api.post("/subscriptions", body)
            assert (status, set(answer)) == (503, {"error", "request_id"})
            assert "OPSENTRY_ENCRYPTION_KEYS" in answer["error"]
        assert await head(parts, acme.id) == before
        status, made, _ = await api.post("/subscriptions", MAIL)
        assert status == 201
        assert (await api.patch(f"/subscriptions/{made['id']}", {"target": "else@example.org"}))[0] == 200


async def test_a_new_encryption_key_keeps_secrets_readable_and_a_lost_one_is_reported(http, settings, parts, acme, api):
    headers = {"Idempotency-Key": "k"}
    _, made, _ = await api.post("/subscriptions", HOOK, headers=headers)
    _, slack, _ = await api.post("/subscriptions", SLACK)
    async with served_with_keys(settings, generate_key(), SECRET_KEY) as url:
        assert (await Client(http, url, acme.token).post("/subscriptions", HOOK, headers=headers))[1] == made
    async with served_with_keys(settings, generate_key()) as url:
        lost = Client(http, url, acme.token)
        status, answer, _ = await lost.post("/subscriptions", HOOK, headers=headers)
        assert status == 503
        assert "OPSENTRY_ENCRYPTION_KEYS" in answer["error"]
        # An unreadable secret can still be replaced, and its subscription read without it.
        status, _, told = await lost.patch(f"/subscriptions/{slack['id']}", {"target": SLACK["target"]})
        assert (status, told["ETag"]) == (200, '"2"')
        assert (await lost.post(f"/subscriptions/{made['id']}/rotate-secret"))[0] == 200
        assert (await lost.get(f"/subscriptions/{made['id']}"))[0] == 200

"""Check `POST` and `GET /subscriptions`, their conditions, and which tokens and methods they accept."""

import asyncio

import pytest

from opsentry.domain import subscription
from opsentry.domain.subscription import DisableSubscription
from opsentry.infrastructure.encryption import SecretBox
from tests.api.conftest import (
    HOOK,
    MAIL,
    SLACK,
    carry_out,
    head,
    make_subscription,
    make_token,
    raw,
    recorded,
    refused,
    types,
)
from tests.conftest import SECRET_KEY, Client, make_service

SHOWN = {
    "id", "channel", "target", "audience", "notify_incidents", "notify_maintenance", "service_ids", "min_severity",
    "status", "disabled_reason", "created_at", "updated_at",
}  # fmt: skip
SECRET_PART = "XXXXYYYYZZZZ"


# ---------------------------------------------------------------------------------------------------- create


async def test_create_answers_with_the_whole_subscription_and_its_secret(api, parts, acme):
    service_id = await make_service(parts, acme.id, "portal")
    body = {
        **HOOK,
        "audience": "internal",
        "notify_incidents": True,
        "notify_maintenance": False,
        "service_ids": [service_id],
        "min_severity": "major_outage",
    }
    status, made, headers = await api.post("/subscriptions", body)
    assert status == 201
    assert set(made) == SHOWN | {"secret"}
    assert {key: made[key] for key in body} == body
    assert (made["status"], made["disabled_reason"], made["created_at"]) == ("active", None, made["updated_at"])
    assert headers["Location"] == f"/api/v1/subscriptions/{made['id']}"
    assert headers["ETag"] == '"1"'
    assert int(headers["Opsentry-Position"]) == await head(parts, acme.id)
    assert made["secret"].startswith("whsec_")
    status, read, told = await api.get(f"/subscriptions/{made['id']}")
    assert (status, told["ETag"]) == (200, headers["ETag"])
    assert read == {name: made[name] for name in SHOWN}
    (event,) = await recorded(parts, acme.id, "subscription", made["id"])
    assert (event.TYPE, event.target) == ("subscription.created", HOOK["target"])
    assert SecretBox([SECRET_KEY]).decrypt(event.encrypted_secret) == made["secret"]


async def test_the_defaults_of_a_new_subscription(api):
    _, made, _ = await api.post("/subscriptions", MAIL)
    assert set(made) == SHOWN
    assert (made["audience"], made["notify_incidents"], made["notify_maintenance"]) == ("public", True, True)
    assert (made["service_ids"], made["min_severity"]) == ([], "informational")


async def test_a_target_that_is_a_secret_is_shown_in_part(api, parts, acme):
    status, made, _ = await api.post("/subscriptions", SLACK)
    assert (status, set(made)) == (201, SHOWN)
    assert SECRET_PART not in made["target"]
    (event,) = await recorded(parts, acme.id, "subscription", made["id"])
    assert event.target == made["target"]
    assert SecretBox([SECRET_KEY]).decrypt(event.encrypted_secret) == SLACK["target"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "channel: is required"),
        ({"channel": "webhook"}, "target: is required"),
        ({**HOOK, "channel": "pigeon"}, "channel: must be one of email, slack, webhook"),
        ({**HOOK, "channel": None}, "channel: must be a string"),
        ({**HOOK, "target": ""}, "target: must not be blank"),
        ({**HOOK, "target": "a\x00b"}, "target: must not contain the character NUL"),
        ({**HOOK, "target": f"https://example.com/{'a' * 2000}"}, "target: must have at most 2000 characters"),
        ({**HOOK, "target": "not an address"}, "target: "),
        ({**MAIL, "target": "nobody"}, "target: "),
        ({**HOOK, "target": None}, "target: must be a string"),
        ({**HOOK, "audience": "everybody"}, "audience: must be one of public, internal"),
        ({**HOOK, "audience": None}, "audience: must be one of public, internal"),
        ({**HOOK, "notify_incidents": "yes"}, "notify_incidents: must be true or false"),
        ({**HOOK, "min_severity": "bad"}, "min_severity: must be one of informational, "),
        ({**HOOK, "service_ids": [987654321]}, "service_ids: no such service: 987654321"),
        ({**HOOK, "service_ids": None}, "service_ids: must be an array"),
    ],
)
async def test_an_invalid_field_is_named_and_creates_nothing(api, parts, acme, body, says):
    before = await head(parts, acme.id)
    status, answer, _ = await api.post("/subscriptions", body)
    assert status == 400
    assert answer["error"].startswith(says)
    assert await head(parts, acme.id) == before


async def test_services_of_another_tenant_are_unknown(api, parts, acme, globex):
    foreign = await make_service(parts, globex.id, "own")
    number = await make_subscription(api)
    for answer in (
        await api.post("/subscriptions", {**HOOK, "service_ids": [foreign]}),
        await api.patch(f"/subscriptions/{number}", {"service_ids": [foreign]}),
    ):
        assert answer[:2] == (400, refused(f"service_ids: no such service: {foreign}"))


@pytest.mark.parametrize("body", [HOOK, SLACK, MAIL])
async def test_a_repeat_is_answered_alike_secret_included(api, parts, acme, body):
    headers = {"Idempotency-Key": "k"}
    answers = await asyncio.gather(*(api.post("/subscriptions", body, headers=headers) for _ in range(5)))
    appended = await head(parts, acme.id)
    answers.append(await api.post("/subscriptions", body, headers=headers))
    assert {status for status, _, _ in answers} == {201}
    assert all(answer == answers[0][1] for _, answer, _ in answers)
    assert ("secret" in answers[0][1]) == (body is HOOK)
    assert {told["ETag"] for _, _, told in answers} == {'"1"'}
    assert sorted(told.get("Idempotency-Replayed", "") for _, _, told in answers) == ["", *["true"] * 5]
    assert await head(parts, acme.id) == appended
    assert (await api.get("/subscriptions"))[1]["total"] == 1
    assert (await api.post("/subscriptions", {**body, "audience": "internal"}, headers=headers))[0] == 422


# ---------------------------------------------------------------------------------------------------- read


async def test_lists_are_the_newest_first_and_filtered(api, parts, acme):
    numbers = [await make_subscription(api, body) for body in (HOOK, MAIL, SLACK, HOOK)]
    await carry_out(parts, subscription.DECIDER, acme.id, numbers[0], DisableSubscription(reason="endpoint_failing"))
    _, page, _ = await api.get("/subscriptions")
    assert [item["id"] for item in page["subscriptions"]] == numbers[::-1]
    assert all(set(item) == SHOWN for item in page["subscriptions"])
    assert (page["total"], page["limit"], page["offset"]) == (4, 50, 0)
    _, page, headers = await api.get("/subscriptions?channel=webhook&limit=1")
    assert ([item["id"] for item in page["subscriptions"]], page["total"]) == ([numbers[3]], 2)
    assert 'rel="next"' in headers["Link"]
    _, page, _ = await api.get("/subscriptions?status=disabled")
    assert [(item["id"], item["disabled_reason"]) for item in page["subscriptions"]] == [
        (numbers[0], "endpoint_failing")
    ]
    for query in ("channel=pigeon", "status=removed", "limit=0", "as_of=1"):
        assert (await api.get(f"/subscriptions?{query}"))[0] == 400


async def test_an_unchanged_subscription_is_not_sent_again(api):
    number = await make_subscription(api)
    for path in ("/subscriptions", f"/subscriptions/{number}"):
        _, _, headers = await api.get(path)
        assert (await api.get(path, headers={"If-None-Match": headers["ETag"]}))[0] == 304
        await api.patch(f"/subscriptions/{number}", {"audience": "internal" if path == "/subscriptions" else "public"})
        assert (await api.get(path, headers={"If-None-Match": headers["ETag"]}))[0] == 200


# ---------------------------------------------------------------------------------------------------- editors, others


async def test_if_match_prevents_lost_updates(api, parts, acme):
    number = await make_subscription(api)
    path = f"/subscriptions/{number}"
    await api.patch(path, {"audience": "internal"})
    for method, where, body in (
        ("PATCH", path, {"audience": "public"}),
        ("POST", f"{path}/test", None),
        ("POST", f"{path}/rotate-secret", None),
        ("DELETE", path, None),
    ):
        options = {} if body is None else {"json": body}
        for tag, expected in (('"1"', 412), ('"x"', 412)):
            status, _, headers = await api.send(method, f"/api/v1{where}", headers={"If-Match": tag}, **options)
            assert (status, headers["ETag"]) == (expected, '"2"')
    assert len(await types(parts, acme.id, "subscription", number)) == 2
    assert (await api.delete(path, headers={"If-Match": '"2"'}))[0] == 204


async def test_another_tenants_subscription_is_the_same_404(api, other_api, parts, acme):
    number = await make_subscription(api)
    before = await head(parts, acme.id)
    for method, where, body in (
        ("GET", "", None),
        ("PATCH", "", {"audience": "internal"}),
        ("DELETE", "", None),
        ("POST", "/test", None),
        ("POST", "/rotate-secret", {"overlap_hours": 0}),
        ("GET", "/deliveries", None),
    ):
        options = {} if body is None else {"json": body}
        answers = {
            await raw(other_api, method, f"/subscriptions/{which}{where}", **options)
            for which in (number, 987654321, "abc")
        }
        assert answers == {(404, b'{"error":"not found"}')}
    assert (await other_api.get("/subscriptions"))[1]["subscriptions"] == []
    assert await head(parts, acme.id) == before


async def test_reading_needs_the_writing_scope(http, base_url, api, parts, acme):
    number = await make_subscription(api)
    others = await make_token(parts, acme.id, "read:status", "write:incidents", "write:maintenance", "read:audit")
    lacking = Client(http, base_url, others)
    own = Client(http, base_url, await make_token(parts, acme.id, "write:subscriptions"))
    for path in ("/subscriptions", f"/subscriptions/{number}", f"/subscriptions/{number}/deliveries"):
        says = {"error": "missing required scope: write:subscriptions"}
        assert (await lacking.get(path))[:2] == (403, says)
        assert (await own.get(path))[0] == 200
    assert (await own.get("/incidents"))[0] == 403


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        ("/subscriptions", "DELETE", "GET, HEAD, POST"),
        ("/subscriptions/1", "PUT", "DELETE, GET, HEAD, PATCH"),
        ("/subscriptions/1/test", "GET", "POST"),
        ("/subscriptions/1/rotate-secret", "GET", "POST"),
        ("/subscriptions/1/deliveries", "POST", "GET, HEAD"),
        (f"/subscriptions/1/deliveries/msg_{1:032x}", "DELETE", "GET, HEAD"),
        (f"/subscriptions/1/deliveries/msg_{1:032x}/redeliver", "GET", "POST"),
    ],
)
async def test_other_methods_are_not_allowed(api, path, method, allowed):
    status, _, headers = await api.send(method, f"/api/v1{path}")
    assert (status, headers["Allow"]) == (405, allowed)

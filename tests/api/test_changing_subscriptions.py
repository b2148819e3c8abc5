"""Check `PATCH` and `DELETE /subscriptions/:id`: the events they append and the fields they refuse."""

import pytest
from msgspec import UNSET

from opsentry.domain import subscription
from opsentry.domain.subscription import ConfirmSubscription, CreateSubscription
from opsentry.infrastructure.encryption import SecretBox
from tests import commands
from tests.api.conftest import HOOK, MAIL, SLACK, carry_out, head, make_subscription, raw, recorded, types
from tests.conftest import META, SECRET_KEY, make_service

# ---------------------------------------------------------------------------------------------------- change


async def test_a_change_changes_only_the_given_fields(api, parts, acme):
    service_id = await make_service(parts, acme.id, "portal")
    number = await make_subscription(api)
    before = (await api.get(f"/subscriptions/{number}"))[1]
    wanted = {
        "target": "https://example.com/other",
        "audience": "internal",
        "notify_incidents": False,
        "notify_maintenance": False,
        "service_ids": [service_id],
        "min_severity": "critical",
    }
    status, changed, headers = await api.patch(f"/subscriptions/{number}", wanted)
    assert (status, headers["ETag"]) == (200, '"2"')
    assert changed == {**before, **wanted, "updated_at": changed["updated_at"]}
    assert (await api.get(f"/subscriptions/{number}"))[1] == changed
    event = (await recorded(parts, acme.id, "subscription", number))[1]
    assert (event.TYPE, event.min_severity) == ("subscription.changed", "critical")
    status, same, headers = await api.patch(f"/subscriptions/{number}", wanted)
    assert (status, same, headers["ETag"]) == (200, changed, '"2"')
    assert (await api.patch(f"/subscriptions/{number}", {}))[:2] == (200, changed)
    assert await types(parts, acme.id, "subscription", number) == ["subscription.created", "subscription.changed"]


async def test_a_whole_answer_may_be_sent_back_unchanged(api, parts, acme):
    for body in (HOOK, SLACK, MAIL):
        number = await make_subscription(api, body)
        _, read, _ = await api.get(f"/subscriptions/{number}")
        assert (await api.patch(f"/subscriptions/{number}", read))[:2] == (200, read)
        assert await types(parts, acme.id, "subscription", number) == ["subscription.created"]


async def test_sending_is_turned_off_and_on(api, parts, acme):
    number = await make_subscription(api)
    path = f"/subscriptions/{number}"
    _, off, _ = await api.patch(path, {"enabled": False})
    assert (off["status"], off["disabled_reason"]) == ("disabled", "disabled_by_owner")
    _, on, _ = await api.patch(path, {"enabled": True, "audience": "internal"})
    assert (on["status"], on["disabled_reason"], on["audience"]) == ("active", None, "internal")
    assert (await types(parts, acme.id, "subscription", number))[1:] == [
        "subscription.disabled", "subscription.changed", "subscription.enabled",
    ]  # fmt: skip


async def test_a_pending_subscription_is_enabled_by_its_target_alone(api, parts, acme):
    wish = CreateSubscription(channel="email", target="ops@example.org", pending=True)
    made = await commands.create(parts, subscription.DECIDER, acme.id, wish, META)
    path = f"/subscriptions/{made.stream_id}"
    assert (await api.get(path))[1]["status"] == "pending"
    status, answer, _ = await api.patch(path, {"enabled": True})
    assert status == 409
    assert answer["error"].startswith("only the owner of its target can enable")
    assert (await api.post(f"{path}/test"))[0] == 409
    await carry_out(parts, subscription.DECIDER, acme.id, made.stream_id, ConfirmSubscription())
    assert (await api.get(path))[1]["status"] == "active"


async def test_a_hidden_target_is_replaced_encrypted_and_the_same_one_is_no_change(api, parts, acme):
    number = await make_subscription(api, SLACK)
    path = f"/subscriptions/{number}"
    status, _, headers = await api.patch(path, {"target": SLACK["target"]})
    assert (status, headers["ETag"]) == (200, '"1"')
    other = "https://hooks.slack.com/services/T111/B111/AAAABBBBCCCC"
    status, changed, headers = await api.patch(path, {"target": other})
    assert (status, headers["ETag"]) == (200, '"2"')
    assert "AAAABBBBCCCC" not in changed["target"]
    event = (await recorded(parts, acme.id, "subscription", number))[1]
    assert (SecretBox([SECRET_KEY]).decrypt(event.encrypted_secret), event.target) == (other, changed["target"])


async def test_another_target_of_a_webhook_keeps_its_secret(api, parts, acme):
    number = await make_subscription(api)
    await api.patch(f"/subscriptions/{number}", {"target": "https://example.com/other"})
    created, changed = await recorded(parts, acme.id, "subscription", number)
    assert (changed.target, changed.encrypted_secret) == ("https://example.com/other", UNSET)
    assert SecretBox([SECRET_KEY]).decrypt(created.encrypted_secret).startswith("whsec_")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        *(({name: None}, f"{name}: must be") for name in
          ("target", "audience", "notify_incidents", "notify_maintenance", "service_ids", "min_severity", "enabled")),
        ({"target": " "}, "target: must not be blank"),
        ({"target": "not an address"}, "target: "),
        ({"audience": "everybody"}, "audience: must be one of"),
        ({"service_ids": [987654321]}, "service_ids: no such service: 987654321"),
        ({"service_ids": [0]}, "service_ids"),
        ([], "body: must be a JSON object"),
    ],
)  # fmt: skip
async def test_an_invalid_change_is_refused(api, parts, acme, body, says):
    number = await make_subscription(api)
    status, answer, _ = await api.patch(f"/subscriptions/{number}", body)
    assert status == 400
    assert answer["error"].startswith(says)
    assert await types(parts, acme.id, "subscription", number) == ["subscription.created"]


async def test_a_repeated_change_is_one_change(api, parts, acme):
    number = await make_subscription(api, SLACK)
    body = {"target": "https://hooks.slack.com/services/T111/B111/AAAABBBBCCCC", "enabled": False}
    headers = {"Idempotency-Key": "k"}
    first, again = [await api.patch(f"/subscriptions/{number}", body, headers=headers) for _ in range(2)]
    assert first[:2] == again[:2]
    assert again[2]["Idempotency-Replayed"] == "true"
    assert await types(parts, acme.id, "subscription", number) == [
        "subscription.created",
        "subscription.changed",
        "subscription.disabled",
    ]


# ---------------------------------------------------------------------------------------------------- remove


async def test_a_removed_subscription_is_gone_and_redacted(api, parts, acme, owner):
    number = await make_subscription(api)
    path = f"/subscriptions/{number}"
    await api.patch(path, {"target": "https://example.com/other"})
    await api.post(f"{path}/rotate-secret")
    await api.post(f"{path}/test")
    status, body, headers = await api.delete(path)
    assert (status, body) == (204, "")
    assert int(headers["Opsentry-Position"]) == await head(parts, acme.id)
    assert (await types(parts, acme.id, "subscription", number))[-2:] == [
        "subscription.removed",
        "subscription.redacted",
    ]
    *_, redacted = await recorded(parts, acme.id, "subscription", number)
    assert redacted.versions == (1, 2, 3)
    assert (
        await owner.fetchval("SELECT count(*) FROM events WHERE stream_kind = 'subscription' AND erasable <> ''") == 0
    )
    assert (await api.get("/subscriptions"))[1]["total"] == 0
    before = await head(parts, acme.id)
    never = await raw(api, "GET", "/subscriptions/987654321")
    for method, where, options in (
        ("GET", path, {}),
        ("PATCH", path, {"json": {"audience": "internal"}}),
        ("PATCH", path, {"json": {}}),
        ("DELETE", path, {}),
        ("POST", f"{path}/test", {}),
        ("POST", f"{path}/rotate-secret", {}),
        ("GET", f"{path}/deliveries", {}),
        ("GET", f"{path}/deliveries/msg_{1:032x}", {}),
        ("POST", f"{path}/deliveries/msg_{1:032x}/redeliver", {}),
    ):
        assert await raw(api, method, where, **options) == never, (method, where)
    assert (await api.delete(path, headers={"If-Match": '"99"'}))[:2] == (404, {"error": "not found"})
    assert await head(parts, acme.id) == before


async def test_a_repeated_removal_is_one_removal(api, parts, acme):
    number = await make_subscription(api)
    first, again = [await api.delete(f"/subscriptions/{number}", headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert (first[0], again[0], again[2]["Idempotency-Replayed"]) == (204, 204, "true")


async def test_a_repeat_after_the_removal_shows_no_target_and_no_secret(api):
    headers = {"Idempotency-Key": "k"}
    _, made, _ = await api.post("/subscriptions", HOOK, headers=headers)
    await api.delete(f"/subscriptions/{made['id']}")
    status, again, _ = await api.post("/subscriptions", HOOK, headers=headers)
    assert (status, again) == (201, {**made, "target": "[redacted]", "secret": "[redacted]"})

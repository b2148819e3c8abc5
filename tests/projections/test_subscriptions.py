from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from opsentry.domain import subscription
from opsentry.domain.decider import IllegalTransition
from opsentry.domain.redaction import erasable_versions
from opsentry.domain.subscription import (
    ChangeSubscription,
    ConfirmSubscription,
    CreateSubscription,
    DisableSubscription,
    RemoveSubscription,
    RequestTest,
    RotateSecret,
    Subscription,
)
from opsentry.projections import subscriptions
from opsentry.projections.engine.projection import by_stream
from opsentry.projections.page_request import PageRequest
from opsentry.projections.subscriptions import SubscriptionPageFilter, Subscriptions
from tests.projections.histories import History, apply, at, written

PROJECTION = Subscriptions()


def subscriber_filter(**fields: Any) -> CreateSubscription:
    return CreateSubscription(**{"channel": "webhook", "target": "https://example.com/hook", **fields})


def remove(history: History, number: int, **fields: Any) -> None:
    versions = erasable_versions(written(history, subscription.KIND, number))
    history.subscription(number, RemoveSubscription(versions=versions, **fields))


async def row_of(connection: Any, history: History, number: int) -> Any:
    return await connection.fetchrow(
        "SELECT * FROM subscriptions WHERE tenant_id = $1 AND subscription_id = $2", history.tenant_id, number
    )


async def test_a_row_has_the_response_and_the_state(app_connection, history):
    history.subscription(1, subscriber_filter(service_ids=(2, 1), encrypted_secret="ciphertext"))
    history.subscription(1, ChangeSubscription(audience="internal"))
    await apply(app_connection, PROJECTION, history.events)
    row = await row_of(app_connection, history, 1)
    assert msgspec.json.decode(row["body"]) == {
        "id": 1,
        "channel": "webhook",
        "target": "https://example.com/hook",
        "audience": "internal",
        "notify_incidents": True,
        "notify_maintenance": True,
        "service_ids": [1, 2],
        "min_severity": "informational",
        "status": "active",
        "disabled_reason": None,
        "created_at": "2026-01-01T00:01:00Z",
        "updated_at": "2026-01-01T00:02:00Z",
    }
    assert msgspec.json.decode(row["state"], type=Subscription) == history.states[subscription.KIND, 1]
    assert (row["version"], row["status"], row["channel"]) == (2, "active", "webhook")
    assert row["body"].encode() == subscriptions.render(history.events)


async def test_a_removed_subscription_keeps_no_erasable_text(app_connection, history):
    history.subscription(1, subscriber_filter(encrypted_secret="ciphertext"))
    history.subscription(1, RotateSecret(encrypted_secret="ciphertext", previous_until=at(5)))
    remove(history, 1)
    await apply(app_connection, PROJECTION, history.events)
    row = await row_of(app_connection, history, 1)
    assert (row["status"], row["target"]) == ("removed", "")
    assert "example.com" not in str(row)
    assert "ciphertext" not in str(row)


_STEPS = st.sampled_from(
    [
        ConfirmSubscription(),
        ChangeSubscription(target="https://example.org/other"),
        ChangeSubscription(target="https://example.org/third", encrypted_secret="resealed", enabled=False),
        RotateSecret(encrypted_secret="rotated", previous_until=at(24)),
        DisableSubscription(reason="endpoint_gone"),
        RequestTest(),
    ]
)


@hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(_STEPS, max_size=6),
    encrypted_secret=st.sampled_from([None, "encrypted_secret"]),
    pending=st.booleans(),
)
async def test_a_replay_of_a_removed_subscription_gives_the_live_row(app_connection, steps, encrypted_secret, pending):
    history = History(10**6)
    history.subscription(1, subscriber_filter(encrypted_secret=encrypted_secret, pending=pending))
    for step in steps:
        with suppress(IllegalTransition):
            history.subscription(1, step)
    remove(history, 1)
    transaction = app_connection.transaction()
    await transaction.start()
    try:
        for event in history.events:
            await apply(app_connection, PROJECTION, [event])
        live = await row_of(app_connection, history, 1)
    finally:
        await transaction.rollback()
    (derived,) = PROJECTION.replayer()(subscription.KIND, by_stream(history.erased()))["subscriptions"]
    assert tuple(live)[1:] == derived
    assert "[redacted]" not in str(derived)


async def test_a_list_has_own_subscriptions_newest_first_without_removed_ones(app_connection, history, other_history):
    history.subscription(1, subscriber_filter())
    history.subscription(2, subscriber_filter(channel="email", target="ops@example.org"))
    history.subscription(3, subscriber_filter(pending=True))
    history.subscription(4, subscriber_filter())
    remove(history, 4)
    other_history.subscription(5, subscriber_filter())
    for each in (history, other_history):
        await apply(app_connection, PROJECTION, each.events)

    async def page(limit: int = 10, offset: int = 0, **fields: Any) -> tuple[list[int], int]:
        filter_ = SubscriptionPageFilter(**fields)
        row = await subscriptions.select_subscriptions(
            app_connection, history.tenant_id, filter_, PageRequest(limit, offset)
        )
        items = msgspec.json.decode(b"[" + (row["items"] or b"") + b"]")
        return [item["id"] for item in items], row["total"]

    assert await page() == ([3, 2, 1], 3)
    assert await page(limit=1, offset=1) == ([2], 3)
    assert await page(channel="webhook") == ([3, 1], 2)
    assert await page(status="pending") == ([3], 1)
    assert await page(status="removed") == ([], 0)
    assert (await subscriptions.select_subscription(app_connection, history.tenant_id, 3))["status"] == "pending"
    for number in (4, 5):
        row = await subscriptions.select_subscription(app_connection, history.tenant_id, number)
        assert (row["body"], row["etag"], row["status"]) == (None, None, None)


@pytest.mark.parametrize("target", ["ops@example.org", "nobody@example.org"])
async def test_subscriptions_are_found_by_target(app_connection, history, other_history, target):
    history.subscription(1, subscriber_filter(channel="email", target="ops@example.org"))
    history.subscription(2, subscriber_filter(channel="email", target="ops@example.org", pending=True))
    history.subscription(3, subscriber_filter(target="ops@example.org"))
    history.subscription(4, subscriber_filter(channel="email", target="ops@example.org"))
    remove(history, 4)
    other_history.subscription(5, subscriber_filter(channel="email", target="ops@example.org"))
    for each in (history, other_history):
        await apply(app_connection, PROJECTION, each.events)
    found = await subscriptions.select_by_target(app_connection, history.tenant_id, "email", target)
    if target == "nobody@example.org":
        assert (found["ids"], found["statuses"], found["ages"]) == (None, None, None)
    else:
        assert (found["ids"], found["statuses"]) == ([2, 1], ["pending", "active"])
        assert found["ages"][0] < found["ages"][1]

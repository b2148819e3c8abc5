from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from opsentry.domain import subscription
from opsentry.domain.subscription import DisableSubscription
from tests import commands
from tests.api.conftest import HOOK, raw
from tests.conftest import META

AT = datetime(2026, 6, 1, 2, tzinfo=UTC)
SHOWN = {
    "id", "type", "position", "subject_kind", "subject_id", "state", "created_at", "next_attempt_at", "attempts",
    "finalized_at", "coalesced_into",
}  # fmt: skip
NOT_FOUND = (404, b'{"error":"not found"}')


def message(intent_id):
    return f"msg_{UUID(str(intent_id)).hex}"


@pytest.fixture
async def number(api):
    """The id of a subscription of acme."""
    return (await api.post("/subscriptions", HOOK))[1]["id"]


@pytest.fixture
def put(app_connection, acme, number):
    """Insert a delivery of the subscription; return its public id."""

    async def put(position, state="delivered", **more):
        waits = state == "pending"
        row = {
            "tenant_id": acme.id, "intent_id": uuid4(), "subscription_id": number, "stream_kind": "incident",
            "stream_id": 7, "position": position, "channel": "webhook", "topic": "incident.opened", "created_at": AT,
            "state": state, "next_attempt_at": AT if waits else None,
            "finalized_at": None if waits else AT + timedelta(seconds=9),
            **more,
        }  # fmt: skip
        places = ", ".join(f"${n}" for n in range(1, len(row) + 1))
        await app_connection.execute(f"INSERT INTO deliveries ({', '.join(row)}) VALUES ({places})", *row.values())
        await app_connection.execute(
            "INSERT INTO endpoints (tenant_id, subscription_id, channel) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            acme.id, number, row["channel"],
        )  # fmt: skip
        return message(row["intent_id"])

    return put


async def row_of(connection, called):
    return await connection.fetchrow("SELECT * FROM deliveries WHERE intent_id = $1", UUID(called[4:]))


async def endpoint(connection):
    return await connection.fetchrow("SELECT * FROM endpoints")


# ---------------------------------------------------------------------------------------------------- read


async def test_a_delivery_shows_its_state_and_attempts(api, app_connection, acme, number, put):
    leader = uuid4()
    called = await put(5, "delivered", coalesced_into=leader)
    for n, answer, error in ((2, 204, None), (1, 500, "the endpoint answered 500")):
        await app_connection.execute(
            "INSERT INTO delivery_attempts VALUES ($1, $2, $3, $4, $5, $6, $7)",
            acme.id, UUID(called[4:]), n, AT + timedelta(seconds=n), 10 * n, answer, error,
        )  # fmt: skip
    status, found, _ = await api.get(f"/subscriptions/{number}/deliveries/{called}")
    assert status == 200
    assert found == {
        "id": called,
        "type": "incident.opened",
        "position": 5,
        "subject_kind": "incident",
        "subject_id": 7,
        "state": "delivered",
        "created_at": "2026-06-01T02:00:00Z",
        "next_attempt_at": None,
        "attempts": [
            {
                "number": 1,
                "attempted_at": "2026-06-01T02:00:01Z",
                "duration_ms": 10,
                "response_status": 500,
                "error": "the endpoint answered 500",
            },
            {
                "number": 2,
                "attempted_at": "2026-06-01T02:00:02Z",
                "duration_ms": 20,
                "response_status": 204,
                "error": None,
            },
        ],
        "finalized_at": "2026-06-01T02:00:09Z",
        "coalesced_into": message(leader),
    }
    assert set(found) == SHOWN
    assert (await api.get(f"/subscriptions/{number}/deliveries"))[1]["deliveries"] == [found]


async def test_pages_go_from_the_newest_to_the_oldest(api, put, number):
    called = [await put(position) for position in (1, 2, 3, 3, 3, 4)]
    newest = [called[5], *sorted(called[2:5]), called[1], called[0]]
    path = f"/subscriptions/{number}/deliveries"
    _, whole, headers = await api.get(path)
    assert [item["id"] for item in whole["deliveries"]] == newest
    assert (whole["limit"], whole["next"], "Link" in headers) == (50, None, False)
    found, following = [], f"{path}?limit=2"
    while following:
        _, some, headers = await api.get(following)
        found += [item["id"] for item in some["deliveries"]]
        following = some["next"] and f"{path}?limit=2&before={some['next']}"
        assert ("Link" in headers) == bool(following)
        await put(9)  # new deliveries do not shift later pages
    assert found == newest


async def test_pages_are_filtered_by_state(api, put, number):
    called = {state: await put(position, state) for position, state in enumerate(("pending", "delivered", "exhausted"))}
    path = f"/subscriptions/{number}/deliveries"
    for state, one in called.items():
        _, page, _ = await api.get(f"{path}?state={state}")
        assert [item["id"] for item in page["deliveries"]] == [one]
    assert (await api.get(f"{path}?state=cancelled"))[1]["deliveries"] == []
    assert (await api.get(f"{path}?state=sent"))[1]["error"].startswith("state: must be one of pending, ")


@pytest.mark.parametrize("before", ["", "x", "msg_", "msg_1", "5", f"msg_{1:032x}", f"MSG_{1:032X}", f"{1:032x}"])
async def test_an_unknown_before_is_refused(api, put, number, before):
    await put(1)
    status, answer, _ = await api.get(f"/subscriptions/{number}/deliveries?before={before}")
    assert (status, answer["error"].split(":")[0]) == (400, "before")


async def test_an_unchanged_page_answers_304(api, put, number):
    called = await put(1)
    for path in (f"/subscriptions/{number}/deliveries", f"/subscriptions/{number}/deliveries/{called}"):
        _, _, headers = await api.get(path)
        assert int(headers["Opsentry-Position"]) > 0
        assert (await api.get(path, headers={"If-None-Match": headers["ETag"]}))[0] == 304


async def test_missing_malformed_and_others_deliveries_are_the_same_404(api, other_api, app_connection, put, number):
    called = await put(1)
    _, second, _ = await api.post("/subscriptions", HOOK)
    await app_connection.execute(
        "INSERT INTO deliveries SELECT 999, intent_id, subscription_id, stream_kind, stream_id,"
        " position, channel, topic, created_at, state, next_attempt_at, last_position, coalesced_into,"
        " attempts_in_round, attempts_total, response_status, error, finalized_at FROM deliveries"
    )
    for method, more in (("GET", ""), ("POST", "/redeliver")):
        for bad in ("1", "x", called[4:], called.upper(), f"{called}0", called[:-1], f"msg_{1:032x}", "%00", "msg_%ff"):
            assert await raw(api, method, f"/subscriptions/{number}/deliveries/{bad}{more}") == NOT_FOUND, bad
        assert await raw(api, method, f"/subscriptions/{second['id']}/deliveries/{called}{more}") == NOT_FOUND
        assert await raw(other_api, method, f"/subscriptions/{number}/deliveries/{called}{more}") == NOT_FOUND
        assert await raw(api, method, f"/subscriptions/0/deliveries/{called}{more}") == NOT_FOUND
    (theirs,) = await app_connection.fetch("SELECT state FROM deliveries WHERE tenant_id = 999")
    assert theirs["state"] == "delivered"
    assert (await endpoint(app_connection))["available_at"] is None


# ---------------------------------------------------------------------------------------------------- redeliver


@pytest.mark.parametrize("state", ["delivered", "suppressed", "withheld", "exhausted", "cancelled", "disabled"])
async def test_a_final_delivery_is_redelivered(api, app_connection, put, number, state):
    called = await put(
        5, state, attempts_in_round=4, attempts_total=9, response_status=500, error="the endpoint answered 500"
    )
    path = f"/subscriptions/{number}/deliveries/{called}"
    status, found, _ = await api.post(f"{path}/redeliver")
    assert (status, found["state"], found["finalized_at"]) == (202, "pending", None)
    assert datetime.fromisoformat(found["next_attempt_at"]) <= datetime.now(UTC)
    assert (await api.get(path))[1] == found
    row = await row_of(app_connection, called)
    assert (row["attempts_in_round"], row["attempts_total"], row["response_status"], row["error"]) == (0, 9, None, None)
    assert abs((await endpoint(app_connection))["available_at"] - row["next_attempt_at"]) < timedelta(seconds=1)
    assert (await api.post(f"{path}/redeliver"))[:2] == (202, found)


async def test_redelivering_a_pending_delivery_changes_nothing(api, app_connection, put, number):
    called = await put(5, "pending", attempts_in_round=3, next_attempt_at=datetime(2036, 1, 1, tzinfo=UTC))
    status, found, _ = await api.post(f"/subscriptions/{number}/deliveries/{called}/redeliver")
    assert (status, found["next_attempt_at"]) == (202, "2036-01-01T00:00:00Z")
    assert (await row_of(app_connection, called))["attempts_in_round"] == 3
    assert (await endpoint(app_connection))["available_at"] is None


async def test_a_coalesced_delivery_is_not_redelivered(api, app_connection, put, number):
    leader = uuid4()
    called = await put(5, "coalesced", coalesced_into=leader)
    status, answer, _ = await api.post(f"/subscriptions/{number}/deliveries/{called}/redeliver")
    assert (status, answer) == (409, {"error": f"message {message(leader)} carried it: send that one again"})
    assert (await row_of(app_connection, called))["state"] == "coalesced"


async def test_a_disabled_subscription_gets_no_redelivery(api, parts, acme, app_connection, put, number):
    called = await put(5)
    command = DisableSubscription(reason="endpoint_gone")
    executed = await commands.change(parts, subscription.DECIDER, acme.id, number, command, META)
    await parts.projector.catch_up(acme.id, executed.position)
    status, answer, _ = await api.post(f"/subscriptions/{number}/deliveries/{called}/redeliver")
    assert status == 409
    assert answer["error"] == "only an active subscription receives messages; this one is disabled"
    assert (await row_of(app_connection, called))["state"] == "delivered"


async def test_a_redelivery_waits_behind_an_older_one_of_its_ordering_key(api, put, number):
    await put(4, "pending")
    await put(3, "pending", stream_id=8)
    behind, free = await put(5, "exhausted"), await put(2, "exhausted", stream_id=8)
    path = f"/subscriptions/{number}/deliveries"
    assert (await api.post(f"{path}/{behind}/redeliver"))[1]["next_attempt_at"] is None
    assert (await api.post(f"{path}/{free}/redeliver"))[1]["next_attempt_at"] is not None


@pytest.mark.parametrize(
    ("available_at", "leased", "moves"),
    [
        (None, False, True),
        (datetime(2036, 1, 1, tzinfo=UTC), False, True),
        (datetime(2020, 1, 1, tzinfo=UTC), False, False),
        (datetime(2036, 1, 1, tzinfo=UTC), True, False),
    ],
)
async def test_a_redelivery_makes_an_unleased_endpoint_available(
    api, app_connection, acme, put, number, available_at, leased, moves
):
    called = await put(5)
    await app_connection.execute(
        "UPDATE endpoints SET available_at = $3, lease = $4, consecutive_failures = 3"
        " WHERE tenant_id = $1 AND subscription_id = $2",
        acme.id, number, available_at, uuid4() if leased else None,
    )  # fmt: skip
    await api.post(f"/subscriptions/{number}/deliveries/{called}/redeliver")
    found = await endpoint(app_connection)
    if moves:
        assert abs(found["available_at"] - (await row_of(app_connection, called))["next_attempt_at"]) < timedelta(
            seconds=1
        )
    else:
        assert found["available_at"] == available_at
    assert found["consecutive_failures"] == 3


@pytest.mark.parametrize(
    ("change", "resets"),
    [
        ({"target": "https://example.com/mended"}, True),
        ({"notify_incidents": False}, False),
        ({"enabled": True}, False),
    ],
)
async def test_a_new_target_resets_the_health_of_the_endpoint(api, app_connection, acme, number, change, resets):
    await app_connection.execute(
        "INSERT INTO endpoints (tenant_id, subscription_id, channel, available_at, consecutive_failures, failing_since)"
        " VALUES ($1, $2, 'webhook', now() + interval '5 minutes', 12, now() - interval '2 days')",
        acme.id, number,
    )  # fmt: skip
    assert (await api.patch(f"/subscriptions/{number}", change))[0] == 200
    found = await endpoint(app_connection)
    assert (found["consecutive_failures"], found["failing_since"] is None) == ((0, True) if resets else (12, False))
    assert (found["available_at"] <= datetime.now(UTC)) == resets

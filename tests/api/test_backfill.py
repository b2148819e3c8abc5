"""Check commands with a time in the past: their answers, their limits and their notifications."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from opsentry.application.pipeline import CLOCK_SKEW, NEWS_MAX_AGE
from opsentry.domain import subscription
from opsentry.domain.subscription import CreateSubscription
from tests import commands
from tests.api.conftest import HOUR, ago, head, refused
from tests.conftest import META

MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)

# The commands that accept a time in the past.
COMMANDS: tuple[tuple[str, dict[str, str]], ...] = (
    ("/incidents", {"title": "Told"}),
    ("/incidents/{incident}/updates", {"message": "M"}),
    ("/incidents/{incident}/resolve", {}),
)
NO_MOMENTS: tuple[Any, ...] = (
    "2026-06-01T02:00:00",
    "2026-06-01",
    "yesterday",
    "",
    "2026-02-30T00:00:00Z",
    "2026-06-01T25:00:00Z",
    "0001-01-01T00:00:00+14:00",
    "0001-01-01T00:00:00Z",
    "-0001-01-01T00:00:00Z",
    "10000-01-01T00:00:00Z",
    1780279200,
    1.5,
    True,
    [],
    {},
)

each_command = pytest.mark.parametrize(("path", "body"), COMMANDS)


def moment(text):
    return datetime.fromisoformat(text)


def is_now(text):
    return abs(datetime.now(UTC) - moment(text)) < MINUTE


# ---------------------------------------------------------------------------------------------------- where it shows


async def test_an_incident_of_the_past_occurred_then_and_was_created_now(api):
    then = ago(5 * HOUR)
    status, incident, _ = await api.post("/incidents", {"title": "A", "description": "B", "occurred_at": then})
    assert (status, incident["occurred_at"]) == (201, then)
    assert is_now(incident["created_at"])
    assert is_now(incident["updated_at"])
    assert [update["created_at"] for update in incident["updates"]] == [then]
    assert (await api.get(f"/incidents/{incident['id']}"))[1] == incident
    assert (await api.get("/incidents"))[1]["incidents"][0]["occurred_at"] == then


async def test_an_update_of_the_past_stands_in_the_timeline_at_its_time(api, past_incident):
    then = ago(5 * HOUR)
    status, incident, _ = await api.post(
        f"{past_incident}/updates", {"message": "M", "status": "identified", "occurred_at": then}
    )
    assert (status, incident["status"]) == (201, "identified")
    assert incident["updates"][-1]["created_at"] == then
    assert is_now(incident["updated_at"])
    assert (await api.get(past_incident))[1] == incident


async def test_a_resolution_of_the_past_is_of_then(api, past_incident):
    then = ago(5 * HOUR)
    status, incident, _ = await api.post(f"{past_incident}/resolve", {"root_cause": "DNS", "occurred_at": then})
    assert (status, incident["status"], incident["resolved_at"]) == (200, "resolved", then)
    assert is_now(incident["updated_at"])
    assert (await api.get(past_incident))[1] == incident


async def test_an_update_that_resolves_does_so_when_it_happened(api, past_incident):
    then = ago(5 * HOUR)
    body = {"message": "Over", "status": "resolved", "occurred_at": then}
    _, incident, _ = await api.post(f"{past_incident}/updates", body)
    assert (incident["resolved_at"], incident["updates"][-1]["created_at"]) == (then, then)
    assert (await api.get(past_incident))[1] == incident


async def test_the_ledger_knows_both_times(api, parts, acme, past_incident):
    async with parts.database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT occurred_at, recorded_at FROM events WHERE tenant_id = $1 AND stream_kind = 'incident'", acme.id
        )
    _, incident, _ = await api.get(past_incident)
    assert row["occurred_at"] == moment(incident["occurred_at"])
    assert row["recorded_at"] == moment(incident["created_at"])
    assert 10 * HOUR <= row["recorded_at"] - row["occurred_at"] < 10 * HOUR + MINUTE


@pytest.mark.parametrize(
    ("given", "answered"),
    [
        ("2026-01-31T23:30:00-01:00", "2026-02-01T00:30:00Z"),
        ("2026-02-01T02:00:00+05:30", "2026-01-31T20:30:00Z"),
        ("2026-02-01T00:30:00.000001Z", "2026-02-01T00:30:00.000001Z"),
        ("2024-02-29T12:00:00Z", "2024-02-29T12:00:00Z"),
        ("1969-12-31T23:59:59.999999Z", "1969-12-31T23:59:59.999999Z"),
        ("0001-01-01T00:00:00.000001Z", "0001-01-01T00:00:00.000001Z"),
    ],
)
async def test_a_moment_of_any_offset_is_kept_exactly_and_answered_in_utc(api, given, answered):
    status, incident, _ = await api.post("/incidents", {"title": "A", "occurred_at": given})
    assert (status, incident["occurred_at"]) == (201, answered)
    assert (await api.get(f"/incidents/{incident['id']}"))[1] == incident


@each_command
async def test_null_is_now(api, path, body):
    _, before, _ = await api.post("/incidents", {"title": "A"})
    status, incident, _ = await api.post(path.format(incident=before["id"]), {**body, "occurred_at": None})
    assert status in {200, 201}
    assert incident["occurred_at"] == incident["created_at"]
    assert incident["resolved_at"] in {None, incident["updated_at"]}
    assert [update["created_at"] for update in incident["updates"]] in ([], [incident["updated_at"]])


# ---------------------------------------------------------------------------------------------------- refused


@each_command
@pytest.mark.parametrize("ahead", [CLOCK_SKEW + 2 * SECOND, HOUR, timedelta(days=365_000)])
async def test_a_time_in_the_future_is_refused(api, parts, acme, path, body, ahead):
    _, incident, _ = await api.post("/incidents", {"title": "A"})
    before = await head(parts, acme.id)
    sent = {**body, "occurred_at": ago(-ahead)}
    status, answer, _ = await api.post(path.format(incident=incident["id"]), sent)
    assert (status, answer) == (400, refused("occurred_at: must not be in the future"))
    assert await head(parts, acme.id) == before


@each_command
async def test_a_clock_that_is_a_little_fast_means_now(api, path, body):
    _, before, _ = await api.post("/incidents", {"title": "A"})
    sent = {**body, "occurred_at": ago(-CLOCK_SKEW + SECOND)}
    status, incident, _ = await api.post(path.format(incident=before["id"]), sent)
    assert status in {200, 201}
    assert incident["occurred_at"] == incident["created_at"]
    assert incident["resolved_at"] in {None, incident["updated_at"]}
    assert [update["created_at"] for update in incident["updates"]] in ([], [incident["updated_at"]])
    assert moment(incident["updated_at"]) <= datetime.now(UTC)


@each_command
async def test_an_invalid_time_is_refused(api, parts, acme, path, body):
    _, incident, _ = await api.post("/incidents", {"title": "A"})
    before = await head(parts, acme.id)
    for bad in NO_MOMENTS:
        status, answer, _ = await api.post(path.format(incident=incident["id"]), {**body, "occurred_at": bad})
        assert (bad, status, answer) == (bad, 400, refused(answer["error"]))
        assert answer["error"].startswith("occurred_at: ")
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize(("path", "body"), COMMANDS[1:])
async def test_a_change_cannot_precede_its_incident(api, parts, acme, path, body):
    began = ago(5 * HOUR)
    _, incident, _ = await api.post("/incidents", {"title": "A", "occurred_at": began})
    path, before = path.format(incident=incident["id"]), await head(parts, acme.id)
    earlier = (moment(began) - timedelta(microseconds=1)).isoformat()
    status, answer, _ = await api.post(path, {**body, "occurred_at": earlier})
    assert (status, answer["error"].split(",")[0]) == (400, f"occurred_at: must not be before {began}")
    assert await head(parts, acme.id) == before
    assert (await api.post(path, {**body, "occurred_at": began}))[0] in {200, 201}


async def test_an_update_cannot_precede_the_latest_change(api, parts, acme, past_incident):
    _, incident, _ = await api.patch(past_incident, {"severity": "critical"})
    before = await head(parts, acme.id)
    status, answer, _ = await api.post(f"{past_incident}/updates", {"message": "M", "occurred_at": ago(HOUR)})
    assert status == 400
    assert answer["error"].startswith(f"occurred_at: must not be before {incident['updated_at']}")
    assert await head(parts, acme.id) == before


async def test_a_timeline_is_backfilled_in_order(api, past_incident):
    moments = [ago(n * HOUR) for n in (9, 8, 8, 7)]
    for n, then in enumerate(moments):
        assert (await api.post(f"{past_incident}/updates", {"message": f"m{n}", "occurred_at": then}))[0] == 201
    assert (await api.post(f"{past_incident}/resolve", {"occurred_at": ago(6 * HOUR)}))[0] == 200
    _, incident, _ = await api.get(past_incident)
    assert [u["message"] for u in incident["updates"]] == ["m0", "m1", "m2", "m3"]
    assert sorted(u["created_at"] for u in incident["updates"]) == [u["created_at"] for u in incident["updates"]]
    _, reopened, _ = await api.patch(past_incident, {"status": "investigating"})
    assert (reopened["status"], reopened["resolved_at"]) == ("investigating", None)


async def test_a_repeat_of_an_old_update_is_answered_although_later_ones_followed(api, parts, acme, past_incident):
    update = {"message": "M", "occurred_at": ago(5 * HOUR)}
    headers = {"Idempotency-Key": "k"}
    _, first, _ = await api.post(f"{past_incident}/updates", update, headers=headers)
    await api.post(f"{past_incident}/updates", {"message": "Later"})
    before = await head(parts, acme.id)
    status, again, told = await api.post(f"{past_incident}/updates", update, headers=headers)
    assert (status, again, told["Idempotency-Replayed"]) == (201, first, "true")
    assert (await api.post(f"{past_incident}/updates", update))[0] == 400
    assert await head(parts, acme.id) == before


async def test_twenty_updates_of_the_past_at_once_leave_a_timeline_in_order(api, past_incident):
    moments = [ago(n * MINUTE) for n in range(20, 40)]
    await asyncio.gather(*(api.post(f"{past_incident}/updates", {"message": "M", "occurred_at": m}) for m in moments))
    _, incident, _ = await api.get(past_incident)
    told = [moment(update["created_at"]) for update in incident["updates"]]
    assert told
    assert told == sorted(told)


# ---------------------------------------------------------------------------------------------------- news


@pytest.fixture
async def intents(parts, acme):
    """Subscribe a webhook and lend a function that counts the intents of the tenant."""
    command = CreateSubscription(channel="webhook", target="x")
    await commands.create(parts, subscription.DECIDER, acme.id, command, META)

    async def count():
        await parts.projector.catch_up(acme.id, 0)
        async with parts.database.connection() as connection:
            return await connection.fetchval("SELECT count(*) FROM outbox_intents WHERE tenant_id = $1", acme.id)

    return count


@each_command
@pytest.mark.parametrize(
    ("length", "told"),
    [(None, 1), (SECOND, 1), (NEWS_MAX_AGE - 20 * SECOND, 1), (NEWS_MAX_AGE + 5 * SECOND, 0), (HOUR, 0), (-SECOND, 1)],
)
async def test_only_recent_changes_notify_subscribers(api, intents, path, body, length, told):
    _, incident, _ = await api.post("/incidents", {"title": "A", "occurred_at": ago(2 * HOUR)})
    assert await intents() == 0
    sent = body if length is None else {**body, "occurred_at": ago(length)}
    assert (await api.post(path.format(incident=incident["id"]), sent))[0] in {200, 201}
    assert await intents() == told


async def test_recent_changes_of_an_old_incident_notify_subscribers(api, past_incident, intents):
    await api.post(f"{past_incident}/updates", {"message": "M", "occurred_at": ago(HOUR)})
    assert await intents() == 0
    await api.patch(past_incident, {"severity": "critical"})
    assert await intents() == 1
    await api.post(f"{past_incident}/resolve")
    assert await intents() == 2

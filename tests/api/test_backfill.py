import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from opsentry.application.pipeline import CLOCK_SKEW, NEWS_MAX_AGE
from opsentry.domain import subscription
from opsentry.domain.subscription import CreateSubscription
from tests import commands
from tests.api.conftest import head, refused
from tests.conftest import META, make_service

HOUR = timedelta(hours=1)
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


def said(at):
    """A moment as the API answers it."""
    return at.isoformat().replace("+00:00", "Z")


def ago(length):
    """The moment `length` ago, as the API answers it."""
    return said(datetime.now(UTC) - length)


def moment(text):
    return datetime.fromisoformat(text)


def is_now(text):
    return abs(datetime.now(UTC) - moment(text)) < MINUTE


@pytest.fixture
async def path(api):
    """An incident that began ten hours ago."""
    _, incident, _ = await api.post("/incidents", {"title": "A", "occurred_at": ago(10 * HOUR)})
    return f"/incidents/{incident['id']}"


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


async def test_an_update_of_the_past_stands_in_the_timeline_at_its_time(api, path):
    then = ago(5 * HOUR)
    status, incident, _ = await api.post(
        f"{path}/updates", {"message": "M", "status": "identified", "occurred_at": then}
    )
    assert (status, incident["status"]) == (201, "identified")
    assert incident["updates"][-1]["created_at"] == then
    assert is_now(incident["updated_at"])
    assert (await api.get(path))[1] == incident


async def test_a_resolution_of_the_past_is_of_then(api, path):
    then = ago(5 * HOUR)
    status, incident, _ = await api.post(f"{path}/resolve", {"root_cause": "DNS", "occurred_at": then})
    assert (status, incident["status"], incident["resolved_at"]) == (200, "resolved", then)
    assert is_now(incident["updated_at"])
    assert (await api.get(path))[1] == incident


async def test_an_update_that_resolves_does_so_when_it_happened(api, path):
    then = ago(5 * HOUR)
    body = {"message": "Over", "status": "resolved", "occurred_at": then}
    _, incident, _ = await api.post(f"{path}/updates", body)
    assert (incident["resolved_at"], incident["updates"][-1]["created_at"]) == (then, then)
    assert (await api.get(path))[1] == incident


async def test_the_ledger_knows_both_times(api, parts, acme, path):
    async with parts.database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT occurred_at, recorded_at FROM events WHERE tenant_id = $1 AND stream_kind = 'incident'", acme.id
        )
    _, incident, _ = await api.get(path)
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


async def test_an_update_cannot_precede_the_latest_change(api, parts, acme, path):
    _, incident, _ = await api.patch(path, {"severity": "critical"})
    before = await head(parts, acme.id)
    status, answer, _ = await api.post(f"{path}/updates", {"message": "M", "occurred_at": ago(HOUR)})
    assert status == 400
    assert answer["error"].startswith(f"occurred_at: must not be before {incident['updated_at']}")
    assert await head(parts, acme.id) == before


async def test_a_timeline_is_backfilled_in_order(api, path):
    moments = [ago(n * HOUR) for n in (9, 8, 8, 7)]
    for n, then in enumerate(moments):
        assert (await api.post(f"{path}/updates", {"message": f"m{n}", "occurred_at": then}))[0] == 201
    assert (await api.post(f"{path}/resolve", {"occurred_at": ago(6 * HOUR)}))[0] == 200
    _, incident, _ = await api.get(path)
    assert [u["message"] for u in incident["updates"]] == ["m0", "m1", "m2", "m3"]
    assert sorted(u["created_at"] for u in incident["updates"]) == [u["created_at"] for u in incident["updates"]]
    _, reopened, _ = await api.patch(path, {"status": "investigating"})
    assert (reopened["status"], reopened["resolved_at"]) == ("investigating", None)


async def test_a_repeat_of_an_old_update_is_answered_although_later_ones_followed(api, parts, acme, path):
    update = {"message": "M", "occurred_at": ago(5 * HOUR)}
    headers = {"Idempotency-Key": "k"}
    _, first, _ = await api.post(f"{path}/updates", update, headers=headers)
    await api.post(f"{path}/updates", {"message": "Later"})
    before = await head(parts, acme.id)
    status, again, told = await api.post(f"{path}/updates", update, headers=headers)
    assert (status, again, told["Idempotency-Replayed"]) == (201, first, "true")
    assert (await api.post(f"{path}/updates", update))[0] == 400
    assert await head(parts, acme.id) == before


async def test_twenty_updates_of_the_past_at_once_leave_a_timeline_in_order(api, path):
    moments = [ago(n * MINUTE) for n in range(20, 40)]
    await asyncio.gather(*(api.post(f"{path}/updates", {"message": "M", "occurred_at": m}) for m in moments))
    _, incident, _ = await api.get(path)
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


async def test_recent_changes_of_an_old_incident_notify_subscribers(api, path, intents):
    await api.post(f"{path}/updates", {"message": "M", "occurred_at": ago(HOUR)})
    assert await intents() == 0
    await api.patch(path, {"severity": "critical"})
    assert await intents() == 1
    await api.post(f"{path}/resolve")
    assert await intents() == 2


# ---------------------------------------------------------------------------------------------------- what follows


@pytest.fixture
async def service_id(parts, acme):
    long_ago = datetime.now(UTC) - timedelta(days=100)
    return await make_service(parts, acme.id, "portal", name="Portal", occurred_at=long_ago)


async def lasted(api, service_id, began, ended):
    """A major outage of the past."""
    body = {"title": "A", "severity": "major_outage", "service_ids": [service_id], "occurred_at": began}
    _, incident, _ = await api.post("/incidents", body)
    assert (await api.post(f"/incidents/{incident['id']}/resolve", {"occurred_at": ended}))[0] == 200


async def test_an_outage_of_the_past_restates_uptime(api, service_id):
    path = f"/services/{service_id}/uptime"
    assert (await api.get(path))[1] == {
        "service_id": service_id, "uptime_24h": 100.0, "uptime_7d": 100.0, "uptime_30d": 100.0
    }  # fmt: skip
    now = datetime.now(UTC)
    await lasted(api, service_id, said(now - 10 * HOUR), said(now - 4 * HOUR))
    # 18 hours of 24 were up, 162 of 168, 714 of 720.
    assert (await api.get(path))[1] == {
        "service_id": service_id, "uptime_24h": 75.0, "uptime_7d": 96.42, "uptime_30d": 99.16
    }  # fmt: skip


async def test_an_outage_that_began_in_the_past_and_lasts_counts_from_then(api, service_id):
    now = datetime.now(UTC)
    body = {"title": "A", "severity": "critical", "service_ids": [service_id], "occurred_at": said(now - 12 * HOUR)}
    _, incident, _ = await api.post("/incidents", body)
    assert (await api.get(f"/services/{service_id}"))[1]["current_status"] == "major_outage"
    assert 49.9 < (await api.get(f"/services/{service_id}/uptime"))[1]["uptime_24h"] < 50.0
    await api.post(f"/incidents/{incident['id']}/resolve", {"occurred_at": said(now - 6 * HOUR)})
    assert (await api.get(f"/services/{service_id}"))[1]["current_status"] == "operational"
    assert (await api.get(f"/services/{service_id}/uptime"))[1]["uptime_24h"] == 75.0


@pytest.mark.parametrize("began", ["1970-01-01T00:00:00Z", "0001-01-01T00:00:00.000001Z"])
async def test_an_outage_since_long_ago_counts_from_where_the_window_begins(api, service_id, began):
    await lasted(api, service_id, began, ago(12 * HOUR))
    status, uptime, _ = await api.get(f"/services/{service_id}/uptime")
    assert status == 200
    # 12 hours of 24 were up, of 168, of 720.
    assert uptime == {"service_id": service_id, "uptime_24h": 50.0, "uptime_7d": 7.14, "uptime_30d": 1.66}


async def test_two_outages_of_the_past_at_once_count_once(api, service_id):
    now = datetime.now(UTC)
    for began, ended in ((10, 6), (8, 4)):
        await lasted(api, service_id, said(now - began * HOUR), said(now - ended * HOUR))
    assert (await api.get(f"/services/{service_id}/uptime"))[1]["uptime_24h"] == 75.0


async def test_lists_are_ordered_by_when_it_happened(api):
    async def listed(path):
        return [incident["title"] for incident in (await api.get(path))[1]["incidents"]]

    same = ago(2 * HOUR)
    for title, then in (("now", None), ("3 h", ago(3 * HOUR)), ("1 h", ago(HOUR)), ("2 h", same), ("2 h too", same)):
        await api.post("/incidents", {"title": title, "occurred_at": then})
    expected = ["now", "1 h", "2 h too", "2 h", "3 h"]
    for path in ("/incidents", "/incidents/active", "/incidents?status=investigating", "/incidents?severity=degraded"):
        assert await listed(path) == expected
    assert [title for n in range(5) for title in await listed(f"/incidents?limit=1&offset={n}")] == expected


async def test_later_changes_leave_an_incident_where_it_was_in_the_list(api, path):
    await api.post("/incidents", {"title": "B", "occurred_at": ago(HOUR)})
    await api.post(f"{path}/updates", {"message": "M"})
    await api.post(f"{path}/resolve")
    assert [incident["title"] for incident in (await api.get("/incidents"))[1]["incidents"]] == ["B", "A"]


async def test_an_as_of_query_lacks_incidents_that_were_backfilled_later(api, path):
    _, _, told = await api.get("/events/head")
    then = told["Opsentry-Position"]
    await api.post("/incidents", {"title": "B", "occurred_at": ago(20 * HOUR)})
    await api.post(f"{path}/resolve", {"occurred_at": ago(9 * HOUR)})
    _, known, _ = await api.get(f"/incidents?as_of={then}")
    assert [(incident["title"], incident["status"]) for incident in known["incidents"]] == [("A", "investigating")]

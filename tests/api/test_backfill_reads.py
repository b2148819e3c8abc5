"""Check that uptime, lists and as-of queries count incidents of the past from the time at which they occurred."""

from datetime import UTC, datetime, timedelta

import pytest

from tests.api.conftest import HOUR, ago, rfc3339
from tests.conftest import make_service


@pytest.fixture
async def service_id(parts, acme):
    long_ago = datetime.now(UTC) - timedelta(days=100)
    return await make_service(parts, acme.id, "portal", name="Portal", occurred_at=long_ago)


async def lasted(api, service_id, began, ended):
    """Record a major outage of the past, with its end."""
    body = {"title": "A", "severity": "major_outage", "service_ids": [service_id], "occurred_at": began}
    _, incident, _ = await api.post("/incidents", body)
    assert (await api.post(f"/incidents/{incident['id']}/resolve", {"occurred_at": ended}))[0] == 200


async def test_an_outage_of_the_past_restates_uptime(api, service_id):
    path = f"/services/{service_id}/uptime"
    assert (await api.get(path))[1] == {
        "service_id": service_id, "uptime_24h": 100.0, "uptime_7d": 100.0, "uptime_30d": 100.0
    }  # fmt: skip
    now = datetime.now(UTC)
    await lasted(api, service_id, rfc3339(now - 10 * HOUR), rfc3339(now - 4 * HOUR))
    # 18 hours of 24 were up, 162 of 168, 714 of 720.
    assert (await api.get(path))[1] == {
        "service_id": service_id, "uptime_24h": 75.0, "uptime_7d": 96.42, "uptime_30d": 99.16
    }  # fmt: skip


async def test_an_outage_that_began_in_the_past_and_lasts_counts_from_then(api, service_id):
    now = datetime.now(UTC)
    body = {"title": "A", "severity": "critical", "service_ids": [service_id], "occurred_at": rfc3339(now - 12 * HOUR)}
    _, incident, _ = await api.post("/incidents", body)
    assert (await api.get(f"/services/{service_id}"))[1]["current_status"] == "major_outage"
    assert 49.9 < (await api.get(f"/services/{service_id}/uptime"))[1]["uptime_24h"] < 50.0
    await api.post(f"/incidents/{incident['id']}/resolve", {"occurred_at": rfc3339(now - 6 * HOUR)})
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
        await lasted(api, service_id, rfc3339(now - began * HOUR), rfc3339(now - ended * HOUR))
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


async def test_later_changes_leave_an_incident_where_it_was_in_the_list(api, past_incident):
    await api.post("/incidents", {"title": "B", "occurred_at": ago(HOUR)})
    await api.post(f"{past_incident}/updates", {"message": "M"})
    await api.post(f"{past_incident}/resolve")
    assert [incident["title"] for incident in (await api.get("/incidents"))[1]["incidents"]] == ["B", "A"]


async def test_an_as_of_query_lacks_incidents_that_were_backfilled_later(api, past_incident):
    _, _, told = await api.get("/events/head")
    then = told["Opsentry-Position"]
    await api.post("/incidents", {"title": "B", "occurred_at": ago(20 * HOUR)})
    await api.post(f"{past_incident}/resolve", {"occurred_at": ago(9 * HOUR)})
    _, known, _ = await api.get(f"/incidents?as_of={then}")
    assert [(incident["title"], incident["status"]) for incident in known["incidents"]] == [("A", "investigating")]

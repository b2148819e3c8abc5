from datetime import UTC, datetime, timedelta

import pytest

from opsentry.domain import incident, maintenance
from opsentry.domain.incident import OpenIncident, ResolveIncident
from opsentry.domain.maintenance import CompleteMaintenance, ScheduleMaintenance, StartMaintenance
from tests import commands
from tests.conftest import META, make_service

SERVICE = {"id", "slug", "name", "current_status", "visibility", "tags", "description", "created_at"}
DAY = timedelta(days=1)


@pytest.fixture
async def api_service(parts, acme):
    long_ago = datetime.now(UTC) - 100 * DAY
    return await make_service(parts, acme.id, "main-api", name="Main API", tags=("prod",), occurred_at=long_ago)


async def lasted(parts, acme, service_id, ago, length, severity):
    """An incident that began `ago` and lasted `length`."""
    began = datetime.now(UTC) - ago
    command = OpenIncident(title="I", severity=severity, service_ids=(service_id,))
    opened = await commands.create(parts, incident.DECIDER, acme.id, command, META, occurred_at=began)
    await commands.change(
        parts, incident.DECIDER, acme.id, opened.stream_id, ResolveIncident(), META, occurred_at=began + length
    )
    await parts.projector.catch_up(acme.id, 0)


async def test_one_service(api, api_service):
    status, service, headers = await api.get(f"/services/{api_service}")
    assert status == 200
    assert set(service) == SERVICE
    assert headers["ETag"] == '"1"'
    assert (service["slug"], service["name"], service["current_status"]) == ("main-api", "Main API", "operational")
    assert service["tags"] == ["prod"]


@pytest.mark.parametrize(
    ("severities", "expected"),
    [
        ([], "operational"),
        (["informational"], "operational"),
        (["degraded"], "degraded_performance"),
        (["partial_outage"], "partial_outage"),
        (["major_outage"], "major_outage"),
        (["critical"], "major_outage"),
        (["partial_outage", "informational", "degraded"], "partial_outage"),
    ],
)
async def test_the_status_is_the_worst_of_open_incidents(api, api_service, severities, expected):
    for severity in severities:
        await api.post("/incidents", {"title": "I", "severity": severity, "service_ids": [api_service]})
    assert (await api.get(f"/services/{api_service}"))[1]["current_status"] == expected
    _, page, _ = await api.get(f"/services?status={expected}")
    assert [s["id"] for s in page["services"]] == [api_service]
    other = "major_outage" if expected != "major_outage" else "operational"
    assert (await api.get(f"/services?status={other}"))[1]["total"] == 0


async def test_under_maintenance_shows_only_where_nothing_is_worse(api, api_service):
    times = {"scheduled_start": "2036-06-01T02:00:00Z", "scheduled_end": "2036-06-01T04:00:00Z"}
    _, window, _ = await api.post("/maintenance", {"title": "W", "service_ids": [api_service], **times})

    async def status():
        return (await api.get(f"/services/{api_service}"))[1]["current_status"]

    assert await status() == "operational"
    await api.post(f"/maintenance/{window['id']}/start")
    assert await status() == "under_maintenance"
    _, opened, _ = await api.post(
        "/incidents", {"title": "I", "severity": "informational", "service_ids": [api_service]}
    )
    assert await status() == "under_maintenance"
    await api.patch(f"/incidents/{opened['id']}", {"severity": "degraded"})
    assert await status() == "degraded_performance"
    await api.post(f"/incidents/{opened['id']}/resolve")
    assert await status() == "under_maintenance"
    await api.post(f"/maintenance/{window['id']}/complete")
    assert await status() == "operational"


async def test_the_list_by_name_with_filters(api, parts, acme):
    for slug, name, visibility in (
        ("b", "Beta", "public"),
        ("a", "Alpha", "internal"),
        ("c", "100%_done\\", "public"),
        ("d", "Éclair", "public"),
    ):
        await make_service(parts, acme.id, slug, name=name, visibility=visibility)

    async def names(query):
        return [s["name"] for s in (await api.get(f"/services{query}"))[1]["services"]]

    assert await names("") == ["100%_done\\", "Alpha", "Beta", "Éclair"]
    assert await names("?visibility=internal") == ["Alpha"]
    assert await names("?search=ALP") == ["Alpha"]
    assert await names("?search=%25") == ["100%_done\\"]
    assert await names("?search=_") == ["100%_done\\"]
    assert await names("?search=%5C") == ["100%_done\\"]
    assert await names("?search=x") == []
    assert await names("?search=") == ["100%_done\\", "Alpha", "Beta", "Éclair"]
    _, page, headers = await api.get("/services?limit=2&offset=1")
    assert ([s["name"] for s in page["services"]], page["total"]) == (["Alpha", "Beta"], 4)
    assert headers["Link"].count("rel=") == 2
    assert (await api.get("/services"))[1]["limit"] == 100
    assert (await api.get("/services?limit=500"))[1]["limit"] == 200


async def test_uptime_of_trailing_windows(api, parts, acme, api_service):
    await lasted(parts, acme, api_service, timedelta(hours=30), timedelta(hours=1), "major_outage")
    await lasted(parts, acme, api_service, 10 * DAY, timedelta(hours=10), "partial_outage")
    await lasted(parts, acme, api_service, timedelta(hours=20), timedelta(hours=5), "degraded")
    status, body, _ = await api.get(f"/services/{api_service}/uptime")
    assert status == 200
    assert body == {"service_id": api_service, "uptime_24h": 100.0, "uptime_7d": 99.4, "uptime_30d": 99.44}


async def test_an_excluded_window_is_cut_from_both_sides(api, parts, acme, api_service):
    now = datetime.now(UTC)
    began = now - timedelta(hours=14)
    command = ScheduleMaintenance(
        title="W",
        scheduled_start=began,
        scheduled_end=began + timedelta(hours=1),
        service_ids=(api_service,),
        exclude_from_sla=True,
    )
    window = await commands.create(parts, maintenance.DECIDER, acme.id, command, META, occurred_at=began - DAY)
    for move, moment in ((StartMaintenance(), began), (CompleteMaintenance(), began + timedelta(hours=12))):
        await commands.change(parts, maintenance.DECIDER, acme.id, window.stream_id, move, META, occurred_at=moment)
    # Six hours of outage, of which three lie in the window; twelve of twenty-four hours are observed.
    await lasted(parts, acme, api_service, timedelta(hours=17), timedelta(hours=6), "major_outage")
    assert (await api.get(f"/services/{api_service}/uptime"))[1]["uptime_24h"] == 75.0


async def test_observed_time_begins_with_the_service(api, parts, acme):
    young = await make_service(parts, acme.id, "young", occurred_at=datetime.now(UTC) - timedelta(hours=2))
    await lasted(parts, acme, young, timedelta(hours=1), timedelta(minutes=30), "major_outage")
    _, body, _ = await api.get(f"/services/{young}/uptime")
    assert {body["uptime_24h"], body["uptime_7d"], body["uptime_30d"]} <= {75.0, 75.01}


async def test_an_outage_that_lasts_counts_up_to_now(api, parts, acme, api_service):
    await api.post("/incidents", {"title": "I", "severity": "critical", "service_ids": [api_service]})
    _, body, _ = await api.get(f"/services/{api_service}/uptime")
    assert 99.0 < body["uptime_24h"] < 100.0

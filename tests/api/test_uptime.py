from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from opsentry.application.uptime import MAX_PERIODS
from opsentry.domain import incident, maintenance, service
from opsentry.domain.incident import ChangeIncident, OpenIncident, ResolveIncident
from opsentry.domain.maintenance import CancelMaintenance, CompleteMaintenance, ScheduleMaintenance, StartMaintenance
from opsentry.domain.service import RetireService
from tests import commands
from tests.api.conftest import raw, refused, rfc3339
from tests.conftest import META, make_service

BEGAN = datetime(2026, 3, 1, tzinfo=UTC)


def at(hours: float) -> datetime:
    return BEGAN + timedelta(hours=hours)


async def outage(parts, tenant_id, start, end, service_ids, severity="major_outage", *changes):
    opened = OpenIncident(title="i", severity=severity, service_ids=tuple(service_ids))
    made = await commands.create(parts, incident.DECIDER, tenant_id, opened, META, occurred_at=at(start))
    for when, change in changes:
        await commands.change(parts, incident.DECIDER, tenant_id, made.stream_id, change, META, occurred_at=at(when)
        )  # fmt: skip
    if end is not None:
        await commands.change(
            parts, incident.DECIDER, tenant_id, made.stream_id, ResolveIncident(), META, occurred_at=at(end)
        )
    await parts.projector.catch_up(tenant_id, 0)
    return made.stream_id


async def window(parts, tenant_id, start, end, service_ids, *, exclude=True):
    hours: dict[str, Any] = {"scheduled_start": at(start), "scheduled_end": at(end)}
    command = ScheduleMaintenance(title="w", **hours, service_ids=tuple(service_ids), exclude_from_sla=exclude)
    made = await commands.create(parts, maintenance.DECIDER, tenant_id, command, META, occurred_at=at(start - 1))
    for when, move in ((start, StartMaintenance()), (end, CompleteMaintenance())):
        await commands.change(parts, maintenance.DECIDER, tenant_id, made.stream_id, move, META, occurred_at=at(when)
        )  # fmt: skip
    await parts.projector.catch_up(tenant_id, 0)
    return made.stream_id


@pytest.fixture
async def web(parts, acme):
    return await make_service(parts, acme.id, "web", occurred_at=at(0))


def between(start: float, end: float) -> str:
    return f"from={rfc3339(at(start))}&to={rfc3339(at(end))}"


async def test_any_window_has_its_percentage_and_its_denominator(api, parts, acme, web):
    await outage(parts, acme.id, 10, 11, [web])
    _, body, headers = await api.get(f"/services/{web}/uptime?{between(0, 100)}")
    assert body == {
        "service_id": web,
        "from": rfc3339(at(0)),
        "to": rfc3339(at(100)),
        "uptime": 99.0,
        "observed_seconds": 360_000.0,
        "downtime_seconds": 3600.0,
    }
    assert (await api.get(f"/services/{web}/uptime?{between(10, 11)}"))[1]["uptime"] == 0.0
    assert (await api.get(f"/services/{web}/uptime?{between(11, 12)}"))[1]["uptime"] == 100.0
    again = await api.get(
        f"/services/{web}/uptime?{between(0, 100)}", headers={"If-None-Match": headers["ETag"]}
    )  # fmt: skip
    assert again[0] == 304


async def test_a_window_explains_itself(api, parts, acme, web):
    change = (14, ChangeIncident(severity="partial_outage"))
    one = await outage(parts, acme.id, 10, 20, [web], "major_outage", change)
    other = await outage(parts, acme.id, 12, 16, [web], "critical")
    cut = await window(parts, acme.id, 18, 22, [web])
    _, body, headers = await api.get(f"/services/{web}/uptime?{between(-10, 90)}&explain=true")
    hour = 3600.0
    assert body["service_since"] == rfc3339(at(0))
    assert body["observed_seconds"] == 86 * hour  # from when the service began, without the window
    assert body["excluded_seconds"] == 4 * hour
    # 10 to 16 in full (twice at once counts once), 16 to 18 three tenths, 18 to 20 is cut
    assert body["downtime_seconds"] == pytest.approx(6.6 * hour)
    assert body["uptime"] == 92.32
    shown = [
        (
            (p["source"]["kind"], p["source"]["id"]), p["level"], p["weight"],
            p["seconds"] / hour, p["excluded_seconds"] / hour,
            p["effective_seconds"] / hour, p["downtime_seconds"] / hour,
        )
        for p in body["periods"]
    ]  # fmt: skip
    assert shown == [
        (("incident", one), "major_outage", 1.0, 4, 0, 2, 2),
        (("incident", other), "critical", 1.0, 4, 0, 4, 4),
        (("incident", one), "partial_outage", 0.3, 6, 2, 2, pytest.approx(0.6)),
        (("maintenance", cut), None, 0.0, 4, 0, 0, 0),
    ]
    assert body["position"] == int(headers["Opsentry-Position"]) == (await api.get("/events/head"))[1]["position"]
    assert sum(p["downtime_seconds"] for p in body["periods"]) == pytest.approx(body["downtime_seconds"])
    assert [p["excluded"] for p in body["periods"]] == [False, False, False, True]


async def test_an_ongoing_outage_has_no_end_and_past_windows_stay_unchanged(api, parts, acme, web):
    await outage(parts, acme.id, 10, None, [web])
    path = f"/services/{web}/uptime?{between(0, 20)}&explain=true"
    _, body, headers = await api.get(path)
    assert (body["uptime"], body["periods"][0]["from"], body["periods"][0]["to"]) == (50.0, rfc3339(at(10)), None)
    assert (await api.get(path, headers={"If-None-Match": headers["ETag"]}))[0] == 304


async def test_a_window_that_names_its_end_alone_begins_thirty_days_before(api, parts, acme, web):
    await outage(parts, acme.id, 10, 20, [web])
    _, body, _ = await api.get(f"/services/{web}/uptime?to={rfc3339(at(40 * 24))}")
    assert (body["from"], body["uptime"]) == (rfc3339(at(10 * 24)), 100.0)
    for path in (f"/services/{web}/uptime", "/uptime"):
        _, body, _ = await api.get(f"{path}?to={rfc3339(at(100))}")
        assert (body["from"], body["observed_seconds"], body["downtime_seconds"]) == (
            rfc3339(at(100 - 30 * 24)), 100 * 3600, 10 * 3600,
        )  # fmt: skip


async def test_the_end_may_be_a_little_ahead_of_the_servers_clock(api, owner, web):
    now = await owner.fetchval("SELECT now()")
    path = f"/services/{web}/uptime?from={rfc3339(at(0))}&to="
    status, body, _ = await api.get(path + rfc3339(now + timedelta(seconds=4)))
    assert status == 200
    assert now < datetime.fromisoformat(body["to"]) < now + timedelta(seconds=4)
    assert (await api.get(path + rfc3339(now + timedelta(minutes=1))))[0] == 400


async def test_an_outage_before_the_service_began_is_not_its_downtime(api, parts, acme):
    late = await make_service(parts, acme.id, "late", occurred_at=at(50))
    source = await outage(parts, acme.id, 10, 60, [late])
    _, body, _ = await api.get(f"/services/{late}/uptime?{between(20, 30)}&explain=true")
    assert (body["uptime"], body["observed_seconds"], body["excluded_seconds"], body["periods"]) == (None, 0, 0, [])
    _, body, _ = await api.get(f"/services/{late}/uptime?{between(0, 100)}&explain=true")
    assert (body["uptime"], body["observed_seconds"]) == (80.0, 50 * 3600)
    assert [(p["source"]["id"], p["from"], p["seconds"]) for p in body["periods"]] == [
        (source, rfc3339(at(10)), 36_000)
    ]


async def test_a_day_before_the_service_began_has_no_bar(api, parts, acme, owner):
    today = (await owner.fetchval("SELECT now()")).replace(hour=0, minute=0, second=0, microsecond=0)
    late = await make_service(parts, acme.id, "late", occurred_at=today - timedelta(days=1))
    await outage(parts, acme.id, (today - timedelta(days=5) - BEGAN) / timedelta(hours=1), None, [late])
    days = (await api.get(f"/services/{late}/uptime/daily?days=4"))[1]["days"]
    assert [(day["uptime"], day["worst"]) for day in days] == [(None, None)] * 2 + [(0.0, "major_outage")] * 2


async def test_a_window_cuts_what_it_really_lasted_and_only_where_it_is_excluded(api, parts, acme, web):
    other = await make_service(parts, acme.id, "other", occurred_at=at(0))
    await outage(parts, acme.id, 10, 30, [web, other])
    planned: dict[str, Any] = {"scheduled_start": at(10), "scheduled_end": at(30)}
    for moves in ([(12, CancelMaintenance())], [(15, StartMaintenance()), (20, CompleteMaintenance())]):
        command = ScheduleMaintenance(title="w", **planned, service_ids=(web,), exclude_from_sla=True)
        made = await commands.create(parts, maintenance.DECIDER, acme.id, command, META, occurred_at=at(0))
        for when, move in moves:
            await commands.change(parts, maintenance.DECIDER, acme.id, made.stream_id, move, META, occurred_at=at(when)
            )  # fmt: skip
    kept = await window(parts, acme.id, 40, 50, [web], exclude=False)
    _, body, _ = await api.get(f"/services/{web}/uptime?{between(0, 105)}&explain=true")
    assert (body["observed_seconds"], body["downtime_seconds"]) == (100 * 3600, 15 * 3600)
    (shown,) = [p for p in body["periods"] if p["source"] == {"kind": "maintenance", "id": kept}]
    assert (shown["level"], shown["excluded"], shown["weight"], shown["seconds"]) == (None, False, 0.0, 36_000)
    _, body, _ = await api.get(f"/services/{other}/uptime?{between(0, 105)}")
    assert (body["observed_seconds"], body["downtime_seconds"]) == (105 * 3600, 20 * 3600)


async def test_a_retired_service_has_no_uptime_and_no_part_in_the_tenants(api, parts, acme, web):
    gone = await make_service(parts, acme.id, "gone", occurred_at=at(0))
    await outage(parts, acme.id, 10, 20, [gone])
    await commands.change(parts, service.DECIDER, acme.id, gone, RetireService(), META)
    await parts.projector.catch_up(acme.id, 0)
    for path in ("uptime", f"uptime?{between(0, 100)}", "uptime/daily"):
        assert await raw(api, "GET", f"/services/{gone}/{path}") == (404, b'{"error":"not found"}')
    _, body, _ = await api.get(f"/uptime?{between(0, 100)}")
    assert ([s["service"]["id"] for s in body["services"]], body["uptime"]) == ([web], 100.0)


async def test_more_periods_than_can_be_reckoned_at_once_are_refused(api, acme, owner, web):
    today = await owner.fetchval("SELECT now()")
    plant = """
        INSERT INTO service_impacts
        SELECT $1, $2, 'incident', n, 1, $3::timestamptz - interval '30 h' - n * interval '1 s', 'infinity', 3, false
        FROM generate_series($4::int, $5::int) n"""
    await owner.execute(plant, acme.id, web, today, 1, MAX_PERIODS)
    assert (await api.get("/uptime"))[0] == 200
    # Each of them is reckoned on each of its days.
    answers = [await api.get(f"/services/{web}/uptime/daily?days=3")]
    await owner.execute(plant, acme.id, web, today, MAX_PERIODS + 1, MAX_PERIODS + 1)
    paths = ("/uptime", f"/services/{web}/uptime", f"/services/{web}/uptime?from=1926-01-01T00:00:00Z&explain=true")
    answers += [await api.get(path) for path in (*paths, f"/services/{web}/uptime/daily?days=1")]
    words = "takes in more than 20000 periods, ask for a shorter time"
    fields = ("days", "from", "from", "from", "days")
    assert [answer[:2] for answer in answers] == [(400, refused(f"{field}: {words}")) for field in fields]
    assert (await api.get(f"/services/{web}/uptime?from={rfc3339(at(0))}&to={rfc3339(at(9))}"))[0] == 200


async def test_a_backdated_change_restates_a_window(api, parts, acme, web):
    path = f"/services/{web}/uptime?{between(0, 100)}"
    assert (await api.get(path))[1]["uptime"] == 100.0
    _, made, _ = await api.post(
        "/incidents",
        {"title": "late", "severity": "critical", "service_ids": [web], "occurred_at": rfc3339(at(0))},
    )
    await api.post(f"/incidents/{made['id']}/resolve", {"occurred_at": rfc3339(at(50))})
    assert (await api.get(path))[1]["uptime"] == 50.0


async def test_services_added_removed_and_reopened(api, parts, acme, web):
    other = await make_service(parts, acme.id, "other", occurred_at=at(0))
    await outage(
        parts, acme.id, 10, 50, [web], "major_outage",
        (20, ChangeIncident(service_ids=(web, other))), (30, ChangeIncident(service_ids=(other,))),
        (40, ResolveIncident()), (45, ChangeIncident(status="investigating")),
    )  # fmt: skip
    assert (await api.get(f"/services/{web}/uptime?{between(0, 100)}"))[1]["downtime_seconds"] == 20 * 3600
    assert (await api.get(f"/services/{other}/uptime?{between(0, 100)}"))[1]["downtime_seconds"] == 25 * 3600


async def test_the_tenant_is_the_mean_weighted_by_time_observed(api, other_api, parts, acme, web):
    young = await make_service(parts, acme.id, "young", occurred_at=at(75))
    await outage(parts, acme.id, 80, 85, [young])
    _, body, _ = await api.get(f"/uptime?{between(0, 100)}")
    assert [(s["service"]["id"], s["uptime"]) for s in body["services"]] == [(web, 100.0), (young, 80.0)]
    assert (body["uptime"], body["observed_seconds"]) == (96.0, 125 * 3600)
    _, trailing, _ = await api.get("/uptime")
    assert {s["service"]["slug"] for s in trailing["services"]} == {"web", "young"}
    assert set(trailing) == {"uptime_24h", "uptime_7d", "uptime_30d", "services"}
    _, empty, _ = await other_api.get("/uptime")
    assert empty == {"uptime_24h": 100.0, "uptime_7d": 100.0, "uptime_30d": 100.0, "services": []}
    assert (await other_api.get(f"/uptime?{between(0, 100)}"))[1]["uptime"] is None


async def test_bars_of_days_are_windows_of_a_day(api, parts, acme, owner):
    now = await owner.fetchval("SELECT now()")
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    service = await make_service(parts, acme.id, "web", occurred_at=today - timedelta(days=3, hours=12))
    begin = (today - timedelta(days=2, hours=6) - BEGAN) / timedelta(hours=1)
    await outage(parts, acme.id, begin, begin + 12, [service], "partial_outage")
    _, body, _ = await api.get(f"/services/{service}/uptime/daily?days=6")
    days = body["days"]
    assert [day["date"] for day in days] == [(today - timedelta(days=5 - n)).date().isoformat() for n in range(6)]
    assert [day["uptime"] for day in days] == [None, 100.0, 92.5, 92.5, 100.0, 100.0]
    assert [day["observed_seconds"] / 3600 for day in days[:5]] == [0, 12, 24, 24, 24]
    assert [day["worst"] for day in days] == [None, None, "partial_outage", "partial_outage", None, None]
    assert len((await api.get(f"/services/{service}/uptime/daily"))[1]["days"]) == 90
    for day in days[:-1]:
        begin = datetime.fromisoformat(day["date"]).replace(tzinfo=UTC)
        _, body, _ = await api.get(
            f"/services/{service}/uptime?from={rfc3339(begin)}&to={rfc3339(begin + timedelta(days=1))}"
        )  # fmt: skip
        names = ("uptime", "observed_seconds", "downtime_seconds")
        assert [body[name] for name in names] == [day[name] for name in names]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("from=yesterday", "from: must be an RFC 3339 timestamp"),
        ("to=2026-01-01T00:00:00", "to: must be an RFC 3339 timestamp"),
        ("to=2999-01-01T00:00:00Z", "to: must not be in the future"),
        ("from=2999-01-01T00:00:00Z", "from: must be before to"),
        ("from=2026-01-02T00:00:00Z&to=2026-01-02T00:00:00Z", "to: must be after from"),
        ("from=2026-01-02T00:00:00%2B02:00&to=2026-01-01T22:00:00Z", "to: must be after from"),
        ("explain=yes", "explain: must be one of true, false"),
        ("explain=", "explain: must be one of true, false"),
        ("to=0001-01-05T00:00:00Z", "to: is out of range"),
        ("from=0001-01-01T00:00:00%2B14:00", "from: is out of range"),
        ("from=", "from: must be an RFC 3339 timestamp"),
        ("as_of=1", "as_of: unknown parameter"),
    ],
)
async def test_windows_that_are_none_are_refused(api, web, query, says):
    for path in (f"/services/{web}/uptime", "/uptime"):
        status, body, _ = await api.get(f"{path}?{query}")
        named = "explain: unknown parameter" if path == "/uptime" and "explain" in query else says
        assert (status, body["error"][: len(named)]) == (400, named)


async def test_bars_of_days_have_no_window(api, web):
    for query in ("from=2026-01-01T00:00:00Z", "to=2026-01-01T00:00:00Z", "explain=true", "as_of=1"):
        status, body, _ = await api.get(f"/services/{web}/uptime/daily?{query}")
        assert (status, body) == (400, refused(f"{query.split('=')[0]}: unknown parameter"))


@pytest.mark.parametrize("days", ["0", "367", "x", "-1", "", "1.5", "9" * 30])
async def test_days_that_are_none_are_refused(api, web, days):
    status, body, _ = await api.get(f"/services/{web}/uptime/daily?days={days}")
    assert (status, body["error"].split(":")[0]) == (400, "days")


async def test_a_leap_day_and_a_change_of_clocks_are_as_long_as_they_are(api, parts, acme):
    service = await make_service(parts, acme.id, "old", occurred_at=datetime(2023, 1, 1, tzinfo=UTC))
    for query, hours in (
        ("from=2024-02-28T00:00:00Z&to=2024-03-01T00:00:00Z", 48),
        ("from=2023-02-28T00:00:00Z&to=2023-03-01T00:00:00Z", 24),
        # midnight to midnight in Berlin, when clocks go forward and back
        ("from=2025-03-30T00:00:00%2B01:00&to=2025-03-31T00:00:00%2B02:00", 23),
        ("from=2025-10-26T00:00:00%2B02:00&to=2025-10-27T00:00:00%2B01:00", 25),
    ):
        assert (await api.get(f"/services/{service}/uptime?{query}"))[1]["observed_seconds"] == hours * 3600


@pytest.mark.parametrize(
    ("start", "end", "down", "up", "uptime"),
    [
        # Berlin's days of 23 and 25 hours, each with one hour of downtime across the change
        ("2025-03-30T00:00+01:00", "2025-03-31T00:00+02:00", "2025-03-30T01:30+01:00", "2025-03-30T03:30+02:00", 95.65),
        ("2025-10-26T00:00+02:00", "2025-10-27T00:00+01:00", "2025-10-26T02:30+02:00", "2025-10-26T02:30+01:00", 96.0),
        # the same two days of February with a day between them, and without
        ("2024-02-28T00:00+00:00", "2024-03-02T00:00+00:00", "2024-02-29T00:00+00:00", "2024-03-01T00:00+00:00", 66.66),
        ("2023-02-28T00:00+00:00", "2023-03-02T00:00+00:00", "2023-02-28T12:00+00:00", "2023-03-01T12:00+00:00", 50.0),
    ],
)
async def test_downtime_across_a_change_of_clocks_or_a_leap_day(api, parts, acme, start, end, down, up, uptime):
    old = await make_service(parts, acme.id, "old", occurred_at=datetime(2022, 1, 1, tzinfo=UTC))
    hours = [(datetime.fromisoformat(moment) - BEGAN) / timedelta(hours=1) for moment in (down, up)]
    await outage(parts, acme.id, *hours, [old])
    query = "&".join(f"{name}={moment[:16]}:00%2B{moment[17:]}" for name, moment in (("from", start), ("to", end)))
    assert (await api.get(f"/services/{old}/uptime?{query}"))[1]["uptime"] == uptime


async def test_uptime_of_what_is_not_there_is_the_same_404(api, other_api, web):
    for path in ("uptime", "uptime/daily", "uptime?explain=true"):
        for client, number in ((api, 987654), (other_api, web), (api, "x")):
            assert await raw(client, "GET", f"/services/{number}/{path}") == (404, b'{"error":"not found"}')

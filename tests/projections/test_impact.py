from datetime import UTC, datetime, timedelta

import pytest

from opsentry.domain.incident import ChangeIncident, OpenIncident, ResolveIncident
from opsentry.domain.maintenance import CancelMaintenance, CompleteMaintenance, StartMaintenance
from opsentry.domain.service import RegisterService, RetireService
from opsentry.domain.uptime import LEVELS, Period, uptime
from opsentry.projections import impact
from opsentry.projections.impact import Impact
from opsentry.projections.services import Services
from tests.projections.histories import apply, at, schedule

CRITICAL, DEGRADED = LEVELS["critical"], LEVELS["degraded"]
LONG = 100_000
MANY = 1000


@pytest.fixture(params=["at once", "one by one"])
async def periods(request, app_connection, history):
    async def project(service_id=1):
        if ("service", service_id) not in history.states:
            history.service(service_id, RegisterService(slug="web", name="Web"), when=at(-24))
        batches = [history.events] if request.param == "at once" else [[event] for event in history.events]
        for events in batches:
            for projection in (Services(), Impact()):
                await apply(app_connection, projection, events)
        row = await impact.select_service_impacts(app_connection, history.tenant_id, service_id, None, None, LONG, MANY)
        found = [period for service in impact.impacted_services(row) for period in service.periods]
        for period, end in zip(found, row["ended_ats"] or (), strict=True):
            assert end is not None or period.end == row["now"]
        lasting = [end is None for end in row["ended_ats"] or ()]
        return [
            (
                (p.start - at(0)).total_seconds() / 3600,
                None if lasts else (p.end - at(0)).total_seconds() / 3600,
                *p[2:4],
            )
            for p, lasts in zip(found, lasting, strict=True)
        ]

    return project


async def test_an_incident_affects_its_services_from_opening_to_resolution(periods, history):
    history.incident(1, OpenIncident(title="i", severity="critical", service_ids=(1, 2)), when=at(1))
    history.incident(1, ChangeIncident(status="monitoring", title="j"), when=at(2))
    history.incident(1, ResolveIncident(), when=at(3))
    assert await periods(1) == await periods(2) == [(1, 3, CRITICAL, False)]
    assert await periods(3) == []


async def test_the_impact_of_an_open_incident_is_ongoing(periods, history):
    history.incident(1, OpenIncident(title="i", severity="critical", service_ids=(1,)), when=at(1))
    assert await periods() == [(1, None, CRITICAL, False)]


async def test_a_change_of_severity_starts_another_impact(periods, history):
    history.incident(1, OpenIncident(title="i", severity="degraded", service_ids=(1,)), when=at(1))
    history.incident(1, ChangeIncident(severity="critical"), when=at(2))
    history.incident(1, ChangeIncident(severity="degraded"), when=at(3))
    history.incident(1, ResolveIncident(), when=at(4))
    history.incident(1, ChangeIncident(severity="critical"), when=at(5))
    assert await periods() == [(1, 2, DEGRADED, False), (2, 3, CRITICAL, False), (3, 4, DEGRADED, False)]


async def test_impacts_follow_the_services_of_an_incident(periods, history):
    history.incident(1, OpenIncident(title="i", severity="critical", service_ids=(1,)), when=at(1))
    history.incident(1, ChangeIncident(service_ids=(1, 2)), when=at(2))
    history.incident(1, ChangeIncident(service_ids=(2,)), when=at(3))
    history.incident(1, ChangeIncident(service_ids=(1, 2)), when=at(4))
    history.incident(1, ResolveIncident(), when=at(5))
    assert await periods(1) == [(1, 3, CRITICAL, False), (4, 5, CRITICAL, False)]
    assert await periods(2) == [(2, 5, CRITICAL, False)]


async def test_a_reopened_incident_starts_another_impact(periods, history):
    history.incident(1, OpenIncident(title="i", severity="critical", service_ids=(1,)), when=at(1))
    history.incident(1, ResolveIncident(), when=at(2))
    history.incident(1, ChangeIncident(service_ids=(1, 2)), when=at(3))
    history.incident(1, ChangeIncident(status="investigating"), when=at(4))
    assert await periods(1) == [(1, 2, CRITICAL, False), (4, None, CRITICAL, False)]
    assert await periods(2) == [(4, None, CRITICAL, False)]


@pytest.mark.parametrize("excluded", [False, True])
async def test_a_window_affects_services_while_it_is_active(periods, history, excluded):
    for number in (1, 2, 3):
        history.window(number, schedule(service_ids=(1,), exclude_from_sla=excluded), when=at(1))
    history.window(1, StartMaintenance(), when=at(10))
    history.window(1, CompleteMaintenance(), when=at(12))
    history.window(2, CancelMaintenance(), when=at(5))
    history.window(3, StartMaintenance(), when=at(13))
    assert await periods() == [(10, 12, 0, excluded), (13, None, 0, excluded)]


async def test_overlapping_impacts_are_stored_apart(periods, history):
    history.service(1, RegisterService(slug="web", name="Web"), when=at(0))
    history.incident(1, OpenIncident(title="i", severity="partial_outage", service_ids=(1,)), when=at(10))
    history.incident(2, OpenIncident(title="i", severity="major_outage", service_ids=(1,)), when=at(20))
    history.incident(2, ResolveIncident(), when=at(30))
    history.incident(1, ResolveIncident(), when=at(40))
    history.window(1, schedule(service_ids=(1,), exclude_from_sla=True))
    history.window(1, StartMaintenance(), when=at(25))
    history.window(1, CompleteMaintenance(), when=at(125))
    found = await periods()
    assert found == [
        (10, 40, LEVELS["partial_outage"], False),
        (20, 30, LEVELS["major_outage"], False),
        (25, 125, 0, True),
    ]
    # Of 200 hours 100 are cut out; 10 weigh three tenths, and 5 in full.
    periods_read = [Period(at(start), at(end), level, cut) for start, end, level, cut in found]
    assert uptime(periods_read, at(0), at(200)) == 92.0


async def test_only_impacts_that_overlap_the_window_are_read(app_connection, owner, history):
    now = await owner.fetchval("SELECT now()")
    days = (now - at(0)).days + 1
    history.service(1, RegisterService(slug="web", name="Web"), when=at(-24 * 400))
    for number, (start, end) in enumerate([(-24 * 300, -24 * 299), (-24 * 200, 24), (1, None)], 1):
        history.incident(number, OpenIncident(title="i", service_ids=(1,)), when=at(start))
        if end is not None:
            history.incident(number, ResolveIncident(), when=at(end))
    for projection in (Services(), Impact()):
        await apply(app_connection, projection, history.events)
    row = await impact.select_service_impacts(app_connection, history.tenant_id, 1, None, None, days, MANY)
    assert row["started_ats"] == [at(-24 * 200), at(1)]
    assert row["ended_ats"] == [at(24), None]
    assert row["created_ats"] == [at(-24 * 400)]


async def test_an_old_window_shows_impacts_of_every_length_that_overlap_it(app_connection, history):
    await app_connection.execute("SET timezone = 'America/New_York'")  # where a week may be an hour longer
    history.service(1, RegisterService(slug="web", name="Web"), when=at(-24))
    lengths = (1, 167, 168, 168.001, 169, 5000)
    for number, hours in enumerate(lengths, 1):
        history.incident(number, OpenIncident(title="i", service_ids=(1,)), when=at(1750))
        history.incident(number, ResolveIncident(), when=at(1750 + hours))
    history.incident(10, OpenIncident(title="i", service_ids=(1,)), when=at(0))
    for projection in (Services(), Impact()):
        await apply(app_connection, projection, history.events)
    for start in (1700, 1749, 1751, 1750 + 166.5, 1750 + 167.5, 1750 + 168.0005, 1750 + 168.5, 1750 + 170, 7000):
        row = await impact.select_service_impacts(
            app_connection, history.tenant_id, 1, at(start), at(start + 0.0001), LONG, 100
        )
        expected = [n for n, hours in enumerate(lengths, 1) if 1750 <= start < 1750 + hours]
        assert row["stream_ids"] == [10, *expected]


async def test_an_unknown_or_retired_service_has_no_impacts(app_connection, history, other_history):
    history.service(1, RegisterService(slug="web", name="Web"))
    history.service(1, RetireService())
    other_history.service(2, RegisterService(slug="web", name="Web"))
    other_history.incident(1, OpenIncident(title="i", service_ids=(1, 2)))
    for projection in (Services(), Impact()):
        for made in (history, other_history):
            await apply(app_connection, projection, made.events)
    for service_id in (1, 2, 3):
        row = await impact.select_service_impacts(app_connection, history.tenant_id, service_id, None, None, LONG, MANY)
        assert impact.impacted_services(row) == []


async def test_days_have_24_hours_in_every_time_zone_of_the_server(app_connection, history):
    await app_connection.execute("SET TIME ZONE 'Europe/Berlin'")
    history.service(1, RegisterService(slug="web", name="Web"), when=at(-24 * 400))
    end = datetime(2025, 4, 10, 10, tzinfo=UTC)  # clocks went forward on March 30
    start = end - timedelta(days=30)
    history.incident(1, OpenIncident(title="i", service_ids=(1,)), when=start - timedelta(hours=9))
    history.incident(1, ResolveIncident(), when=start + timedelta(minutes=30))
    for projection in (Services(), Impact()):
        await apply(app_connection, projection, history.events)
    row = await impact.select_service_impacts(app_connection, history.tenant_id, 1, None, end, 30, MANY)
    assert row["ended_ats"] == [start + timedelta(minutes=30)]


async def test_the_limit_bounds_the_impacts_that_are_read(app_connection, history):
    history.service(1, RegisterService(slug="web", name="Web"))
    for number in range(1, 6):
        history.incident(number, OpenIncident(title="i", service_ids=(1,)), when=at(number))
    for projection in (Services(), Impact()):
        await apply(app_connection, projection, history.events)
    for service_id in (1, None):
        row = await impact.select_service_impacts(app_connection, history.tenant_id, service_id, None, None, LONG, 3)
        assert impact.count_impacts(row) == 3

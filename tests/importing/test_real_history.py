"""Import 589 incidents and 18 windows of a real page, and compare every answer with the file."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from opsentry.domain.uptime import Period, uptime
from opsentry.importing.statuspage import Component
from opsentry.importing.translation import assign_slugs
from tests.events.ledger import first_broken
from tests.importing.pages import ledger, load

WEIGHTS = {"major": 3, "critical": 10}  # tenths of downtime


def moment(text):
    return datetime.fromisoformat(text)


def oldest_first(record):
    """Return the updates oldest first; several may share a minute."""
    entries = record["incident_updates"][::-1]
    return sorted(entries, key=lambda u: moment(u["display_at"] or u["created_at"]))


async def all_of(api, section):
    found: list[Any] = []
    while True:
        _, answer, _ = await api.get(f"/{section}?limit=200&offset={len(found)}")
        found += answer[section]
        if len(found) == answer["total"]:
            return [(await api.get(f"/{section}/{one['id']}"))[1] for one in found]


async def test_every_timeline_keeps_its_order_and_times(file, page):
    _, _, api, result = page
    assert (result.incidents, result.maintenance, result.updates) == (589, 18, 3280)
    assert (result.services, result.skipped) == (12, [])
    statuses = {"scheduled": "scheduled", "in_progress": "active", "verifying": "active", "completed": "completed"}
    for section, records in (("incidents", file["incidents"]), ("maintenance", file["scheduled_maintenances"])):
        expected = sorted(
            (
                record["name"],
                sorted(link["name"] for link in record["components"]),
                [
                    (statuses.get(u["status"], u["status"]), u["body"], moment(u["display_at"] or u["created_at"]))
                    for u in oldest_first(record)
                ],
            )
            for record in records
        )
        shown = sorted(
            (
                one["title"],
                sorted(link["name"] for link in one["services"]),
                [(u["status"], u["message"], moment(u["created_at"])) for u in one["updates"]],
            )
            for one in await all_of(api, section)
        )
        assert shown == expected


async def test_incidents_keep_their_severity_and_times(file, page):
    _, _, api, _ = page
    severities = {"none": "informational", "minor": "degraded", "major": "partial_outage", "critical": "major_outage"}
    expected = sorted(
        (
            record["name"],
            severities[record["impact"]],
            record["status"],
            min(moment(record["started_at"]), moment(record["created_at"])),
            moment(record["resolved_at"]),
        )
        for record in file["incidents"]
    )
    shown = sorted(
        (one["title"], one["severity"], one["status"], moment(one["occurred_at"]), moment(one["resolved_at"]))
        for one in await all_of(api, "incidents")
    )
    assert shown == expected


async def test_a_second_import_adds_nothing(page, real_history, owner):
    parts, tenant, _, first = page
    before = await ledger(owner, tenant.id)
    second = await load(parts, tenant.id, real_history)
    assert (second.events, second.unchanged) == (0, 12 + 589 + 18)
    assert len(await ledger(owner, tenant.id)) == len(before) == first.events + 2  # the tenant and its token
    assert first_broken(before) is None
    assert await owner.fetchval("SELECT count(*) FROM outbox_intents") == 0


def down_per_minute(file, component_id):
    """Return the tenths of downtime of each minute with downtime, computed from the file.

    Minutes are exact, because the file has whole minutes.
    """
    down: dict[datetime, int] = {}
    for record in file["incidents"]:
        if component_id not in {link["id"] for link in record["components"]}:
            continue
        weight = WEIGHTS.get(record["impact"], 0)
        at = min(moment(record["started_at"]), moment(record["created_at"]))
        while at < moment(record["resolved_at"]):
            down[at] = max(weight, down.get(at, 0))
            at += timedelta(minutes=1)
    return down


def windows():
    for year in (2022, 2023, 2024, 2025):
        for month, days in ((1, 30), (5, 7), (8, 90), (11, 1)):
            end = datetime(year, month, 28, 13, 17, tzinfo=UTC)
            yield end - timedelta(days=days), end
    yield datetime(2022, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)


async def test_uptime_equals_the_uptime_computed_from_the_file(file, page, owner):
    _, tenant, _, _ = page
    ids = {row["slug"]: row["service_id"] for row in await owner.fetch("SELECT slug, service_id FROM services")}
    names = assign_slugs(msgspec.convert(file["components"], list[Component]))
    below_full = 0
    for component in file["components"]:
        service_id = ids[names[component["id"]]]
        rows = await owner.fetch(
            "SELECT * FROM service_impacts WHERE tenant_id = $1 AND service_id = $2", tenant.id, service_id
        )
        periods = [Period(row["started_at"], row["ended_at"], row["level"], row["is_excluded"]) for row in rows]
        down = down_per_minute(file, component["id"])
        for start, end in windows():
            minutes = (end - start) // timedelta(minutes=1)
            lost = sum(weight for at, weight in down.items() if start <= at < end)
            expected = (10_000 * (10 * minutes - lost) // (10 * minutes)) / 100
            assert uptime(periods, start, end) == expected, (component["name"], start, end)
            below_full += expected < 100
    assert below_full > 50


async def test_explained_periods_add_up_to_the_minutes_of_the_file(file, page, owner):
    _, tenant, api, _ = page
    rows = await owner.fetch("SELECT slug, service_id FROM services WHERE tenant_id = $1", tenant.id)
    ids = {row["slug"]: row["service_id"] for row in rows}
    names = assign_slugs(msgspec.convert(file["components"], list[Component]))
    levels = {"none": "informational", "minor": "degraded", "major": "partial_outage", "critical": "major_outage"}
    start, end = datetime(2022, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)
    total = 0
    for component in file["components"]:
        expected: Counter[str] = Counter()
        for record in file["incidents"]:
            if component["id"] in {link["id"] for link in record["components"]}:
                began = max(start, min(moment(record["started_at"]), moment(record["created_at"])))
                seconds = (min(end, moment(record["resolved_at"])) - began).total_seconds()
                expected[levels[record["impact"]]] += round(max(0, seconds))
        path = f"/services/{ids[names[component['id']]]}/uptime"
        window = "from=2022-01-01T00:00:00Z&to=2026-01-01T00:00:00Z&explain=true"
        _, body, _ = await api.get(f"{path}?{window}")
        shown: Counter[str] = Counter()
        for period in body["periods"]:
            if period["source"]["kind"] == "incident":
                shown[period["level"]] += round(period["seconds"])
        assert +shown == +expected, component["name"]
        down = down_per_minute(file, component["id"])
        lost = sum(weight for at, weight in down.items() if start <= at < end)
        assert sum(p["downtime_seconds"] for p in body["periods"]) == pytest.approx(lost * 6)
        assert body["downtime_seconds"] == pytest.approx(lost * 6)
        total += expected.total()
    assert total > 1_000_000

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from opsentry.domain.maintenance import CancelMaintenance, CompleteMaintenance, MaintenanceUpdated, StartMaintenance
from opsentry.domain.service import RegisterService
from opsentry.events.codec import RecordedEvent
from opsentry.projections import maintenance
from opsentry.projections.maintenance import MaintenanceWindows
from opsentry.projections.maintenance_view import MaintenanceFilter
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import Services
from tests.projections.histories import META, apply, at, schedule


def decoded(row):
    return msgspec.json.decode(b"[" + (row["items"] or b"") + b"]")


@pytest.fixture
async def given(app_connection):
    async def project(*histories):
        for history in histories:
            for projection in (Services(), MaintenanceWindows()):
                await apply(app_connection, projection, history.events)

    return project


@pytest.fixture
async def one(app_connection, history):
    async def read(maintenance_id, tenant_id=history.tenant_id):
        row = await maintenance.select_window(app_connection, tenant_id, maintenance_id)
        return row["body"] and msgspec.json.decode(row["body"])

    return read


async def test_a_scheduled_window_shows_all_its_fields(given, one, history):
    history.service(3, RegisterService(slug="web", name="Web"))
    history.window(
        5, schedule(description="d", visibility="internal", service_ids=(3,), exclude_from_sla=True), when=at(-1)
    )
    await given(history)
    assert await one(5) == {
        "id": 5,
        "title": "Move",
        "description": "d",
        "status": "scheduled",
        "visibility": "internal",
        "services": [{"id": 3, "slug": "web", "name": "Web"}],
        "service_ids": [3],
        "scheduled_start": "2026-01-01T10:00:00Z",
        "scheduled_end": "2026-01-01T12:00:00Z",
        "started_at": None,
        "completed_at": None,
        "cancelled_at": None,
        "exclude_from_sla": True,
        "suppress_alerts": False,
        "auto_start": True,
        "auto_complete": True,
        "created_at": "2026-01-01T00:02:00Z",
        "updated_at": "2026-01-01T00:02:00Z",
        "updates": [],
    }


async def test_each_transition_shows_its_time(given, one, history):
    for number in (1, 2, 3):
        history.window(number, schedule())
    history.window(1, StartMaintenance(), when=at(10))
    history.window(2, StartMaintenance(), when=at(10))
    history.window(2, CompleteMaintenance(), when=at(11))
    history.window(3, CancelMaintenance(), when=at(5))
    await given(history)
    assert [
        (w["status"], w["started_at"], w["completed_at"], w["cancelled_at"])
        for w in [await one(number) for number in (1, 2, 3)]
    ] == [
        ("active", "2026-01-01T10:00:00Z", None, None),
        ("completed", "2026-01-01T10:00:00Z", "2026-01-01T11:00:00Z", None),
        ("cancelled", None, None, "2026-01-01T05:00:00Z"),
    ]


async def test_messages_appear_in_the_timeline(given, one, app_connection, history):
    history.window(5, schedule())
    message = MaintenanceUpdated(message="Half way", status="active", is_public=False)
    history.events.append(
        RecordedEvent(history.tenant_id, 2, "maintenance", 5, 2, message, at(1), at(2), META),
    )
    await given(history)
    assert (await one(5))["updates"] == [
        {
            "id": 2,
            "status": "active",
            "message": "Half way",
            "is_public": False,
            "author": "operator",
            "created_at": "2026-01-01T01:00:00Z",
        }
    ]


async def test_lists_are_the_last_announced_first_filtered_and_paged(given, app_connection, history):
    for number, hour in enumerate([1, 3, 2, 3], 1):
        history.window(number, schedule(), when=at(hour))
    history.window(3, CancelMaintenance())
    await given(history)

    async def page(status=None, limit=10, offset=0):
        row = await maintenance.select_windows(
            app_connection, history.tenant_id, MaintenanceFilter(status), PageRequest(limit, offset)
        )
        return row["total"], [item["id"] for item in decoded(row)]

    assert await page() == (4, [4, 2, 3, 1])
    assert await page(limit=2, offset=1) == (4, [2, 3])
    assert await page(offset=4) == (4, [])
    assert await page(status="cancelled") == (1, [3])
    assert await page(status="active") == (0, [])


async def test_upcoming_windows_are_scheduled_ones_in_the_future_next_first(given, app_connection, history):
    now = datetime.now(UTC)

    def start(hours):
        return schedule(scheduled_start=now + timedelta(hours=hours), scheduled_end=now + timedelta(hours=hours + 1))

    for number, hours in enumerate([30, 10, 20, -10, 5, 6], 1):
        history.window(number, start(hours))
    history.window(5, StartMaintenance())
    history.window(6, CancelMaintenance())
    await given(history)
    row = await maintenance.select_upcoming_windows(app_connection, history.tenant_id)
    assert [item["id"] for item in decoded(row)] == [2, 3, 1]


async def test_due_windows_of_all_tenants_are_listed(given, app_connection, history, other_history):
    now = datetime.now(UTC)

    def window(start, end, **fields):
        return schedule(
            scheduled_start=now + timedelta(hours=start), scheduled_end=now + timedelta(hours=end), **fields
        )

    history.window(1, window(-3, 5))
    history.window(2, window(-9, -1))
    history.window(2, StartMaintenance())
    history.window(3, window(-9, 9))
    history.window(3, StartMaintenance())
    history.window(4, window(-2, 5, auto_start=False))
    history.window(5, window(-9, -2, auto_complete=False))
    history.window(5, StartMaintenance())
    history.window(6, window(-9, -2))
    history.window(6, CancelMaintenance())
    history.window(7, window(-9, -2))
    history.window(7, StartMaintenance())
    history.window(7, CompleteMaintenance())
    history.window(8, window(1, 2))
    other_history.window(1, window(-2, 5))
    await given(history, other_history)

    async def due(within, limit=10):
        rows = await maintenance.select_due_windows(app_connection, within, limit)
        assert all((row["seconds"] == 0) == (row["transition_due_at"] < now) for row in rows)
        return [(row["tenant_id"], row["maintenance_id"], row["status"]) for row in rows]

    mine, other = history.tenant_id, other_history.tenant_id
    overdue = [(mine, 1, "scheduled"), (other, 1, "scheduled"), (mine, 2, "active")]
    assert await due(0) == overdue
    assert await due(0, limit=2) == overdue[:2]
    assert await due(2 * 3600) == [*overdue, (mine, 8, "scheduled")]


async def test_tenants_see_their_own_windows_only(given, one, app_connection, history, other_history):
    other_history.window(5, schedule())
    history.window(6, schedule())
    await given(history, other_history)
    assert await one(5) is None
    row = await maintenance.select_windows(app_connection, history.tenant_id, MaintenanceFilter(), PageRequest(9))
    assert (row["total"], [item["id"] for item in decoded(row)]) == (1, [6])

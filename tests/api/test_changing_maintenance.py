"""Check which fields `PATCH /maintenance/:id` changes in each status, and which events it appends."""

from datetime import UTC, datetime
from typing import Any

import pytest

from opsentry.domain.maintenance import (
    DECIDER,
    MaintenanceChanged,
    MaintenanceEdited,
    MaintenanceRescheduled,
    RemindMaintenance,
)
from tests import commands
from tests.api.conftest import DRILL, head, make_token, recorded, refused, types
from tests.conftest import META, Client, make_service

LATER = {"scheduled_start": "2036-06-03T02:00:00+02:00", "scheduled_end": "2036-06-03T02:30:00Z"}
FACTS: dict[str, Any] = {
    "visibility": "internal",
    "exclude_from_sla": True,
    "suppress_alerts": True,
    "auto_start": False,
    "auto_complete": False,
}
CHANGES = {
    "title": "Other",
    "description": "Words",
    "scheduled_start": "2036-06-01T01:00:00Z",
    "scheduled_end": "2036-06-01T06:00:00Z",
    "service_ids": [],
    **FACTS,
}
REDACTABLE_FIELDS = {"title", "description"}
MAY_CHANGE = {
    "scheduled": set(CHANGES),
    "active": {*REDACTABLE_FIELDS, "scheduled_end", "auto_complete"},
    "completed": REDACTABLE_FIELDS,
    "cancelled": REDACTABLE_FIELDS,
}
MOVES = {"scheduled": [], "active": ["start"], "completed": ["start", "complete"], "cancelled": ["cancel"]}


@pytest.fixture
async def window(api, parts, acme):
    service_id = await make_service(parts, acme.id, "portal", name="Portal")
    _, made, _ = await api.post("/maintenance", {**DRILL, "description": "D", "service_ids": [service_id]})
    return made


@pytest.fixture
def path(window):
    return f"/maintenance/{window['id']}"


async def test_everything_of_a_scheduled_window_can_be_changed_at_once(api, parts, acme, window, path):
    other = await make_service(parts, acme.id, "shop", name="Shop")
    body = {"title": "Move", "description": None, "service_ids": [other, other], **LATER, **FACTS}
    status, changed, headers = await api.patch(path, body)
    assert (status, headers["ETag"]) == (200, '"4"')
    assert changed == {
        **window,
        **body,
        "service_ids": [other],
        "services": [{"id": other, "slug": "shop", "name": "Shop"}],
        "scheduled_start": "2036-06-03T00:00:00Z",
        "updated_at": changed["updated_at"],
    }
    assert changed["updated_at"] > window["updated_at"]
    assert (await api.get(path))[1] == changed
    assert (await recorded(parts, acme.id, "maintenance", window["id"]))[1:] == [
        MaintenanceEdited(title="Move", description=None),
        MaintenanceChanged(service_ids=(other,), **FACTS),
        MaintenanceRescheduled(
            scheduled_start=datetime(2036, 6, 3, tzinfo=UTC), scheduled_end=datetime(2036, 6, 3, 2, 30, tzinfo=UTC)
        ),
    ]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"unknown": 1, "status": "active"},
        {"title": "Drill", "description": "D", "scheduled_start": "2036-06-01T04:00:00+02:00"},
        {"visibility": "public", "exclude_from_sla": False, "auto_complete": True},
    ],
)
@pytest.mark.parametrize("status", MOVES)
async def test_no_change_is_no_event(api, parts, acme, window, path, status, body):
    for action in MOVES[status]:
        await api.post(f"{path}/{action}")
    _, before, read = await api.get(path)
    position = await head(parts, acme.id)
    code, answer, headers = await api.patch(path, {**body, **({"service_ids": window["service_ids"]} if body else {})})
    assert (code, answer, headers["ETag"]) == (200, before, read["ETag"])
    assert await head(parts, acme.id) == position


@pytest.mark.parametrize("field", CHANGES)
@pytest.mark.parametrize("status", MOVES)
async def test_the_status_decides_which_fields_may_change(api, parts, acme, path, status, field):
    for action in MOVES[status]:
        await api.post(f"{path}/{action}")
    before = await head(parts, acme.id)
    code, answer, _ = await api.patch(path, {field: CHANGES[field]})
    if field in MAY_CHANGE[status]:
        assert (code, answer[field], answer["status"]) == (200, CHANGES[field], status)
        assert await head(parts, acme.id) == before + 1
    else:
        words = f"of a window that is {status}, {field} can no longer be changed"
        assert (code, answer) == (409, {"error": words})
        assert await head(parts, acme.id) == before


async def test_one_forbidden_field_refuses_the_whole_change(api, path):
    await api.post(f"{path}/start")
    status, answer, _ = await api.patch(path, {"title": "T", "visibility": "internal", "service_ids": None})
    assert (status, answer["error"]) == (
        409,
        "of a window that is active, visibility, service_ids can no longer be changed",
    )
    assert (await api.get(path))[1]["title"] == "Drill"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"scheduled_end": "2036-06-01T02:00:00Z"}, "scheduled_end: must be after scheduled_start"),
        ({"scheduled_start": "2036-06-01T04:00:00Z"}, "scheduled_end: must be after scheduled_start"),
        ({"scheduled_start": "2036-06-01"}, "scheduled_start: "),
        ({"scheduled_start": "2036-06-01T02:00:00"}, "scheduled_start: "),
        ({"scheduled_start": None}, "scheduled_start: "),
        ({"title": " "}, "title: must not be blank"),
        ({"title": None}, "title: "),
        ({"description": "\x00"}, "description: must not contain"),
        ({"visibility": "x"}, "visibility: must be one of public, internal"),
        ({"suppress_alerts": "yes"}, "suppress_alerts: must be true or false"),
        ({"service_ids": [99]}, "service_ids: no such service: 99"),
    ],
)
async def test_an_invalid_field_is_named_and_nothing_changes(api, parts, acme, path, body, message):
    before = await head(parts, acme.id)
    status, answer, _ = await api.patch(path, {"title": "T", **body})
    assert (status, answer) == (400, refused(answer["error"]))
    assert answer["error"].startswith(message)
    assert await head(parts, acme.id) == before


async def test_a_window_may_be_moved_into_the_past_as_it_may_be_scheduled_there(api, path):
    body = {"scheduled_start": "2020-01-01T00:00:00Z"}
    assert (await api.patch(path, body))[1]["scheduled_start"] == "2020-01-01T00:00:00Z"


async def test_services_can_be_cleared_with_null(api, path):
    _, changed, _ = await api.patch(path, {"service_ids": None})
    assert (changed["service_ids"], changed["services"]) == ([], [])


async def test_nobody_else_can_change_it(http, base_url, parts, acme, api, other_api, anonymous, window, path):
    reader = Client(http, base_url, await make_token(parts, acme.id, "read:status", "write:incidents"))
    before = await head(parts, acme.id)
    assert (await other_api.patch(path, {"title": "T"}))[:2] == (404, {"error": "not found"})
    assert (await api.patch("/maintenance/987654321", {"title": "T"}))[0] == 404
    assert (await reader.patch(path, {"title": "T"}))[:2] == (
        403,
        {"error": "missing required scope: write:maintenance"},
    )
    assert (await anonymous.patch(path, {"title": "T"}))[0] == 401
    assert await head(parts, acme.id) == before
    assert (await api.get(path))[1] == window


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST"])
async def test_there_is_no_other_way_to_change_it(api, path, method):
    status, _, headers = await api.send(method, f"/api/v1{path}", json={"title": "T"})
    assert status == 405
    assert set(headers["Allow"].split(", ")) == {"GET", "HEAD", "PATCH"}


async def test_a_reminder_changes_the_tag_and_nothing_that_is_shown(api, parts, acme, window, path):
    position = await head(parts, acme.id)
    executed = await commands.change(parts, DECIDER, acme.id, window["id"], RemindMaintenance(), META)
    await parts.projector.catch_up(acme.id, executed.position)
    assert await types(parts, acme.id, "maintenance", window["id"]) == ["maintenance.scheduled", "maintenance.reminded"]
    _, shown, headers = await api.get(path)
    assert (shown, headers["ETag"]) == (window, '"2"')
    for moment in (position, executed.position):
        assert (await api.get(f"{path}?as_of={moment}"))[1] == window
        assert (await api.get(f"/maintenance?as_of={moment}"))[1]["maintenance"][0]["updated_at"] == window[
            "updated_at"
        ]


async def test_it_can_be_looked_back_at_as_it_was(api, parts, acme, window, path):
    position = await head(parts, acme.id)
    _, changed, headers = await api.patch(path, {**LATER, **FACTS})
    assert (await api.get(f"{path}?as_of={position}"))[1] == window
    assert (await api.get(f"{path}?as_of={headers['Opsentry-Position']}"))[1] == changed


async def test_a_window_that_was_changed_does_to_uptime_what_it_then_says(api, parts, acme, window, path):
    (service_id,) = window["service_ids"]
    other = await make_service(parts, acme.id, "shop")
    await api.patch(path, {"service_ids": [other], "exclude_from_sla": True})
    await api.post(f"{path}/start")
    for number, status, excluded in ((service_id, "operational", []), (other, "under_maintenance", [True])):
        assert (await api.get(f"/services/{number}"))[1]["current_status"] == status
        _, uptime, _ = await api.get(f"/services/{number}/uptime?explain=true")
        assert [period["source"]["id"] for period in uptime["periods"]] == [window["id"]] * len(excluded)

import pytest

from opsentry.events import store
from tests.conftest import make_service

WINDOW = {
    "id", "title", "description", "status", "visibility", "services", "service_ids", "scheduled_start", "scheduled_end",
    "started_at", "completed_at", "cancelled_at", "exclude_from_sla", "suppress_alerts", "auto_start", "auto_complete",
    "created_at", "updated_at",
}  # fmt: skip
DRILL = {"title": "Drill", "scheduled_start": "2036-06-01T02:00:00Z", "scheduled_end": "2036-06-01T04:00:00Z"}


async def test_create_answers_with_the_whole_window(api, parts, acme):
    service_id = await make_service(parts, acme.id, "portal", name="Portal")
    body = {
        **DRILL,
        "description": "Read-only for ~6 minutes.",
        "visibility": "public",
        "service_ids": [service_id],
        "exclude_from_sla": True,
        "suppress_alerts": True,
    }
    status, window, headers = await api.post("/maintenance", body)
    assert status == 201
    assert set(window) == WINDOW | {"updates"}
    assert headers["Location"] == f"/api/v1/maintenance/{window['id']}"
    assert headers["ETag"] == '"1"'
    assert {key: window[key] for key in body} == body
    assert window["services"] == [{"id": service_id, "slug": "portal", "name": "Portal"}]
    assert (window["status"], window["auto_start"], window["auto_complete"]) == ("scheduled", True, True)
    assert (window["started_at"], window["completed_at"], window["cancelled_at"]) == (None, None, None)
    assert (await api.get(f"/maintenance/{window['id']}"))[1] == window
    async with parts.database.connection() as connection:
        (event,) = await store.read_stream(connection, acme.id, "maintenance", window["id"])
    assert event.event.TYPE == "maintenance.scheduled"


async def test_the_defaults_of_a_new_window(api):
    _, window, _ = await api.post("/maintenance", DRILL)
    assert (window["exclude_from_sla"], window["suppress_alerts"], window["visibility"]) == (False, False, "public")


async def test_times_with_any_offset_are_answered_in_utc(api):
    times = {"scheduled_start": "2036-06-01T02:00:00.5+02:00", "scheduled_end": "2036-06-01T02:00:00-03:30"}
    _, window, _ = await api.post("/maintenance", {**DRILL, **times})
    assert window["scheduled_start"] == "2036-06-01T00:00:00.500000Z"
    assert window["scheduled_end"] == "2036-06-01T05:30:00Z"


@pytest.mark.parametrize(
    ("actions", "statuses"),
    [
        (["start", "complete"], [200, 200]),
        (["cancel"], [200]),
        (["complete"], [409]),
        (["start", "start"], [200, 409]),
        (["start", "cancel"], [200, 409]),
        (["start", "complete", "complete"], [200, 200, 409]),
        (["start", "complete", "start"], [200, 200, 409]),
        (["cancel", "start"], [200, 409]),
        (["cancel", "cancel"], [200, 409]),
    ],
)
async def test_actions_follow_the_rules(api, actions, statuses):
    _, window, _ = await api.post("/maintenance", DRILL)
    answers = [await api.post(f"/maintenance/{window['id']}/{action}") for action in actions]
    assert [status for status, _, _ in answers] == statuses
    assert all(set(body) == {"error"} for status, body, _ in answers if status == 409)
    done = [body for status, body, _ in answers if status == 200]
    assert (await api.get(f"/maintenance/{window['id']}"))[1] == done[-1] if done else True


async def test_each_move_leaves_its_time(api):
    _, window, _ = await api.post("/maintenance", DRILL)
    path = f"/maintenance/{window['id']}"
    _, started, _ = await api.post(f"{path}/start")
    _, completed, _ = await api.post(f"{path}/complete")
    assert started["started_at"] == started["updated_at"]
    assert completed["started_at"] == started["started_at"]
    assert completed["completed_at"] == completed["updated_at"]


async def test_an_unknown_action_is_not_found(api):
    _, window, _ = await api.post("/maintenance", DRILL)
    assert (await api.post(f"/maintenance/{window['id']}/explode"))[:2] == (404, {"error": "not found"})


async def test_lists(api):
    first = (await api.post("/maintenance", {**DRILL, "title": "first"}))[1]["id"]
    sooner = {**DRILL, "title": "second", "scheduled_start": "2035-01-01T00:00:00Z"}
    second = (await api.post("/maintenance", sooner))[1]["id"]
    third = (await api.post("/maintenance", {**DRILL, "title": "third"}))[1]["id"]
    await api.post(f"/maintenance/{third}/cancel")
    _, page, _ = await api.get("/maintenance")
    assert [w["id"] for w in page["maintenance"]] == [third, second, first]
    assert all(set(w) == WINDOW for w in page["maintenance"])
    assert (page["total"], page["limit"], page["offset"]) == (3, 50, 0)
    _, page, headers = await api.get("/maintenance?status=scheduled&limit=1&offset=1")
    assert ([w["id"] for w in page["maintenance"]], page["total"]) == ([first], 2)
    assert 'rel="prev"' in headers["Link"]
    assert (await api.get("/maintenance/upcoming"))[1].keys() == {"maintenance"}
    assert [w["id"] for w in (await api.get("/maintenance/upcoming"))[1]["maintenance"]] == [second, first]


async def test_a_window_of_the_past_is_not_upcoming(api):
    past = {**DRILL, "scheduled_start": "2020-01-01T00:00:00Z", "auto_start": False}
    await api.post("/maintenance", past)
    assert (await api.get("/maintenance/upcoming"))[1] == {"maintenance": []}

import asyncio

import pytest

from opsentry.events import store
from tests.conftest import make_service

INCIDENT = {
    "id", "title", "description", "status", "severity", "visibility", "services", "service_ids", "root_cause",
    "postmortem", "occurred_at", "created_at", "updated_at", "resolved_at",
}  # fmt: skip
UPDATE = {"id", "status", "message", "is_public", "author", "created_at"}


@pytest.fixture
async def service_id(parts, acme):
    return await make_service(parts, acme.id, "main-api", name="Main API")


async def recorded(parts, tenant_id, incident_id):
    async with parts.database.connection() as connection:
        return [e.event.TYPE for e in await store.read_stream(connection, tenant_id, "incident", incident_id)]


async def test_create_answers_with_the_whole_incident(api, parts, acme, service_id):
    body = {
        "title": "Deploy failed — rolling back",
        "description": "Health checks failing post-deploy",
        "severity": "degraded",
        "visibility": "public",
        "service_ids": [service_id],
        "tenant_id": 999,
        "nonsense": {"a": [1]},
    }
    status, incident, headers = await api.post("/incidents", body)
    assert status == 201
    assert set(incident) == INCIDENT | {"updates"}
    assert headers["Location"] == f"/api/v1/incidents/{incident['id']}"
    assert headers["ETag"] == '"2"'
    assert incident["status"] == "investigating"
    assert incident["services"] == [{"id": service_id, "slug": "main-api", "name": "Main API"}]
    assert incident["service_ids"] == [service_id]
    assert incident["occurred_at"] == incident["created_at"]
    assert incident["created_at"].endswith("Z")
    assert (incident["root_cause"], incident["postmortem"], incident["resolved_at"]) == (None, None, None)
    (entry,) = incident["updates"]
    assert set(entry) == UPDATE
    assert (entry["message"], entry["status"], entry["is_public"]) == (body["description"], "investigating", True)
    assert entry["author"] == "acme token"
    assert await recorded(parts, acme.id, incident["id"]) == ["incident.opened", "incident.updated"]
    assert (await api.get(f"/incidents/{incident['id']}"))[1] == incident
    stored = await parts.database.fetchrow("SELECT string_agg(data || coalesce(erasable, ''), '') AS text FROM events")
    assert "nonsense" not in stored["text"]


async def test_the_defaults_of_a_new_incident(api):
    _, incident, _ = await api.post("/incidents", {"title": "Deploy failed"})
    assert (incident["severity"], incident["visibility"], incident["service_ids"]) == ("degraded", "public", [])
    assert (incident["description"], incident["updates"], incident["services"]) == (None, [], [])


async def test_a_row_reads_byte_for_byte_like_the_answer_to_the_command(api, parts, acme, service_id):
    options = {"json": {"title": 'Quote " slash \\ tab \t ümläut 🚨 "services":[]', "service_ids": [service_id]}}
    async with api.session.post(f"{api.base_url}/api/v1/incidents", headers=api.headers, **options) as response:
        answered = await response.read()
        where = response.headers["Location"]
    async with api.session.get(api.base_url + where, headers=api.headers) as response:
        assert await response.read() == answered


async def test_patch_changes_what_is_there_and_nothing_else(api, parts, acme, service_id):
    _, created, _ = await api.post("/incidents", {"title": "A", "description": "B", "service_ids": [service_id]})
    path = f"/incidents/{created['id']}"
    status, changed, headers = await api.patch(path, {"status": "monitoring", "severity": "informational"})
    assert status == 200
    assert headers["ETag"] == '"4"'
    assert changed == {
        **created, "status": "monitoring", "severity": "informational", "updated_at": changed["updated_at"]
    }  # fmt: skip
    body = {"title": "C", "description": None, "visibility": "internal", "service_ids": None, "root_cause": "R"}
    _, changed, _ = await api.patch(path, body)
    assert (changed["title"], changed["description"], changed["visibility"]) == ("C", None, "internal")
    assert (changed["service_ids"], changed["services"], changed["root_cause"]) == ([], [], "R")
    assert (await api.get(path))[1] == changed


@pytest.mark.parametrize("body", [{}, {"title": "A"}, {"severity": "degraded", "status": "investigating"}, {"x": 1}])
async def test_a_patch_without_change_is_no_event(api, parts, acme, body):
    _, created, _ = await api.post("/incidents", {"title": "A"})
    status, answer, _ = await api.patch(f"/incidents/{created['id']}", body)
    assert (status, answer) == (200, created)
    assert await recorded(parts, acme.id, created["id"]) == ["incident.opened"]


async def test_updates_tell_the_story_in_order(api):
    _, created, _ = await api.post("/incidents", {"title": "A", "description": "first"})
    path = f"/incidents/{created['id']}"
    status, incident, _ = await api.post(f"{path}/updates", {"message": "second", "status": "identified"})
    assert (status, incident["status"]) == (201, "identified")
    _, incident, _ = await api.post(f"{path}/updates", {"message": "third", "is_public": False})
    assert [(u["message"], u["status"], u["is_public"]) for u in incident["updates"]] == [
        ("first", "investigating", True),
        ("second", "identified", True),
        ("third", "identified", False),
    ]
    ids = [u["id"] for u in incident["updates"]]
    assert ids == sorted(set(ids))
    assert (await api.get(path))[1] == incident


async def test_resolve_and_reopen(api, parts, acme):
    _, created, _ = await api.post("/incidents", {"title": "A"})
    path = f"/incidents/{created['id']}"
    status, resolved, _ = await api.post(f"{path}/resolve", {"root_cause": "DNS", "postmortem": "https://x"})
    assert (status, resolved["status"]) == (200, "resolved")
    assert (resolved["root_cause"], resolved["postmortem"]) == ("DNS", "https://x")
    assert resolved["resolved_at"] == resolved["updated_at"]
    assert (await api.get("/incidents/active"))[1] == {"incidents": []}
    assert (await api.post(f"{path}/resolve", {}))[0] == 409
    status, answer, _ = await api.patch(path, {"status": "monitoring"})
    assert (status, set(answer)) == (409, {"error"})
    _, reopened, _ = await api.patch(path, {"status": "investigating"})
    assert (reopened["status"], reopened["resolved_at"]) == ("investigating", None)
    assert [i["id"] for i in (await api.get("/incidents/active"))[1]["incidents"]] == [created["id"]]
    assert await recorded(parts, acme.id, created["id"]) == [
        "incident.opened", "incident.resolved", "incident.reopened",
    ]  # fmt: skip


async def test_resolve_needs_no_body(api):
    _, created, _ = await api.post("/incidents", {"title": "A"})
    assert (await api.post(f"/incidents/{created['id']}/resolve"))[0] == 200


async def test_the_list_is_newest_first_in_pages(api):
    made = [(await api.post("/incidents", {"title": f"I{n}"}))[1]["id"] for n in range(5)]
    seen, links = [], []
    path: str | None = "/incidents?limit=2&status=investigating"
    while path:
        status, page, headers = await api.get(path)
        assert (status, page["total"], page["limit"]) == (200, 5, 2)
        assert all(set(i) == INCIDENT for i in page["incidents"])
        seen += [i["id"] for i in page["incidents"]]
        links.append(headers.get("Link", ""))
        following = [part for part in links[-1].split(", ") if part.endswith('rel="next"')]
        path = following[0][1:].split(">")[0].removeprefix("/api/v1") if following else None
    assert seen == made[::-1]
    assert ['rel="prev"' in link for link in links] == [False, True, True]
    assert "status=investigating" in links[0]


async def test_the_list_is_filtered(api):
    await api.post("/incidents", {"title": "A", "severity": "critical"})
    _, other, _ = await api.post("/incidents", {"title": "B", "severity": "degraded"})
    await api.post(f"/incidents/{other['id']}/resolve", {})
    for query, titles in (
        ("severity=critical", ["A"]),
        ("status=resolved", ["B"]),
        ("status=resolved&severity=critical", []),
        ("status=resolved&severity=degraded", ["B"]),
    ):
        _, page, _ = await api.get(f"/incidents?{query}")
        assert [i["title"] for i in page["incidents"]] == titles
        assert page["total"] == len(titles)


async def test_totals_follow_every_change(api):
    async def total(query=""):
        return (await api.get(f"/incidents?limit=1{query}"))[1]["total"]

    async def totals():
        return [await total(f"&{filters}") for filters in ("status=monitoring", "status=resolved", "severity=critical")]

    numbers = [(await api.post("/incidents", {"title": f"I{n}"}))[1]["id"] for n in range(3)]
    assert (await total(), await totals()) == (3, [0, 0, 0])
    for number in numbers[:2]:
        await api.patch(f"/incidents/{number}", {"status": "monitoring", "severity": "critical", "title": "J"})
    assert (await total(), await totals()) == (3, [2, 0, 2])
    await api.post(f"/incidents/{numbers[0]}/resolve")
    assert (await total(), await totals()) == (3, [1, 1, 2])
    assert await total("&status=resolved&severity=critical") == 1
    assert await total("&status=monitoring&severity=critical") == 1
    assert await total("&status=monitoring&severity=degraded") == 0
    await api.patch(f"/incidents/{numbers[0]}", {"status": "investigating", "severity": "degraded"})
    assert (await total(), await totals()) == (3, [1, 0, 1])


async def test_a_limit_above_the_highest_is_clamped_and_the_answer_says_so(api):
    _, page, _ = await api.get("/incidents?limit=1000")
    assert page == {"incidents": [], "total": 0, "limit": 200, "offset": 0}


async def test_twenty_editors_at_once_all_have_their_say(api):
    _, created, _ = await api.post("/incidents", {"title": "A"})
    path = f"/incidents/{created['id']}/updates"
    answers = await asyncio.gather(*(api.post(path, {"message": f"m{n}"}) for n in range(20)))
    assert {status for status, _, _ in answers} == {201}
    _, incident, _ = await api.get(f"/incidents/{created['id']}")
    assert sorted(u["message"] for u in incident["updates"]) == sorted(f"m{n}" for n in range(20))

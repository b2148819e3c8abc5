import itertools

import pytest
from multidict import CIMultiDict

from opsentry.api.v1 import OPERATIONS
from tests.api.conftest import CANARY, DRILL, HOOK, head, raw, refused
from tests.conftest import make_service

LISTS = [
    "/services", "/services?search=c", f"/services?search={CANARY}", "/services?status=major_outage",
    "/services?visibility=public", "/incidents", "/incidents?status=investigating", "/incidents?severity=critical",
    "/incidents?status=investigating&severity=critical", "/incidents?offset=1&limit=1", "/incidents/active",
    "/maintenance", "/maintenance?status=scheduled", "/maintenance/upcoming", "/health", "/subscriptions",
    "/subscriptions?channel=webhook", "/subscriptions?status=active",
]  # fmt: skip
BODIES = {
    "/incidents": {"title": "T"},
    "/incidents/{id}": {"title": "T", "status": "resolved"},
    "/incidents/{id}/updates": {"message": "m", "status": "identified"},
    "/incidents/{id}/resolve": {"root_cause": "r"},
    "/maintenance": DRILL,
    "/subscriptions": HOOK,
    "/subscriptions/{id}": {"target": "https://example.com/other", "enabled": False},
    "/maintenance/{id}": {"title": "T", "scheduled_end": "2036-06-02T04:00:00Z"},
}


def everything(numbers):
    """Every route, with every number for an id and every action."""
    for method, path in ((o.method, o.path.removeprefix("/api/v1")) for o in OPERATIONS):
        for number, action in itertools.product(numbers, ["start", "complete", "cancel"]):
            if "{action}" in path or action == "start":
                yield (
                    method,
                    path,
                    path.replace("{id}", str(number))
                    .replace("{action}", action)
                    .replace("{delivery_id}", f"msg_{number:032x}"),
                )


@pytest.mark.parametrize("neighbour_has_things", [False, True])
async def test_nothing_of_one_tenant_is_in_any_answer_to_another(
    api, other_api, parts, acme, globex, things, neighbour_has_things
):
    if neighbour_has_things:
        await make_service(parts, globex.id, "own")
        await other_api.post("/incidents", {"title": "own"})
        await other_api.post("/maintenance", {**DRILL, "title": "own"})
    before = await head(parts, acme.id), (await api.get("/incidents"))[1], (await api.get("/maintenance"))[1]
    for path in LISTS:
        for method in ("GET", "HEAD"):
            _, answer = await raw(other_api, method, path)
            assert CANARY.lower().encode() not in answer.lower(), path
    numbers = {*things.values(), *range(1, 8)}
    for method, route, path in everything(numbers):
        url = f"{other_api.base_url}/api/v1{path}"
        options = {"json": BODIES[route]} if route in BODIES and method != "GET" else {}
        async with other_api.session.request(method, url, headers=other_api.headers, **options) as response:
            answer = await response.read() + str(CIMultiDict(response.headers)).encode()
        assert CANARY.lower().encode() not in answer.lower(), (method, path)
    after = await head(parts, acme.id), (await api.get("/incidents"))[1], (await api.get("/maintenance"))[1]
    assert after == before


async def test_one_id_shows_each_tenant_its_own_thing(api, other_api, parts, globex, things):
    own = {
        "services": await make_service(parts, globex.id, "own"),
        "incidents": (await other_api.post("/incidents", {"title": "own"}))[1]["id"],
        "maintenance": (await other_api.post("/maintenance", {**DRILL, "title": "own"}))[1]["id"],
        "subscriptions": (await other_api.post("/subscriptions", HOOK))[1]["id"],
    }
    assert own == things
    for kind, number in own.items():
        assert CANARY.lower().encode() in (await raw(api, "GET", f"/{kind}/{number}"))[1].lower()
        status, answer = await raw(other_api, "GET", f"/{kind}/{number}")
        assert (status, CANARY.lower().encode() in answer.lower()) == (200, False)


async def test_totals_and_status_count_the_tenants_own_alone(api, other_api, parts, globex, things):
    own = await make_service(parts, globex.id, "own")
    for kind in ("incidents", "maintenance"):
        assert (await other_api.get(f"/{kind}"))[1]["total"] == 0
        assert (await api.get(f"/{kind}"))[1]["total"] == 1
    assert (await other_api.get("/services"))[1]["total"] == 1
    assert (await other_api.get(f"/services/{own}"))[1]["current_status"] == "operational"


async def test_services_of_another_tenant_are_as_unknown_as_those_that_never_were(api, other_api, parts, acme, things):
    (number,) = {things["services"]}
    _, created, _ = await other_api.post("/incidents", {"title": "T"})
    _, window, _ = await other_api.post("/maintenance", DRILL)
    for method, path, body in (
        ("POST", "/incidents", {"title": "T"}),
        ("PATCH", f"/incidents/{created['id']}", {}),
        ("POST", "/maintenance", DRILL),
        ("PATCH", f"/maintenance/{window['id']}", {}),
    ):
        for ids, words in (
            ([number, 987654321], f"{number}, 987654321"),
            ([number], str(number)),
            ([987654321], "987654321"),
        ):
            status, answer, _ = await other_api.send(method, f"/api/v1{path}", json={**body, "service_ids": ids})
            assert (status, answer) == (400, refused(f"service_ids: no such service: {words}"))
    assert (await other_api.get("/incidents"))[1]["total"] == 1
    assert (await other_api.get(f"/incidents/{created['id']}"))[1] == created
    assert (await other_api.get(f"/maintenance/{window['id']}"))[1] == window


async def test_the_tenant_is_the_tokens_whatever_the_body_or_query_says(api, other_api, acme, globex):
    for field in ("tenant_id", "tenant", "id"):
        status, _, headers = await api.post("/incidents", {"title": "T", field: globex.id})
        assert (status, headers["Opsentry-Ignored-Fields"]) == (201, field)
        refusal = refused("tenant_id: unknown parameter")
        assert (await api.post(f"/incidents?tenant_id={globex.id}", {"title": "T"}))[:2] == (400, refusal)
    assert (await other_api.get("/incidents", headers={"X-Tenant-Id": str(acme.id)}))[1]["total"] == 0

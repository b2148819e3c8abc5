from itertools import combinations

import pytest

from opsentry.api.app import ROUTES
from opsentry.identity.scopes import SCOPES
from tests.api.conftest import DRILL, head, make_token, raw
from tests.conftest import Client

# What each endpoint needs, as the contract lists it.
NEEDS = {
    ("GET", "/health"): None,
    ("GET", "/services"): "read:status",
    ("GET", "/services/{id}"): "read:status",
    ("GET", "/services/{id}/uptime"): "read:status",
    ("GET", "/incidents"): "read:status",
    ("GET", "/incidents/active"): "read:status",
    ("GET", "/incidents/{id}"): "read:status",
    ("POST", "/incidents"): "write:incidents",
    ("PATCH", "/incidents/{id}"): "write:incidents",
    ("POST", "/incidents/{id}/updates"): "write:incidents",
    ("POST", "/incidents/{id}/resolve"): "write:incidents",
    ("GET", "/maintenance"): "read:status",
    ("GET", "/maintenance/upcoming"): "read:status",
    ("GET", "/maintenance/{id}"): "read:status",
    ("POST", "/maintenance"): "write:maintenance",
    ("PATCH", "/maintenance/{id}"): "write:maintenance",
    ("POST", "/maintenance/{id}/{action}"): "write:maintenance",
    ("GET", "/subscriptions"): "write:subscriptions",
    ("POST", "/subscriptions"): "write:subscriptions",
    ("GET", "/subscriptions/{id}"): "write:subscriptions",
    ("PATCH", "/subscriptions/{id}"): "write:subscriptions",
    ("DELETE", "/subscriptions/{id}"): "write:subscriptions",
    ("POST", "/subscriptions/{id}/test"): "write:subscriptions",
    ("POST", "/subscriptions/{id}/rotate-secret"): "write:subscriptions",
    ("GET", "/subscriptions/{id}/deliveries"): "write:subscriptions",
    ("GET", "/subscriptions/{id}/deliveries/{delivery_id}"): "write:subscriptions",
    ("POST", "/subscriptions/{id}/deliveries/{delivery_id}/redeliver"): "write:subscriptions",
}
HELD = [set(scopes) for size in (1, 2, 3) for scopes in combinations(SCOPES, size)]


def test_every_endpoint_is_here():
    assert NEEDS.keys() <= {(method, path) for method, path, _, _ in ROUTES}


@pytest.mark.parametrize("held", HELD, ids=lambda held: "+".join(sorted(held)))
async def test_every_endpoint_wants_its_scope_and_no_other(http, base_url, parts, acme, things, held):
    client = Client(http, base_url, await make_token(parts, acme.id, *held))
    before = await head(parts, acme.id)
    for (method, path), needed in NEEDS.items():
        where = path.replace("{id}", "987654321").replace("{action}", "start").replace("{delivery_id}", f"msg_{1:032x}")
        for how in [method, "HEAD"] if method == "GET" else [method]:
            status, answer = await raw(client, how, where)
            if needed is None or needed in held:
                assert status != 403, (how, path)
            else:
                says = b"" if how == "HEAD" else b'{"error":"missing required scope: %s"}' % needed.encode()
                assert (status, answer) == (403, says)
    assert await head(parts, acme.id) == before


async def test_what_is_lacked_is_said_before_anything_else_is_looked_at(http, base_url, parts, acme):
    client = Client(http, base_url, await make_token(parts, acme.id, "read:status"))
    for path in ("/incidents", "/incidents/abc/updates", "/incidents/1/resolve"):
        status, body, _ = await client.post(path, data=b"[" * 70_000)
        assert (status, body) == (403, {"error": "missing required scope: write:incidents"})


async def test_a_writer_is_answered_with_what_it_made_but_may_not_read_it(http, base_url, parts, acme):
    client = Client(http, base_url, await make_token(parts, acme.id, "write:incidents", "write:maintenance"))
    status, incident, headers = await client.post("/incidents", {"title": "T"})
    assert (status, incident["title"]) == (201, "T")
    assert (await client.send("GET", headers["Location"]))[0] == 403
    status, window, headers = await client.post("/maintenance", DRILL)
    assert (status, window["title"]) == (201, "Drill")
    assert (await client.send("GET", headers["Location"]))[0] == 403
    assert (await client.patch(f"/incidents/{incident['id']}", {"title": "U"}))[1]["title"] == "U"

from itertools import combinations

import pytest

from opsentry.api.v1 import OPERATIONS
from opsentry.identity.scopes import SCOPES
from tests.api.conftest import DRILL, head, make_token, raw
from tests.conftest import Client

NEEDS = {(operation.method, operation.path.removeprefix("/api/v1")): set(operation.scopes) for operation in OPERATIONS}
SCOPES_OF = {(operation.method, operation.path.removeprefix("/api/v1")): operation.scopes for operation in OPERATIONS}
HELD = [set(scopes) for size in (1, 2, 3) for scopes in combinations(SCOPES, size)]


def test_the_contracts_operations_need_the_contracts_scopes():
    for method, path, scope in (
        ("GET", "/health", None),
        ("GET", "/services", "read:status"),
        ("GET", "/services/{id}", "read:status"),
        ("GET", "/services/{id}/uptime", "read:status"),
        ("GET", "/incidents", "read:status"),
        ("GET", "/incidents/active", "read:status"),
        ("GET", "/incidents/{id}", "read:status"),
        ("POST", "/incidents", "write:incidents"),
        ("PATCH", "/incidents/{id}", "write:incidents"),
        ("POST", "/incidents/{id}/updates", "write:incidents"),
        ("POST", "/incidents/{id}/resolve", "write:incidents"),
        ("GET", "/maintenance", "read:status"),
        ("GET", "/maintenance/upcoming", "read:status"),
        ("GET", "/maintenance/{id}", "read:status"),
        ("POST", "/maintenance", "write:maintenance"),
        ("POST", "/maintenance/{id}/start", "write:maintenance"),
        ("POST", "/maintenance/{id}/complete", "write:maintenance"),
        ("POST", "/maintenance/{id}/cancel", "write:maintenance"),
    ):
        assert NEEDS[method, path] == ({scope} if scope else set()), (method, path)


@pytest.mark.parametrize("held", HELD, ids=lambda held: "+".join(sorted(held)))
async def test_every_endpoint_wants_its_scope_and_no_other(http, base_url, parts, acme, things, held):
    client = Client(http, base_url, await make_token(parts, acme.id, *held))
    before = await head(parts, acme.id)
    for (method, path), needed in NEEDS.items():
        where = path.replace("{id}", "987654321").replace("{delivery_id}", f"msg_{1:032x}")
        for how in [method, "HEAD"] if method == "GET" else [method]:
            status, answer = await raw(client, how, where)
            if needed <= held:
                assert status != 403, (how, path)
            else:
                missing = next(scope for scope in SCOPES_OF[method, path] if scope not in held)
                says = b"" if how == "HEAD" else b'{"error":"missing required scope: %s"}' % missing.encode()
                assert (status, answer) == (403, says)
    assert await head(parts, acme.id) == before


async def test_a_missing_scope_is_reported_before_the_path_and_the_body_are_read(http, base_url, parts, acme):
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

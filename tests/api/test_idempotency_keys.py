"""Check which requests an idempotency key covers, which keys are valid, and how keys are stored and pruned."""

import asyncio

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from opsentry.events import store
from opsentry.events.codec import Actor
from opsentry.http.conditional import idempotency_key
from opsentry.identity.scopes import SCOPES
from tests.api.conftest import (
    CREATING,
    DRILL,
    KEY,
    KEYED_REQUESTS,
    each_keyed_request,
    head,
    keyed_request,
    make_token,
    recorded,
    send_keyed,
)
from tests.conftest import Client

ACTIONS = {"start", "complete", "cancel"}


def test_equal_ids_of_two_kinds_of_actors_have_different_keys():
    request = make_mocked_request("POST", "/api/v1/incidents", headers={"Idempotency-Key": "deploy-1"})
    of_token, of_operator = (
        idempotency_key(request, actor, b"{}") for actor in (Actor("token", 1), Actor("operator", 1))
    )
    assert of_token is not None
    assert of_operator is not None
    assert of_token.digest != of_operator.digest
    assert of_token.fingerprint == of_operator.fingerprint
    assert of_token == idempotency_key(request, Actor("token", 1), b"{ }")


@pytest.mark.parametrize("name", [name for name in KEYED_REQUESTS if name not in ACTIONS])
async def test_another_body_under_the_same_key_is_refused(api, parts, acme, linked, name):
    method, path, body = keyed_request(name, linked)
    await send_keyed(api, (method, path, body))
    appended = await head(parts, acme.id)
    refused = await send_keyed(api, (method, path, {**body, "more": 1}))
    assert refused.status == 422
    assert b"Idempotency-Key" in refused.octets
    assert await head(parts, acme.id) == appended


@each_keyed_request
async def test_another_path_under_the_same_key_is_refused(api, parts, acme, linked, name):
    await send_keyed(api, keyed_request(name, linked))
    _, other, _ = await api.post("/incidents", {"title": "Other", "description": "B"})
    _, window, _ = await api.post("/maintenance", DRILL)
    appended = await head(parts, acme.id)
    others = {**linked, "incident": other["id"], "scheduled": window["id"], "active": window["id"]}
    for another in KEYED_REQUESTS:
        if another != name:
            assert (await send_keyed(api, keyed_request(another, others))).status == 422
        elif another not in CREATING:
            assert (await send_keyed(api, keyed_request(name, others))).status == 422
    assert await head(parts, acme.id) == appended


async def test_twenty_different_commands_at_once_under_one_key_are_one_command(api, parts, acme):
    before = await head(parts, acme.id)
    answers = await asyncio.gather(*(send_keyed(api, ("POST", "/incidents", {"title": f"T{n}"})) for n in range(20)))
    assert sorted(a.status for a in answers) == [201] + [422] * 19
    assert await head(parts, acme.id) == before + 1


async def test_the_same_update_of_two_incidents_at_once_under_one_key_is_one_update(api, parts, acme, linked):
    _, other, _ = await api.post("/incidents", {"title": "Other"})
    before = await head(parts, acme.id)
    requests = [("POST", f"/incidents/{i}/updates", {"message": "M"}) for i in (linked["incident"], other["id"])] * 5
    answers = await asyncio.gather(*(send_keyed(api, each) for each in requests))
    assert sorted(a.status for a in answers) == [201] * 5 + [422] * 5
    assert await head(parts, acme.id) == before + 1


@pytest.mark.parametrize(
    "octets",
    [
        b'{"severity":"critical","title":"A \xc3\xa4","service_ids":[],"more":{"a":1,"b":[1,2]}}',
        b'{"more": {"b": [1, 2], "a": 1}, "service_ids": [], "title": "A \xc3\xa4", "severity": "critical"}',
        b'\n{\t"title" :"\\u0041 \\u00e4" ,"severity"\r\n:"critical","service_ids":[ ],"more":{"a":1,"b":[1,2]} }  ',
    ],
)
async def test_field_order_spaces_and_escapes_of_the_body_do_not_matter(api, parts, acme, octets):
    before = await head(parts, acme.id)
    body = {"title": "A ä", "severity": "critical", "service_ids": [], "more": {"a": 1, "b": [1, 2]}}
    first = await send_keyed(api, ("POST", "/incidents", body))
    assert await send_keyed(api, ("POST", "/incidents", None), data=octets) == first._replace(replayed="true")
    assert await head(parts, acme.id) == before + 1


async def test_the_order_of_a_list_matters(api):
    await send_keyed(api, ("POST", "/incidents", {"title": "A", "more": [1, 2]}))
    assert (await send_keyed(api, ("POST", "/incidents", {"title": "A", "more": [2, 1]}))).status == 422


async def test_another_token_may_use_the_same_key_for_itself(api, http, base_url, parts, acme):
    other = Client(http, base_url, await make_token(parts, acme.id, *SCOPES))
    before = await head(parts, acme.id)
    answers = {client: await send_keyed(client, ("POST", "/incidents", {"title": "A"})) for client in (api, other)}
    assert [(a.status, a.replayed) for a in answers.values()] == [(201, None)] * 2
    assert len({a.told["Location"] for a in answers.values()}) == 2
    for client, first in answers.items():
        assert await send_keyed(client, ("POST", "/incidents", {"title": "A"})) == first._replace(replayed="true")
    assert (await send_keyed(other, ("POST", "/incidents", {"title": "B"}), "mine")).status == 201
    assert (await send_keyed(api, ("POST", "/incidents", {"title": "C"}), "mine")).status == 201
    assert await head(parts, acme.id) == before + 4


async def test_another_tenant_may_use_the_same_key_for_itself(api, other_api, parts, acme, globex):
    before = [await head(parts, tenant.id) for tenant in (acme, globex)]
    answers = {client: await send_keyed(client, ("POST", "/incidents", {"title": "A"})) for client in (api, other_api)}
    assert [(a.status, a.replayed) for a in answers.values()] == [(201, None)] * 2
    for client, first in answers.items():
        assert await send_keyed(client, ("POST", "/incidents", {"title": "A"})) == first._replace(replayed="true")
    assert (await send_keyed(other_api, ("POST", "/maintenance", DRILL))).status == 422
    assert [await head(parts, tenant.id) for tenant in (acme, globex)] == [position + 1 for position in before]


@pytest.mark.parametrize("key", ["", " ", "k" * 256, "ключ", "kä", "a\tb"])
async def test_a_bad_key_is_refused(api, parts, acme, linked, key):
    before = await head(parts, acme.id)
    for name in KEYED_REQUESTS:
        refused = await send_keyed(api, keyed_request(name, linked), key)
        assert refused.status == 400
        assert b"Idempotency-Key: must be 1 to 255 printable ASCII characters" in refused.octets
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("second", ["other", KEY])
async def test_two_keys_are_refused(api, parts, acme, linked, second):
    before = await head(parts, acme.id)
    headers = CIMultiDict(api.headers)
    headers.add("Idempotency-Key", KEY)
    headers.add("Idempotency-Key", second)
    for name in KEYED_REQUESTS:
        method, path, body = keyed_request(name, linked)
        url = f"{api.base_url}/api/v1{path}"
        async with api.session.request(method, url, headers=headers, json=body) as response:
            assert response.status == 400
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("key", ["k", "0", "k" * 255, "a b", '"quoted"', "a,b;c=d", "~!@#$%^&*()", "a'; DROP TABLE"])
async def test_a_key_is_1_to_255_printable_characters(api, parts, acme, key):
    before = await head(parts, acme.id)
    first = await send_keyed(api, ("POST", "/incidents", {"title": "A"}), key)
    assert first.status == 201
    assert await send_keyed(api, ("POST", "/incidents", {"title": "A"}), key) == first._replace(replayed="true")
    assert await head(parts, acme.id) == before + 1


async def test_reads_have_no_keys(api):
    for key in (KEY, "k" * 256):
        assert (await send_keyed(api, ("GET", "/incidents", None), key, data=b""))[0] == 200


async def test_keys_and_bodies_are_kept_as_digests_only(api, owner, acme, parts):
    await send_keyed(api, ("POST", "/incidents", {"title": "BODY-CANARY"}), "KEY-CANARY")
    (row,) = await owner.fetch("SELECT * FROM idempotency_keys")
    assert {name: len(value) for name, value in row.items() if isinstance(value, bytes)} == {
        "key": 32, "fingerprint": 32,
    }  # fmt: skip
    kept = " ".join(str(value) for value in row.values()).encode() + row["key"] + row["fingerprint"]
    assert b"CANARY" not in kept
    assert acme.token.encode() not in kept
    events = await owner.fetchval("SELECT string_agg(concat(data, meta, erasable), '') FROM events")
    assert "BODY-CANARY" in events
    assert "KEY-CANARY" not in events
    assert [event.title for event in await recorded(parts, acme.id, "incident", row["stream_id"])] == ["BODY-CANARY"]


async def test_equal_keys_of_two_tokens_are_two_keys(api, other_api, http, base_url, parts, owner, acme):
    colleague = Client(http, base_url, await make_token(parts, acme.id, *SCOPES))
    answers = [
        await send_keyed(client, ("POST", "/incidents", {"title": "A"})) for client in (api, other_api, colleague)
    ]
    assert [(answer.status, answer.replayed) for answer in answers] == [(201, None)] * 3
    assert await owner.fetchval("SELECT count(DISTINCT key) FROM idempotency_keys WHERE tenant_id = $1", acme.id) == 2
    assert await owner.fetchval("SELECT count(*) FROM idempotency_keys") == 3


async def test_keys_are_pruned_after_their_lifetime(api, parts, owner, acme):
    create, before = ("POST", "/incidents", {"title": "A"}), await head(parts, acme.id)
    old = await send_keyed(api, create, "old")
    await owner.execute("UPDATE idempotency_keys SET recorded_at = recorded_at - interval '61 minutes'")
    young = await send_keyed(api, create, "young")
    await owner.execute("UPDATE idempotency_keys SET recorded_at = recorded_at - interval '50 seconds'")
    async with parts.database.connection() as connection:
        assert await store.prune_idempotency_keys(connection, 3600, 10) == 1
        assert await store.prune_idempotency_keys(connection, 3600, 10) == 0
    assert await send_keyed(api, create, "young") == young._replace(replayed="true")
    again = await send_keyed(api, create, "old")
    assert (again.status, again.replayed) == (201, None)
    assert again.told["Location"] != old.told["Location"]
    assert await head(parts, acme.id) == before + 3


async def test_keys_are_pruned_in_batches_from_the_oldest(api, other_api, parts, owner):
    create = ("POST", "/incidents", {"title": "A"})
    for n, client in enumerate((api, other_api, api)):
        await send_keyed(client, create, f"k{n}")
        await owner.execute("UPDATE idempotency_keys SET recorded_at = recorded_at - interval '2 hours'")
    async with parts.database.connection() as connection:
        assert await store.prune_idempotency_keys(connection, 3600, 2) == 2
        assert (await send_keyed(api, create, "k2")).replayed == "true"
        assert (await send_keyed(other_api, create, "k1")).replayed is None
        assert await store.prune_idempotency_keys(connection, 3600, 2) == 1
    assert (await send_keyed(api, create, "k2")).replayed is None

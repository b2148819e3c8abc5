import asyncio
from typing import Any, NamedTuple

import pytest
from multidict import CIMultiDict

from opsentry.bootstrap import core, serving
from opsentry.domain import service
from opsentry.domain.service import ChangeService, RetireService
from opsentry.events import store
from opsentry.identity.scopes import SCOPES
from tests import commands
from tests.api.conftest import DRILL, head, make_token, recorded
from tests.conftest import META, Client, make_service
from tests.waiting import until

KEY = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
TOLD = ("ETag", "Location", "Opsentry-Position", "Content-Type")

# One request of each command: method, path, body.
REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "declare": ("POST", "/incidents", {"title": "New", "description": "Told", "severity": "critical"}),
    "change": ("PATCH", "/incidents/{incident}", {"title": "Changed", "severity": "major_outage"}),
    "update": ("POST", "/incidents/{incident}/updates", {"message": "Found", "status": "identified"}),
    "resolve": ("POST", "/incidents/{incident}/resolve", {"root_cause": "DNS"}),
    "redact incident": ("POST", "/incidents/{incident}/redactions", {"fields": ["description"], "reason": "Name"}),
    "schedule": ("POST", "/maintenance", {**DRILL, "title": "New", "description": "Told"}),
    "change window": (
        "PATCH",
        "/maintenance/{scheduled}",
        {"title": "Changed", "suppress_alerts": True, "scheduled_start": "2036-06-01T01:00:00Z"},
    ),
    "start": ("POST", "/maintenance/{scheduled}/start", {}),
    "complete": ("POST", "/maintenance/{active}/complete", {}),
    "cancel": ("POST", "/maintenance/{scheduled}/cancel", {}),
    "redact window": ("POST", "/maintenance/{scheduled}/redactions", {"fields": ["title"], "reason": "Name"}),
}
CREATING = {"declare", "schedule"}
ACTIONS = {"start", "complete", "cancel"}
# Commands that append several events, with their number. A redaction also restates the fields that remain.
EVENTS = {"declare": 2, "change": 2, "update": 2, "change window": 3, "redact incident": 2, "redact window": 2}

# Tells whether exactly $1 sessions wait for a lock.
WAITERS = """
SELECT count(*) = $1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""

each_command = pytest.mark.parametrize("name", REQUESTS)


class Answer(NamedTuple):
    """Hold the parts of a response that a repeat must reproduce."""

    status: int
    octets: bytes
    told: dict[str, str | None]
    replayed: str | None


async def send(client, request, key=KEY, **options):
    method, path, body = request
    if "data" not in options:
        options["json"] = body
    headers = {
        **client.headers,
        "Content-Type": "application/json",
        **({} if key is None else {"Idempotency-Key": key}),
    }
    url = f"{client.base_url}/api/v1{path}"
    async with client.session.request(method, url, headers=headers, **options) as response:
        told = {name: response.headers.get(name) for name in TOLD}
        return Answer(response.status, await response.read(), told, response.headers.get("Idempotency-Replayed"))


@pytest.fixture
async def ids(api, parts, acme):
    """The ids of a service, and of an incident and two windows that affect it."""
    service_id = await make_service(parts, acme.id, "portal", name="Portal")
    words = {"title": "A", "description": "Somebody's name", "service_ids": [service_id]}
    _, incident, _ = await api.post("/incidents", words)
    _, scheduled, _ = await api.post("/maintenance", {**DRILL, **words})
    _, active, _ = await api.post("/maintenance", {**DRILL, **words})
    await api.post(f"/maintenance/{active['id']}/start")
    return {"service": service_id, "incident": incident["id"], "scheduled": scheduled["id"], "active": active["id"]}


def request(name, ids):
    method, path, body = REQUESTS[name]
    return method, path.format(**ids), {**body, "service_ids": [ids["service"]]} if name in CREATING else body


async def change_service(parts, acme, ids, command):
    executed = await commands.change(parts, service.DECIDER, acme.id, ids["service"], command, META)
    await parts.projector.catch_up(acme.id, executed.position)


@each_command
async def test_a_repeat_is_answered_alike_and_appends_nothing(api, parts, acme, ids, name):
    first = await send(api, request(name, ids))
    assert (first.status, first.replayed) == (201 if name in {*CREATING, "update"} or "redact" in name else 200, None)
    appended = await head(parts, acme.id)
    assert first.told["Opsentry-Position"] == str(appended)
    for _ in range(2):
        assert await send(api, request(name, ids)) == first._replace(replayed="true")
    assert await head(parts, acme.id) == appended


@each_command
async def test_the_answer_equals_a_later_read(api, ids, name):
    method, path, body = request(name, ids)
    _, answered, _ = await api.send(method, f"/api/v1{path}", json=body, headers={"Idempotency-Key": KEY})
    collection = path.split("/")[1]
    assert (await api.get(f"/{collection}/{answered['id']}"))[1] == answered


@each_command
async def test_twenty_sent_at_once_append_once(api, parts, acme, ids, name):
    before = await head(parts, acme.id)
    answers = await asyncio.gather(*(send(api, request(name, ids)) for _ in range(20)))
    assert sorted(a.replayed or "" for a in answers) == [""] + ["true"] * 19
    assert len({(a.status, a.octets, *a.told.values()) for a in answers}) == 1
    appended = await head(parts, acme.id) - before
    assert answers[0].told["Opsentry-Position"] == str(before + appended)
    assert appended == EVENTS.get(name, 1)


@each_command
async def test_twenty_sent_to_two_processes_append_once(http, parts, settings, acme, ids, name):
    before = await head(parts, acme.id)
    async with core(settings) as one, core(settings) as two, serving(settings, one) as a, serving(settings, two) as b:
        clients = [Client(http, url, acme.token) for url in (a, b)] * 10
        answers = await asyncio.gather(*(send(client, request(name, ids)) for client in clients))
    assert sorted(a.replayed or "" for a in answers) == [""] + ["true"] * 19
    assert len({(a.status, a.octets, *a.told.values()) for a in answers}) == 1
    assert await head(parts, acme.id) - before == EVENTS.get(name, 1)


async def test_another_process_answers_a_repeat_alike(api, http, settings, acme, ids):
    first = await send(api, request("update", ids))
    async with core(settings) as later, serving(settings, later) as url:
        assert await send(Client(http, url, acme.token), request("update", ids)) == first._replace(replayed="true")


async def test_different_keys_are_different_commands(api, parts, acme):
    before = await head(parts, acme.id)
    answers = [await send(api, ("POST", "/incidents", {"title": "A"}), key) for key in ("k", "K", "k1", None, None)]
    assert [(a.status, a.replayed) for a in answers] == [(201, None)] * 5
    assert len({a.told["Location"] for a in answers}) == 5
    assert await head(parts, acme.id) == before + 5


# ---------------------------------------------------------------------------------------------------- another request


@pytest.mark.parametrize("name", [name for name in REQUESTS if name not in ACTIONS])
async def test_another_body_under_the_same_key_is_refused(api, parts, acme, ids, name):
    method, path, body = request(name, ids)
    await send(api, (method, path, body))
    appended = await head(parts, acme.id)
    refused = await send(api, (method, path, {**body, "more": 1}))
    assert refused.status == 422
    assert b"Idempotency-Key" in refused.octets
    assert await head(parts, acme.id) == appended


@each_command
async def test_another_path_under_the_same_key_is_refused(api, parts, acme, ids, name):
    await send(api, request(name, ids))
    _, other, _ = await api.post("/incidents", {"title": "Other", "description": "B"})
    _, window, _ = await api.post("/maintenance", DRILL)
    appended = await head(parts, acme.id)
    others = {**ids, "incident": other["id"], "scheduled": window["id"], "active": window["id"]}
    for another in REQUESTS:
        if another != name:
            assert (await send(api, request(another, others))).status == 422
        elif another not in CREATING:
            assert (await send(api, request(name, others))).status == 422
    assert await head(parts, acme.id) == appended


async def test_twenty_different_commands_at_once_under_one_key_are_one_command(api, parts, acme):
    before = await head(parts, acme.id)
    answers = await asyncio.gather(*(send(api, ("POST", "/incidents", {"title": f"T{n}"})) for n in range(20)))
    assert sorted(a.status for a in answers) == [201] + [422] * 19
    assert await head(parts, acme.id) == before + 1


async def test_the_same_update_of_two_incidents_at_once_under_one_key_is_one_update(api, parts, acme, ids):
    _, other, _ = await api.post("/incidents", {"title": "Other"})
    before = await head(parts, acme.id)
    requests = [("POST", f"/incidents/{i}/updates", {"message": "M"}) for i in (ids["incident"], other["id"])] * 5
    answers = await asyncio.gather(*(send(api, each) for each in requests))
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
    first = await send(api, ("POST", "/incidents", body))
    assert await send(api, ("POST", "/incidents", None), data=octets) == first._replace(replayed="true")
    assert await head(parts, acme.id) == before + 1


async def test_the_order_of_a_list_matters(api):
    await send(api, ("POST", "/incidents", {"title": "A", "more": [1, 2]}))
    assert (await send(api, ("POST", "/incidents", {"title": "A", "more": [2, 1]}))).status == 422


async def test_another_token_may_use_the_same_key_for_itself(api, http, base_url, parts, acme):
    other = Client(http, base_url, await make_token(parts, acme.id, *SCOPES))
    before = await head(parts, acme.id)
    answers = {client: await send(client, ("POST", "/incidents", {"title": "A"})) for client in (api, other)}
    assert [(a.status, a.replayed) for a in answers.values()] == [(201, None)] * 2
    assert len({a.told["Location"] for a in answers.values()}) == 2
    for client, first in answers.items():
        assert await send(client, ("POST", "/incidents", {"title": "A"})) == first._replace(replayed="true")
    assert (await send(other, ("POST", "/incidents", {"title": "B"}), "mine")).status == 201
    assert (await send(api, ("POST", "/incidents", {"title": "C"}), "mine")).status == 201
    assert await head(parts, acme.id) == before + 4


async def test_another_tenant_may_use_the_same_key_for_itself(api, other_api, parts, acme, globex):
    before = [await head(parts, tenant.id) for tenant in (acme, globex)]
    answers = {client: await send(client, ("POST", "/incidents", {"title": "A"})) for client in (api, other_api)}
    assert [(a.status, a.replayed) for a in answers.values()] == [(201, None)] * 2
    for client, first in answers.items():
        assert await send(client, ("POST", "/incidents", {"title": "A"})) == first._replace(replayed="true")
    assert (await send(other_api, ("POST", "/maintenance", DRILL))).status == 422
    assert [await head(parts, tenant.id) for tenant in (acme, globex)] == [position + 1 for position in before]


# ---------------------------------------------------------------------------------------------------- refused commands


@pytest.mark.parametrize(
    ("method", "path", "bad", "good"),
    [
        ("POST", "/incidents", {"title": " "}, {"title": "A"}),
        ("POST", "/incidents", {"title": "A", "service_ids": [999]}, {"title": "A"}),
        ("POST", "/incidents", {"title": "A", "occurred_at": "2999-01-01T00:00:00Z"}, {"title": "A"}),
        ("PATCH", "/incidents/{incident}", {"severity": "bad"}, {"severity": "critical"}),
        ("PATCH", "/incidents/{incident}", {"service_ids": [999]}, {"service_ids": []}),
        ("POST", "/incidents/{incident}/updates", {"message": ""}, {"message": "M"}),
        ("POST", "/incidents/{incident}/redactions", {"reason": "R"}, {"reason": "R", "fields": ["title"]}),
        ("POST", "/maintenance", {**DRILL, "scheduled_end": "2036-06-01T01:00:00Z"}, DRILL),
    ],
)
async def test_a_command_refused_with_400_leaves_the_key_unused(api, ids, method, path, bad, good):
    path = path.format(**ids)
    assert (await send(api, (method, path, bad))).status == 400
    done = await send(api, (method, path, good))
    assert (done.status in {200, 201}, done.replayed) == (True, None)
    assert (await send(api, (method, path, bad))).status in {400, 422}


async def test_a_command_refused_with_409_leaves_the_key_unused(api, ids):
    resolve, path = request("resolve", ids), f"/incidents/{ids['incident']}"
    await api.post(f"{path}/resolve")
    assert (await send(api, resolve)).status == 409
    await api.patch(path, {"status": "investigating"})
    done = await send(api, resolve)
    assert (done.status, done.replayed) == (200, None)
    assert await send(api, resolve) == done._replace(replayed="true")


async def test_an_action_refused_with_409_leaves_the_key_unused(api, ids):
    complete = request("complete", {"active": ids["scheduled"]})
    assert (await send(api, complete)).status == 409
    await api.post(f"/maintenance/{ids['scheduled']}/start")
    done = await send(api, complete)
    assert (done.status, done.replayed) == (200, None)
    assert await send(api, complete) == done._replace(replayed="true")


async def test_a_command_refused_with_404_leaves_the_key_unused(api, ids):
    for path in ("/incidents/999/updates", "/incidents/0/updates"):
        assert (await send(api, ("POST", path, {"message": "M"}))).status == 404
    done = await send(api, request("update", ids))
    assert (done.status, done.replayed) == (201, None)


async def test_a_repeat_is_answered_although_the_command_would_be_refused_now(api, ids):
    for name in ("resolve", "start", "complete"):
        first = await send(api, request(name, ids), name)
        assert (await send(api, request(name, ids), None)).status == 409
        assert await send(api, request(name, ids), name) == first._replace(replayed="true")


async def test_a_repeat_of_an_empty_change_changes_nothing_after_later_changes(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    before = await head(parts, acme.id)
    first = await send(api, ("PATCH", path, {"title": "A"}))
    assert (first.status, first.replayed, await head(parts, acme.id)) == (200, None, before)
    await api.patch(path, {"title": "B"})
    assert await send(api, ("PATCH", path, {"title": "A"})) == first._replace(replayed="true")
    assert (await api.get(path))[1]["title"] == "B"
    assert await head(parts, acme.id) == before + 1
    assert (await send(api, ("PATCH", path, {"title": "C"}))).status == 422


async def test_twenty_empty_changes_at_once_are_answered_alike(api, parts, acme, ids):
    before = await head(parts, acme.id)
    unchanging = ("PATCH", f"/incidents/{ids['incident']}", {"title": "A"})
    answers = await asyncio.gather(*(send(api, unchanging) for _ in range(20)))
    assert sorted(a.replayed or "" for a in answers) == [""] + ["true"] * 19
    assert len({(a.status, a.octets, *a.told.values()) for a in answers}) == 1
    assert await head(parts, acme.id) == before


async def test_a_repeated_redaction_of_redacted_fields_is_answered_alike(api, parts, acme, ids):
    erase = request("redact incident", ids)
    await send(api, erase, "first")
    appended = await head(parts, acme.id)
    again = await send(api, erase, "second")
    await api.patch(f"/incidents/{ids['incident']}", {"description": "Another name"})
    assert await send(api, erase, "second") == again._replace(replayed="true")
    assert (await api.get(f"/incidents/{ids['incident']}"))[1]["description"] == "Another name"
    assert await head(parts, acme.id) == appended + 1


# ---------------------------------------------------------------------------------------------------- later


@each_command
async def test_a_repeat_keeps_its_answer_after_later_changes(api, parts, acme, ids, name):
    first = await send(api, request(name, ids))
    made = first.told["Location"].rsplit("/")[-1] if name == "declare" else ids["incident"]
    for body in ({"title": "Later", "visibility": "internal", "service_ids": []}, {"status": "monitoring"}):
        await api.patch(f"/incidents/{made}", body)
    await api.post(f"/incidents/{made}/updates", {"message": "Later"})
    await api.post(f"/incidents/{made}/resolve", {"postmortem": "Later"})
    await api.post(f"/maintenance/{ids['scheduled']}/start")
    await api.post(f"/maintenance/{ids['active']}/complete")
    assert await send(api, request(name, ids)) == first._replace(replayed="true")


@each_command
async def test_a_repeat_keeps_its_answer_after_a_service_was_changed(api, parts, acme, ids, name):
    await change_service(parts, acme, ids, ChangeService(name="Portal of then"))
    first = await send(api, request(name, ids))
    assert b"Portal of then" in first.octets
    for command in (ChangeService(name="Renamed"), RetireService()):
        await change_service(parts, acme, ids, command)
        appended = await head(parts, acme.id)
        assert await send(api, request(name, ids)) == first._replace(replayed="true")
        assert await head(parts, acme.id) == appended


async def test_a_repeat_of_an_empty_change_keeps_its_service_links(api, parts, acme, ids):
    await change_service(parts, acme, ids, ChangeService(name="Portal of then"))
    unchanging = ("PATCH", f"/incidents/{ids['incident']}", {"title": "A"})
    first = await send(api, unchanging)
    assert b"Portal of then" in first.octets
    await change_service(parts, acme, ids, ChangeService(name="Renamed"))
    assert await send(api, unchanging) == first._replace(replayed="true")


async def test_a_repeat_keeps_the_links_of_a_service_renamed_while_the_command_waited(
    api, parts, settings, owner, acme, ids
):
    before = await head(parts, acme.id)
    async with core(settings) as other:
        async with owner.transaction():
            await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", acme.id)
            rename = asyncio.create_task(change_service(other, acme, ids, ChangeService(name="Renamed")))
            await until(lambda: owner.fetchval(WAITERS, 1))
            declare = asyncio.create_task(send(api, request("declare", ids)))
            await until(lambda: owner.fetchval(WAITERS, 2))
        await rename
        first = await declare
    assert (first.status, first.told["Opsentry-Position"]) == (201, str(before + 3))
    assert await send(api, request("declare", ids)) == first._replace(replayed="true")


async def test_a_retired_service_takes_no_new_incident_but_a_repeat_is_answered(api, parts, acme, ids):
    first = await send(api, request("declare", ids))
    await change_service(parts, acme, ids, RetireService())
    assert (await send(api, request("declare", ids), "another")).status == 400
    assert await send(api, request("declare", ids)) == first._replace(replayed="true")


async def test_a_repeat_keeps_the_authors_of_its_answer(api, http, base_url, parts, acme, ids):
    other = Client(http, base_url, await make_token(parts, acme.id, *SCOPES))
    await send(other, request("update", ids))
    first = await send(api, request("update", ids))
    assert b'"author":"t"' in first.octets
    assert b'"author":"acme token"' in first.octets
    assert await send(api, request("update", ids)) == first._replace(replayed="true")


async def test_a_repeat_never_brings_back_fields_that_were_redacted_since(api, ids):
    first = await send(api, request("declare", ids))
    assert b"Told" in first.octets
    made = first.told["Location"].removeprefix("/api/v1")
    await api.post(f"{made}/redactions", {"fields": ["description"], "reason": "Name"})
    again = await send(api, request("declare", ids))
    # The same event held the title, so that is redacted too.
    assert again.octets == first.octets.replace(b'"Told"', b'"[redacted]"').replace(b'"New"', b'"[redacted]"')
    assert again[2:] == (first.told, "true")


async def test_a_redaction_never_answers_with_the_redacted_fields(api, ids):
    for name, words in (("redact incident", b"Somebody's name"), ("redact window", b'"title":"A"')):
        answer = await send(api, request(name, ids), name)
        assert answer.status == 201
        assert words not in answer.octets


# ---------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("key", ["", " ", "k" * 256, "ключ", "kä", "a\tb"])
async def test_a_bad_key_is_refused(api, parts, acme, ids, key):
    before = await head(parts, acme.id)
    for name in REQUESTS:
        refused = await send(api, request(name, ids), key)
        assert refused.status == 400
        assert b"Idempotency-Key: must be 1 to 255 printable ASCII characters" in refused.octets
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("second", ["other", KEY])
async def test_two_keys_are_refused(api, parts, acme, ids, second):
    before = await head(parts, acme.id)
    headers = CIMultiDict(api.headers)
    headers.add("Idempotency-Key", KEY)
    headers.add("Idempotency-Key", second)
    for name in REQUESTS:
        method, path, body = request(name, ids)
        url = f"{api.base_url}/api/v1{path}"
        async with api.session.request(method, url, headers=headers, json=body) as response:
            assert response.status == 400
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("key", ["k", "0", "k" * 255, "a b", '"quoted"', "a,b;c=d", "~!@#$%^&*()", "a'; DROP TABLE"])
async def test_a_key_is_1_to_255_printable_characters(api, parts, acme, key):
    before = await head(parts, acme.id)
    first = await send(api, ("POST", "/incidents", {"title": "A"}), key)
    assert first.status == 201
    assert await send(api, ("POST", "/incidents", {"title": "A"}), key) == first._replace(replayed="true")
    assert await head(parts, acme.id) == before + 1


async def test_reads_have_no_keys(api):
    for key in (KEY, "k" * 256):
        assert (await send(api, ("GET", "/incidents", None), key, data=b""))[0] == 200


async def test_keys_and_bodies_are_kept_as_digests_only(api, owner, acme, parts):
    await send(api, ("POST", "/incidents", {"title": "BODY-CANARY"}), "KEY-CANARY")
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


async def test_equal_keys_of_two_tokens_have_different_digests(api, other_api, owner):
    for client in (api, other_api):
        await send(client, ("POST", "/incidents", {"title": "A"}))
    assert await owner.fetchval("SELECT count(DISTINCT key) FROM idempotency_keys") == 2


async def test_keys_are_pruned_after_their_lifetime(api, parts, owner, acme):
    create, before = ("POST", "/incidents", {"title": "A"}), await head(parts, acme.id)
    old = await send(api, create, "old")
    await owner.execute("UPDATE idempotency_keys SET recorded_at = recorded_at - interval '61 minutes'")
    young = await send(api, create, "young")
    await owner.execute("UPDATE idempotency_keys SET recorded_at = recorded_at - interval '50 seconds'")
    async with parts.database.connection() as connection:
        assert await store.prune_idempotency_keys(connection, 3600, 10) == 1
        assert await store.prune_idempotency_keys(connection, 3600, 10) == 0
    assert await send(api, create, "young") == young._replace(replayed="true")
    again = await send(api, create, "old")
    assert (again.status, again.replayed) == (201, None)
    assert again.told["Location"] != old.told["Location"]
    assert await head(parts, acme.id) == before + 3


async def test_keys_are_pruned_in_batches_from_the_oldest(api, other_api, parts, owner):
    create = ("POST", "/incidents", {"title": "A"})
    for n, client in enumerate((api, other_api, api)):
        await send(client, create, f"k{n}")
        await owner.execute("UPDATE idempotency_keys SET recorded_at = recorded_at - interval '2 hours'")
    async with parts.database.connection() as connection:
        assert await store.prune_idempotency_keys(connection, 3600, 2) == 2
        assert (await send(api, create, "k2")).replayed == "true"
        assert (await send(other_api, create, "k1")).replayed is None
        assert await store.prune_idempotency_keys(connection, 3600, 2) == 1
    assert (await send(api, create, "k2")).replayed is None

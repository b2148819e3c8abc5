"""Check that a retry with the same idempotency key is answered alike, appends nothing, and may follow a refusal."""

import asyncio

import pytest

from opsentry.bootstrap import core, serving
from tests.api.conftest import (
    CREATING,
    DRILL,
    KEY,
    each_keyed_request,
    head,
    keyed_request,
    send_keyed,
)
from tests.conftest import Client

# Commands that append several events, with their number. A redaction also restates the fields that remain.
EVENTS = {"declare": 2, "change": 2, "update": 2, "change window": 3, "redact incident": 2, "redact window": 2}


@each_keyed_request
async def test_a_repeat_is_answered_alike_and_appends_nothing(api, parts, acme, linked, name):
    first = await send_keyed(api, keyed_request(name, linked))
    creates = name in {*CREATING, "update", "redact incident", "redact window"}
    assert (first.status, first.replayed) == (201 if creates else 200, None)
    appended = await head(parts, acme.id)
    assert first.told["Opsentry-Position"] == str(appended)
    for _ in range(2):
        assert await send_keyed(api, keyed_request(name, linked)) == first._replace(replayed="true")
    assert await head(parts, acme.id) == appended


@each_keyed_request
async def test_the_answer_equals_a_later_read(api, linked, name):
    method, path, body = keyed_request(name, linked)
    _, answered, _ = await api.send(method, f"/api/v1{path}", json=body, headers={"Idempotency-Key": KEY})
    collection = path.split("/")[1]
    assert (await api.get(f"/{collection}/{answered['id']}"))[1] == answered


@each_keyed_request
async def test_twenty_sent_at_once_append_once(api, parts, acme, linked, name):
    before = await head(parts, acme.id)
    answers = await asyncio.gather(*(send_keyed(api, keyed_request(name, linked)) for _ in range(20)))
    assert sorted(a.replayed or "" for a in answers) == [""] + ["true"] * 19
    assert len({(a.status, a.octets, *a.told.values()) for a in answers}) == 1
    appended = await head(parts, acme.id) - before
    assert answers[0].told["Opsentry-Position"] == str(before + appended)
    assert appended == EVENTS.get(name, 1)


@each_keyed_request
async def test_twenty_sent_to_two_processes_append_once(http, parts, settings, acme, linked, name):
    before = await head(parts, acme.id)
    async with core(settings) as one, core(settings) as two, serving(settings, one) as a, serving(settings, two) as b:
        clients = [Client(http, url, acme.token) for url in (a, b)] * 10
        answers = await asyncio.gather(*(send_keyed(client, keyed_request(name, linked)) for client in clients))
    assert sorted(a.replayed or "" for a in answers) == [""] + ["true"] * 19
    assert len({(a.status, a.octets, *a.told.values()) for a in answers}) == 1
    assert await head(parts, acme.id) - before == EVENTS.get(name, 1)


async def test_another_process_answers_a_repeat_alike(api, http, settings, acme, linked):
    first = await send_keyed(api, keyed_request("update", linked))
    async with core(settings) as later, serving(settings, later) as url:
        again = await send_keyed(Client(http, url, acme.token), keyed_request("update", linked))
    assert again == first._replace(replayed="true")


async def test_different_keys_are_different_commands(api, parts, acme):
    before = await head(parts, acme.id)
    create = ("POST", "/incidents", {"title": "A"})
    answers = [await send_keyed(api, create, key) for key in ("k", "K", "k1", None, None)]
    assert [(a.status, a.replayed) for a in answers] == [(201, None)] * 5
    assert len({a.told["Location"] for a in answers}) == 5
    assert await head(parts, acme.id) == before + 5


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
async def test_a_command_refused_with_400_leaves_the_key_unused(api, linked, method, path, bad, good):
    path = path.format(**linked)
    assert (await send_keyed(api, (method, path, bad))).status == 400
    done = await send_keyed(api, (method, path, good))
    assert (done.status in {200, 201}, done.replayed) == (True, None)
    assert (await send_keyed(api, (method, path, bad))).status in {400, 422}


async def test_a_command_refused_with_409_leaves_the_key_unused(api, linked):
    resolve, path = keyed_request("resolve", linked), f"/incidents/{linked['incident']}"
    await api.post(f"{path}/resolve")
    assert (await send_keyed(api, resolve)).status == 409
    await api.patch(path, {"status": "investigating"})
    done = await send_keyed(api, resolve)
    assert (done.status, done.replayed) == (200, None)
    assert await send_keyed(api, resolve) == done._replace(replayed="true")


async def test_an_action_refused_with_409_leaves_the_key_unused(api, linked):
    complete = keyed_request("complete", {"active": linked["scheduled"]})
    assert (await send_keyed(api, complete)).status == 409
    await api.post(f"/maintenance/{linked['scheduled']}/start")
    done = await send_keyed(api, complete)
    assert (done.status, done.replayed) == (200, None)
    assert await send_keyed(api, complete) == done._replace(replayed="true")


async def test_a_command_refused_with_404_leaves_the_key_unused(api, linked):
    for path in ("/incidents/999/updates", "/incidents/0/updates"):
        assert (await send_keyed(api, ("POST", path, {"message": "M"}))).status == 404
    done = await send_keyed(api, keyed_request("update", linked))
    assert (done.status, done.replayed) == (201, None)


async def test_a_repeat_is_answered_although_the_command_would_be_refused_now(api, linked):
    for name in ("resolve", "start", "complete"):
        first = await send_keyed(api, keyed_request(name, linked), name)
        assert (await send_keyed(api, keyed_request(name, linked), None)).status == 409
        assert await send_keyed(api, keyed_request(name, linked), name) == first._replace(replayed="true")


async def test_a_repeat_of_an_empty_change_changes_nothing_after_later_changes(api, parts, acme, linked):
    path = f"/incidents/{linked['incident']}"
    before = await head(parts, acme.id)
    first = await send_keyed(api, ("PATCH", path, {"title": "A"}))
    assert (first.status, first.replayed, await head(parts, acme.id)) == (200, None, before)
    await api.patch(path, {"title": "B"})
    assert await send_keyed(api, ("PATCH", path, {"title": "A"})) == first._replace(replayed="true")
    assert (await api.get(path))[1]["title"] == "B"
    assert await head(parts, acme.id) == before + 1
    assert (await send_keyed(api, ("PATCH", path, {"title": "C"}))).status == 422


async def test_twenty_empty_changes_at_once_are_answered_alike(api, parts, acme, linked):
    before = await head(parts, acme.id)
    unchanging = ("PATCH", f"/incidents/{linked['incident']}", {"title": "A"})
    answers = await asyncio.gather(*(send_keyed(api, unchanging) for _ in range(20)))
    assert sorted(a.replayed or "" for a in answers) == [""] + ["true"] * 19
    assert len({(a.status, a.octets, *a.told.values()) for a in answers}) == 1
    assert await head(parts, acme.id) == before


async def test_a_repeated_redaction_of_redacted_fields_is_answered_alike(api, parts, acme, linked):
    erase = keyed_request("redact incident", linked)
    await send_keyed(api, erase, "first")
    appended = await head(parts, acme.id)
    again = await send_keyed(api, erase, "second")
    await api.patch(f"/incidents/{linked['incident']}", {"description": "Another name"})
    assert await send_keyed(api, erase, "second") == again._replace(replayed="true")
    assert (await api.get(f"/incidents/{linked['incident']}"))[1]["description"] == "Another name"
    assert await head(parts, acme.id) == appended + 1

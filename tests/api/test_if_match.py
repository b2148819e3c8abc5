"""Check that `If-Match` lets a command change only the version that its client has read."""

import asyncio

import pytest

from opsentry.bootstrap import core, serving
from tests.api.conftest import (
    CHANGING_COMMANDS,
    UNCHANGING_COMMAND,
    each_changing_command,
    etag,
    head,
    rename,
    send_command,
)
from tests.conftest import Client

each_command = pytest.mark.parametrize(("method", "path", "body"), [*CHANGING_COMMANDS, UNCHANGING_COMMAND])


@each_command
async def test_a_command_with_the_current_tag_is_carried_out(api, ids, method, path, body):
    path = path.format(**ids)
    status, _, headers = await send_command(api, method, path, body, await etag(api, path))
    assert status in {200, 201}
    assert headers["ETag"] == await etag(api, path)


@each_command
async def test_a_command_with_a_stale_tag_is_refused(api, parts, acme, ids, method, path, body):
    path = path.format(**ids)
    current, before = await etag(api, path), await head(parts, acme.id)
    for stale in ('"0"', '"99"', '"99-1"'):
        status, answer, headers = await send_command(api, method, path, body, stale)
        assert (status, set(answer), headers["ETag"]) == (412, {"error"}, current)
        assert "If-Match" in answer["error"]
    assert await head(parts, acme.id) == before


async def test_a_tag_read_before_an_edit_is_stale_after_it(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    read = await etag(api, path)
    _, _, edited = await send_command(api, "PATCH", path, {"title": "B"}, read)
    before = await head(parts, acme.id)
    status, _, refused = await send_command(api, "PATCH", path, {"severity": "critical"}, read)
    assert (status, refused["ETag"]) == (412, edited["ETag"])
    assert await head(parts, acme.id) == before
    assert (await send_command(api, "PATCH", path, {"severity": "critical"}, refused["ETag"]))[0] == 200


@each_command
async def test_a_star_matches_any_version(api, ids, method, path, body):
    assert (await send_command(api, method, path.format(**ids), body, "*"))[0] in {200, 201}


@each_command
async def test_one_of_several_tags_is_enough(api, ids, method, path, body):
    path = path.format(**ids)
    tags = f'"98" , W/"97","x",{await etag(api, path)},"99"'
    assert (await send_command(api, method, path, body, tags))[0] in {200, 201}


async def test_the_tags_may_come_in_several_lines(api, ids):
    path = f"/incidents/{ids['incident']}"
    assert (await send_command(api, "PATCH", path, {"title": "B"}, '"98"', await etag(api, path), '"99"'))[0] == 200
    assert (await send_command(api, "PATCH", path, {"title": "C"}, '"98"', '"99"'))[0] == 412


@each_command
async def test_a_weak_tag_never_matches(api, parts, acme, ids, method, path, body):
    path = path.format(**ids)
    before = await head(parts, acme.id)
    assert (await send_command(api, method, path, body, f"W/{await etag(api, path)}"))[0] == 412
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize(
    "nonsense",
    ["", "1", '""', '"x"', '"1', '1"', "'1'", '"1 "', '" 1"', '"-1"', '"1-"', '"1.0"', '"1e0"', '"**"', '"*"', ","],
)
async def test_nonsense_never_matches(api, parts, acme, ids, nonsense):
    path, before = f"/incidents/{ids['incident']}", await head(parts, acme.id)
    assert await etag(api, path) == '"1"'
    assert (await send_command(api, "PATCH", path, {"title": "B"}, nonsense))[0] == 412
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("other", ['"01"', '"\u0661"', f'"{"9" * 5000}"'])
async def test_another_spelling_of_the_version_never_matches(api, parts, acme, ids, other):
    path, before = f"/incidents/{ids['incident']}", await head(parts, acme.id)
    assert (await send_command(api, "PATCH", path, {"title": "B"}, other))[0] == 412
    assert await head(parts, acme.id) == before


async def test_a_renamed_service_makes_no_tag_stale(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    read = await etag(api, path)
    await rename(parts, acme, ids["service"])
    current = await etag(api, path)
    assert current != read
    status, _, headers = await send_command(api, "PATCH", path, {"title": "B"}, read)
    assert (status, headers["ETag"]) == (200, await etag(api, path))
    assert (await send_command(api, "PATCH", path, {"title": "C"}, headers["ETag"]))[0] == 200


async def test_a_refusal_carries_the_tag_of_a_read(api, parts, acme, ids):
    await rename(parts, acme, ids["service"])
    path = f"/incidents/{ids['incident']}"
    status, _, headers = await send_command(api, "PATCH", path, {"title": "B"}, '"99"')
    assert (status, headers["ETag"]) == (412, await etag(api, path))


async def test_a_missing_incident_is_not_found_for_any_tag(api, other_api, ids):
    path = f"/incidents/{ids['incident']}"
    for client, missing in ((api, "/incidents/999"), (other_api, path)):
        for value in ("*", '"1"', '"99"'):
            answer = await send_command(client, "PATCH", missing, {"title": "B"}, value)
            assert answer[:2] == (404, {"error": "not found"})


async def test_of_two_editors_who_read_the_same_one_wins(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    read, before = await etag(api, path), await head(parts, acme.id)
    answers = await asyncio.gather(*(send_command(api, "PATCH", path, {"title": t}, read) for t in ("B", "C")))
    (winner,), (loser,) = ([a for a in answers if a[0] == status] for status in (200, 412))
    assert winner[2]["ETag"] == loser[2]["ETag"] == await etag(api, path)
    assert (await api.get(path))[1] == winner[1]
    assert await head(parts, acme.id) == before + 1


@each_changing_command
async def test_of_twenty_editors_at_two_processes_one_wins(api, http, settings, parts, acme, ids, method, path, body):
    path = path.format(**ids)
    read = await etag(api, path)
    async with core(settings) as one, core(settings) as two, serving(settings, one) as a, serving(settings, two) as b:
        clients = [Client(http, url, acme.token) for url in (a, b)] * 10
        answers = await asyncio.gather(*(send_command(client, method, path, body, read) for client in clients))
    assert sorted(status in {200, 201} for status, _, _ in answers) == [False] * 19 + [True]
    assert {status for status, _, _ in answers} - {200, 201} == {412}
    assert {headers["ETag"] for _, _, headers in answers} == {await etag(api, path)}


@each_command
async def test_a_keyed_retry_is_answered_although_its_tag_is_stale(api, parts, acme, ids, method, path, body):
    path = path.format(**ids)
    read = await etag(api, path)
    status, answered, headers = await send_command(api, method, path, body, read, key="k")
    await api.patch(f"/incidents/{ids['incident']}", {"title": "Later"})
    before = await head(parts, acme.id)
    again = await send_command(api, method, path, body, read, key="k")
    assert again[:2] == (status, answered)
    assert (again[2]["ETag"], again[2]["Idempotency-Replayed"]) == (headers["ETag"], "true")
    assert await head(parts, acme.id) == before


async def test_twenty_keyed_retries_at_once_of_one_edit_are_all_answered(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    read, before = await etag(api, path), await head(parts, acme.id)
    retries = (send_command(api, "PATCH", path, {"title": "B"}, read, key="k") for _ in range(20))
    answers = await asyncio.gather(*retries)
    assert {status for status, _, _ in answers} == {200}
    assert await head(parts, acme.id) == before + 1


@each_command
async def test_a_command_that_is_refused_leaves_its_key_unused(api, ids, method, path, body):
    path = path.format(**ids)
    assert (await send_command(api, method, path, body, '"99"', key="k"))[0] == 412
    status, _, headers = await send_command(api, method, path, body, await etag(api, path), key="k")
    assert status in {200, 201}
    assert "Idempotency-Replayed" not in headers

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from multidict import CIMultiDict

from opsentry.application import queries
from opsentry.bootstrap import core, serving
from opsentry.domain import incident, service
from opsentry.domain.incident import OpenIncident
from opsentry.domain.service import ChangeService
from opsentry.projections.engine import projector
from tests import commands
from tests.api.conftest import DRILL, head
from tests.conftest import META, Client, make_service
from tests.waiting import until

# The commands that change an existing resource: method, path, body.
COMMANDS: tuple[tuple[str, str, Any], ...] = (
    ("PATCH", "/incidents/{incident}", {"title": "B"}),
    ("POST", "/incidents/{incident}/updates", {"message": "M"}),
    ("POST", "/incidents/{incident}/resolve", {}),
    ("POST", "/incidents/{incident}/redactions", {"fields": ["title"], "reason": "R"}),
    ("PATCH", "/maintenance/{scheduled}", {"title": "B", "scheduled_end": "2036-06-01T05:00:00Z"}),
    ("POST", "/maintenance/{scheduled}/start", None),
    ("POST", "/maintenance/{active}/complete", None),
    ("POST", "/maintenance/{scheduled}/cancel", None),
    ("POST", "/maintenance/{scheduled}/redactions", {"fields": ["title"], "reason": "R"}),
)
UNCHANGING = ("PATCH", "/incidents/{incident}", {"title": "A"})
READS = (
    "/incidents",
    "/incidents?status=investigating&limit=1",
    "/incidents/active",
    "/incidents/{incident}",
    "/services",
    "/services?status=operational",
    "/services/{service}",
    "/services/{service}/uptime",
    "/maintenance",
    "/maintenance/upcoming",
    "/maintenance/{scheduled}",
    "/events/head",
)

each_changing_command = pytest.mark.parametrize(("method", "path", "body"), COMMANDS)
each_command = pytest.mark.parametrize(("method", "path", "body"), [*COMMANDS, UNCHANGING])
each_read = pytest.mark.parametrize("path", READS)


@pytest.fixture
async def ids(api, parts, acme):
    long_ago = datetime.now(UTC) - timedelta(days=100)
    service_id = await make_service(parts, acme.id, "portal", name="Portal", occurred_at=long_ago)
    words = {"title": "A", "service_ids": [service_id]}
    _, opened, _ = await api.post("/incidents", {**words, "severity": "informational"})
    _, scheduled, _ = await api.post("/maintenance", {**DRILL, **words})
    _, active, _ = await api.post("/maintenance", {**DRILL, "title": "C"})
    await api.post(f"/maintenance/{active['id']}/start")
    return {"service": service_id, "incident": opened["id"], "scheduled": scheduled["id"], "active": active["id"]}


async def tag(client, path):
    """Return the entity tag of the resource that a command at `path` changes."""
    return (await client.get("/".join(path.split("/")[:3])))[2]["ETag"]


async def send(client, method, path, body, *tags, key=None):
    headers = CIMultiDict(client.headers)
    for value in tags:
        headers.add("If-Match", value)
    if key is not None:
        headers["Idempotency-Key"] = key
    url = f"{client.base_url}/api/v1{path}"
    async with client.session.request(method, url, headers=headers, json=body) as response:
        return response.status, await response.json(), response.headers


async def rename(parts, acme, service_id, name="Renamed"):
    executed = await commands.change(parts, service.DECIDER, acme.id, service_id, ChangeService(name=name), META)
    await parts.projector.catch_up(acme.id, executed.position)


# ---------------------------------------------------------------------------------------------------- If-Match


@each_command
async def test_a_command_with_the_current_tag_is_carried_out(api, ids, method, path, body):
    path = path.format(**ids)
    status, _, headers = await send(api, method, path, body, await tag(api, path))
    assert status in {200, 201}
    assert headers["ETag"] == await tag(api, path)


@each_command
async def test_a_command_with_a_stale_tag_is_refused(api, parts, acme, ids, method, path, body):
    path = path.format(**ids)
    current, before = await tag(api, path), await head(parts, acme.id)
    for stale in ('"0"', '"99"', '"99-1"'):
        status, answer, headers = await send(api, method, path, body, stale)
        assert (status, set(answer), headers["ETag"]) == (412, {"error"}, current)
        assert "If-Match" in answer["error"]
    assert await head(parts, acme.id) == before


async def test_a_tag_read_before_an_edit_is_stale_after_it(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    read = await tag(api, path)
    _, _, edited = await send(api, "PATCH", path, {"title": "B"}, read)
    before = await head(parts, acme.id)
    status, _, refused = await send(api, "PATCH", path, {"severity": "critical"}, read)
    assert (status, refused["ETag"]) == (412, edited["ETag"])
    assert await head(parts, acme.id) == before
    assert (await send(api, "PATCH", path, {"severity": "critical"}, refused["ETag"]))[0] == 200


@each_command
async def test_a_star_matches_any_version(api, ids, method, path, body):
    assert (await send(api, method, path.format(**ids), body, "*"))[0] in {200, 201}


@each_command
async def test_one_of_several_tags_is_enough(api, ids, method, path, body):
    path = path.format(**ids)
    assert (await send(api, method, path, body, f'"98" , W/"97","x",{await tag(api, path)},"99"'))[0] in {200, 201}


async def test_the_tags_may_come_in_several_lines(api, ids):
    path = f"/incidents/{ids['incident']}"
    assert (await send(api, "PATCH", path, {"title": "B"}, '"98"', await tag(api, path), '"99"'))[0] == 200
    assert (await send(api, "PATCH", path, {"title": "C"}, '"98"', '"99"'))[0] == 412


@each_command
async def test_a_weak_tag_never_matches(api, parts, acme, ids, method, path, body):
    path = path.format(**ids)
    before = await head(parts, acme.id)
    assert (await send(api, method, path, body, f"W/{await tag(api, path)}"))[0] == 412
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize(
    "nonsense",
    ["", "1", '""', '"x"', '"1', '1"', "'1'", '"1 "', '" 1"', '"-1"', '"1-"', '"1.0"', '"1e0"', '"**"', '"*"', ","],
)
async def test_nonsense_never_matches(api, parts, acme, ids, nonsense):
    path, before = f"/incidents/{ids['incident']}", await head(parts, acme.id)
    assert await tag(api, path) == '"1"'
    assert (await send(api, "PATCH", path, {"title": "B"}, nonsense))[0] == 412
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("other", ['"01"', '"\u0661"', f'"{"9" * 5000}"'])
async def test_another_spelling_of_the_version_never_matches(api, parts, acme, ids, other):
    path, before = f"/incidents/{ids['incident']}", await head(parts, acme.id)
    assert (await send(api, "PATCH", path, {"title": "B"}, other))[0] == 412
    assert await head(parts, acme.id) == before


async def test_a_renamed_service_makes_no_tag_stale(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    read = await tag(api, path)
    await rename(parts, acme, ids["service"])
    current = await tag(api, path)
    assert current != read
    status, _, headers = await send(api, "PATCH", path, {"title": "B"}, read)
    assert (status, headers["ETag"]) == (200, await tag(api, path))
    assert (await send(api, "PATCH", path, {"title": "C"}, headers["ETag"]))[0] == 200


async def test_a_refusal_carries_the_tag_of_a_read(api, parts, acme, ids):
    await rename(parts, acme, ids["service"])
    path = f"/incidents/{ids['incident']}"
    status, _, headers = await send(api, "PATCH", path, {"title": "B"}, '"99"')
    assert (status, headers["ETag"]) == (412, await tag(api, path))


async def test_a_missing_incident_is_not_found_for_any_tag(api, other_api, ids):
    path = f"/incidents/{ids['incident']}"
    for client, missing in ((api, "/incidents/999"), (other_api, path)):
        for value in ("*", '"1"', '"99"'):
            assert (await send(client, "PATCH", missing, {"title": "B"}, value))[:2] == (404, {"error": "not found"})


async def test_of_two_editors_who_read_the_same_one_wins(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    read, before = await tag(api, path), await head(parts, acme.id)
    answers = await asyncio.gather(*(send(api, "PATCH", path, {"title": t}, read) for t in ("B", "C")))
    (winner,), (loser,) = ([a for a in answers if a[0] == status] for status in (200, 412))
    assert winner[2]["ETag"] == loser[2]["ETag"] == await tag(api, path)
    assert (await api.get(path))[1] == winner[1]
    assert await head(parts, acme.id) == before + 1


@each_changing_command
async def test_of_twenty_editors_at_two_processes_one_wins(api, http, settings, parts, acme, ids, method, path, body):
    path = path.format(**ids)
    read = await tag(api, path)
    async with core(settings) as one, core(settings) as two, serving(settings, one) as a, serving(settings, two) as b:
        clients = [Client(http, url, acme.token) for url in (a, b)] * 10
        answers = await asyncio.gather(*(send(client, method, path, body, read) for client in clients))
    assert sorted(status in {200, 201} for status, _, _ in answers) == [False] * 19 + [True]
    assert {status for status, _, _ in answers} - {200, 201} == {412}
    assert {headers["ETag"] for _, _, headers in answers} == {await tag(api, path)}


@each_command
async def test_a_keyed_retry_is_answered_although_its_tag_is_stale(api, parts, acme, ids, method, path, body):
    path = path.format(**ids)
    read = await tag(api, path)
    status, answered, headers = await send(api, method, path, body, read, key="k")
    await api.patch(f"/incidents/{ids['incident']}", {"title": "Later"})
    before = await head(parts, acme.id)
    again = await send(api, method, path, body, read, key="k")
    assert again[:2] == (status, answered)
    assert (again[2]["ETag"], again[2]["Idempotency-Replayed"]) == (headers["ETag"], "true")
    assert await head(parts, acme.id) == before


async def test_twenty_keyed_retries_at_once_of_one_edit_are_all_answered(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    read, before = await tag(api, path), await head(parts, acme.id)
    answers = await asyncio.gather(*(send(api, "PATCH", path, {"title": "B"}, read, key="k") for _ in range(20)))
    assert {status for status, _, _ in answers} == {200}
    assert await head(parts, acme.id) == before + 1


@each_command
async def test_a_command_that_is_refused_leaves_its_key_unused(api, ids, method, path, body):
    path = path.format(**ids)
    assert (await send(api, method, path, body, '"99"', key="k"))[0] == 412
    status, _, headers = await send(api, method, path, body, await tag(api, path), key="k")
    assert status in {200, 201}
    assert "Idempotency-Replayed" not in headers


# ---------------------------------------------------------------------------------------------------- If-None-Match


async def read(client, path, *tags, method="GET"):
    """Return (status, octets, headers) of an answer to a client that holds `tags`."""
    headers = CIMultiDict(client.headers)
    for value in tags:
        headers.add("If-None-Match", value)
    async with client.session.request(method, f"{client.base_url}/api/v1{path}", headers=headers) as response:
        return response.status, await response.read(), response.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@each_read
async def test_an_unchanged_body_is_not_sent_again(api, ids, path, method):
    path = path.format(**ids)
    status, octets, headers = await read(api, path, method=method)
    assert (status, bool(octets)) == (200, method == "GET")
    known = headers["ETag"]
    opaque = known.removeprefix("W/")
    for tags in ([known], ["*"], [f'"x", {known}'], ['"x"', known], [opaque], [f"W/{opaque}"]):
        status, octets, again = await read(api, path, *tags, method=method)
        assert (status, octets) == (304, b"")
        for name in ("ETag", "Opsentry-Position", "Link", "Opsentry-Lag-Events"):
            assert again.get(name) == headers.get(name)
        assert "Content-Type" not in again
    for tags in (['"x"'], [""], [opaque.strip('"')], ['"x", W/"y"']):
        assert (await read(api, path, *tags, method=method))[0] == 200


async def test_head_answers_with_the_headers_of_get(api, ids):
    for path in READS:
        _, octets, got = await read(api, path.format(**ids))
        status, nothing, told = await read(api, path.format(**ids), method="HEAD")
        assert (status, nothing, int(told["Content-Length"])) == (200, b"", len(octets))
        for name in ("ETag", "Opsentry-Position", "Content-Type", "Link"):
            assert told.get(name) == got.get(name)


async def test_a_changed_body_is_sent_with_another_tag(api, ids):
    paths = [path.format(**ids) for path in READS]
    before = {path: await read(api, path) for path in paths}
    since = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    outage = {"title": "O", "severity": "major_outage", "service_ids": [ids["service"]], "occurred_at": since}
    await api.post("/incidents", outage)
    await api.patch(f"/incidents/{ids['incident']}", {"title": "B"})
    await api.post(f"/maintenance/{ids['scheduled']}/cancel")
    for path, (_, octets, headers) in before.items():
        status, changed, after = await read(api, path, headers["ETag"])
        assert (path, status) == (path, 200)
        assert changed != octets
        assert after["ETag"] != headers["ETag"]
        assert (await read(api, path, after["ETag"], headers["ETag"], method="HEAD"))[0] in {200, 304}


async def test_a_renamed_service_changes_the_tags_of_all_bodies_that_show_it(api, parts, acme, ids):
    paths = [path.format(**ids) for path in READS if "uptime" not in path]
    before = {path: await read(api, path) for path in paths}
    await rename(parts, acme, ids["service"])
    for path, (_, octets, headers) in before.items():
        status, changed, after = await read(api, path, headers["ETag"])
        assert (path, status) == (path, 200)
        assert changed != octets
        assert after["ETag"] != headers["ETag"]


async def test_a_second_new_name_changes_the_tags_again(api, parts, acme, ids):
    for path in (f"/incidents/{ids['incident']}", f"/maintenance/{ids['scheduled']}", f"/services/{ids['service']}"):
        tags = [await tag(api, path)]
        for name in ("B", "C", "D"):
            await rename(parts, acme, ids["service"], f"{path} {name}")
            tags.append(await tag(api, path))
        assert len(set(tags)) == 4


async def test_a_service_in_another_state_changes_the_tags_of_all_bodies_that_show_it(api, ids):
    body = {"title": "O", "severity": "critical", "service_ids": [ids["service"]]}
    paths = [
        "/services",
        f"/services/{ids['service']}",
        "/services?status=operational",
        "/services?status=major_outage",
    ]
    before = {path: await read(api, path) for path in paths}
    _, outage, _ = await api.post("/incidents", body)
    during = {path: await read(api, path, before[path][2]["ETag"]) for path in paths}
    await api.post(f"/incidents/{outage['id']}/resolve")
    after = {path: await read(api, path, during[path][2]["ETag"]) for path in paths}
    for path in paths:
        assert [during[path][0], after[path][0]] == [200, 200]
        assert before[path][1] == after[path][1] != during[path][1]


async def test_each_state_of_a_service_has_its_tag(api, ids):
    tags = [await tag(api, f"/services/{ids['service']}")]
    for severity in ("degraded", "partial_outage", "major_outage"):
        await api.patch(f"/incidents/{ids['incident']}", {"severity": severity})
        tags.append(await tag(api, f"/services/{ids['service']}"))
    assert len(set(tags)) == 4


async def test_an_answer_to_a_command_has_the_tag_of_a_read(api, parts, acme, ids):
    await rename(parts, acme, ids["service"])
    path = f"/incidents/{ids['incident']}"
    for method, where, body in (
        ("PATCH", path, {"title": "B"}),
        ("PATCH", path, {}),
        ("POST", f"{path}/updates", {"message": "M"}),
        ("POST", f"{path}/resolve", {}),
    ):
        _, _, headers = await send(api, method, where, body)
        assert (await read(api, path, headers["ETag"]))[0] == 304


async def test_a_missing_resource_or_a_refused_request_is_no_304(api, ids):
    assert (await read(api, "/incidents/999", "*"))[0] == 404
    assert (await read(api, "/incidents?limit=x", "*"))[0] == 400
    headers = {"If-None-Match": "*"}
    assert (await api.post("/incidents", {"title": "A"}, headers=headers))[0] == 201
    assert (await api.patch(f"/incidents/{ids['incident']}", {"title": "B"}, headers=headers))[0] == 200


async def test_a_page_is_not_taken_for_another_tenants(api, other_api, globex, ids):
    for path in ("/incidents", "/events/head"):
        _, _, headers = await read(api, path)
        status, octets, _ = await read(other_api, path)
        assert (status, b'"A"' in octets) == (200, False)
        assert headers["ETag"]


# ---------------------------------------------------------------------------------------------------- positions


async def test_an_empty_change_answers_with_a_position_that_shows_it(api, parts, acme, ids):
    await api.post("/incidents", {"title": "Later"})
    method, path, body = UNCHANGING
    _, _, headers = await send(api, method, path.format(**ids), body)
    assert 0 < int(headers["Opsentry-Position"]) <= await head(parts, acme.id)


@each_changing_command
async def test_a_command_answers_with_its_position_and_reads_show_it(api, parts, acme, ids, method, path, body):
    _, _, headers = await send(api, method, path.format(**ids), body)
    assert int(headers["Opsentry-Position"]) == await head(parts, acme.id)
    for each in READS:
        _, _, told = await read(api, each.format(**ids))
        assert int(told["Opsentry-Position"]) == await head(parts, acme.id)
        assert "Opsentry-Lag-Events" not in told


async def opened(parts, acme, ids, title="Unprojected"):
    """Open an incident, which is not projected yet, and return its position."""
    command = OpenIncident(title=title, severity="critical", service_ids=(ids["service"],))
    return (await commands.create(parts, incident.DECIDER, acme.id, command, META)).position


@each_read
async def test_a_read_shows_the_position_that_it_asks_for(api, parts, acme, ids, path):
    path = f"/api/v1{path.format(**ids)}"
    for method in ("GET", "HEAD"):
        position = await opened(parts, acme, ids)
        status, _, headers = await api.send(method, path, headers={"Opsentry-Min-Position": str(position)})
        assert (status, int(headers["Opsentry-Position"])) == (200, position)


async def test_a_read_includes_the_event_at_the_position_that_it_asks_for(api, parts, acme, ids):
    for path in ("/incidents", "/incidents/active"):
        position = await opened(parts, acme, ids, path)
        _, page, _ = await api.get(path, headers={"Opsentry-Min-Position": str(position)})
        assert page["incidents"][0]["title"] == path
    position = await opened(parts, acme, ids)
    _, found, _ = await api.get(f"/services/{ids['service']}", headers={"Opsentry-Min-Position": str(position)})
    assert found["current_status"] == "major_outage"


async def test_a_304_still_shows_the_position(api, parts, acme, ids):
    path = f"/incidents/{ids['incident']}"
    _, _, known = await read(api, path)
    position = await opened(parts, acme, ids)
    headers = {"Opsentry-Min-Position": str(position), "If-None-Match": known["ETag"]}
    status, _, told = await api.get(path, headers=headers)
    assert (status, told["Opsentry-Position"]) == (304, str(position))


@pytest.mark.production_timeouts
async def test_a_position_far_ahead_is_waited_for_a_bounded_time(api, parts, acme, ids):
    async def asked(path, position):
        began = time.monotonic()
        answer = await api.get(path.format(**ids), headers={"Opsentry-Min-Position": str(position)})
        return *answer, time.monotonic() - began

    ahead = await head(parts, acme.id) + 1
    answers = await asyncio.gather(*(asked(path, position) for path in READS for position in (ahead, 2**63 - 1)))
    for status, body, headers, seconds in answers:
        assert (status, set(body)) == (503, {"error", "request_id"})
        assert headers["Retry-After"].isdigit()
        assert seconds < 2.6


async def test_a_read_shows_a_position_that_is_reached_during_the_wait(api, parts, acme, ids, monkeypatch):
    position = await head(parts, acme.id) + 1
    polling = set()
    sleep = asyncio.sleep

    async def spy(seconds, *result):
        if seconds == queries.HEAD_POLL_SECONDS == projector.POSITION_POLL_SECONDS:
            polling.add(asyncio.current_task())
        return await sleep(seconds, *result)

    async def every_read_polls():
        return len(polling) >= len(READS)

    async def later():
        await until(every_read_polls)
        assert await opened(parts, acme, ids) == position

    monkeypatch.setattr(asyncio, "sleep", spy)
    headers = {"Opsentry-Min-Position": str(position)}
    *answers, _ = await asyncio.gather(*(api.get(path.format(**ids), headers=headers) for path in READS), later())
    assert [(status, told["Opsentry-Position"]) for status, _, told in answers] == [(200, str(position))] * len(READS)
    assert answers[READS.index("/incidents")][1]["incidents"][0]["title"] == "Unprojected"


async def test_a_read_shows_the_position_of_another_processs_command(api, http, settings, acme, ids):
    async with core(settings) as two, serving(settings, two) as url:
        there = Client(http, url, acme.token)
        for n in range(10):
            _, changed, told = await api.patch(f"/incidents/{ids['incident']}", {"title": f"T{n}"})
            headers = {"Opsentry-Min-Position": told["Opsentry-Position"]}
            assert (await there.get(f"/incidents/{ids['incident']}", headers=headers))[1] == changed


@pytest.mark.parametrize(
    "nonsense",
    ["", "x", "-1", "+1", "1.0", "1e3", "0x1", "1 2", "1,2", "1_0", "\u0661", str(2**63), "9" * 20, "9" * 5000],
)
async def test_an_invalid_position_is_refused(api, ids, nonsense):
    for path in READS:
        status, body, _ = await api.get(path.format(**ids), headers={"Opsentry-Min-Position": nonsense})
        assert (status, body["error"].split(":")[0]) == (400, "Opsentry-Min-Position")


async def test_a_position_of_the_past_is_no_condition(api, parts, acme, ids):
    for position in ("0", "1", "0001", str(await head(parts, acme.id))):
        for path in READS:
            assert (await api.get(path.format(**ids), headers={"Opsentry-Min-Position": position}))[0] == 200

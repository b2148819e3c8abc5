"""Check that commands answer with their position, and that reads wait for `Opsentry-Min-Position`."""

import asyncio
import time

import pytest

from opsentry.application import queries
from opsentry.bootstrap import core, serving
from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident
from opsentry.projections.engine import projector
from tests import commands
from tests.api.conftest import (
    READ_PATHS,
    UNCHANGING_COMMAND,
    each_changing_command,
    each_read,
    head,
    read_if_none_match,
    send_command,
)
from tests.conftest import META, Client
from tests.waiting import stretched, until


async def test_an_empty_change_answers_with_a_position_that_shows_it(api, parts, acme, ids):
    await api.post("/incidents", {"title": "Later"})
    method, path, body = UNCHANGING_COMMAND
    _, _, headers = await send_command(api, method, path.format(**ids), body)
    assert 0 < int(headers["Opsentry-Position"]) <= await head(parts, acme.id)


@each_changing_command
async def test_a_command_answers_with_its_position_and_reads_show_it(api, parts, acme, ids, method, path, body):
    _, _, headers = await send_command(api, method, path.format(**ids), body)
    assert int(headers["Opsentry-Position"]) == await head(parts, acme.id)
    for each in READ_PATHS:
        _, _, told = await read_if_none_match(api, each.format(**ids))
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
    _, _, known = await read_if_none_match(api, path)
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
    answers = await asyncio.gather(*(asked(path, position) for path in READ_PATHS for position in (ahead, 2**63 - 1)))
    for status, body, headers, seconds in answers:
        assert (status, set(body)) == (503, {"error", "request_id"})
        assert headers["Retry-After"].isdigit()
        assert seconds < stretched(2)


async def test_a_read_shows_a_position_that_is_reached_during_the_wait(api, parts, acme, ids, monkeypatch):
    position = await head(parts, acme.id) + 1
    polling = set()
    sleep = asyncio.sleep

    async def spy(seconds, *result):
        if seconds == queries.HEAD_POLL_SECONDS == projector.POSITION_POLL_SECONDS:
            polling.add(asyncio.current_task())
        return await sleep(seconds, *result)

    async def every_read_polls():
        return len(polling) >= len(READ_PATHS)

    async def later():
        await until(every_read_polls)
        assert await opened(parts, acme, ids) == position

    monkeypatch.setattr(asyncio, "sleep", spy)
    headers = {"Opsentry-Min-Position": str(position)}
    *answers, _ = await asyncio.gather(*(api.get(path.format(**ids), headers=headers) for path in READ_PATHS), later())
    shown = [(status, told["Opsentry-Position"]) for status, _, told in answers]
    assert shown == [(200, str(position))] * len(READ_PATHS)
    assert answers[READ_PATHS.index("/incidents")][1]["incidents"][0]["title"] == "Unprojected"


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
    for path in READ_PATHS:
        status, body, _ = await api.get(path.format(**ids), headers={"Opsentry-Min-Position": nonsense})
        assert (status, body["error"].split(":")[0]) == (400, "Opsentry-Min-Position")


async def test_a_position_of_the_past_is_no_condition(api, parts, acme, ids):
    for position in ("0", "1", "0001", str(await head(parts, acme.id))):
        for path in READ_PATHS:
            assert (await api.get(path.format(**ids), headers={"Opsentry-Min-Position": position}))[0] == 200

import asyncio
import json
from itertools import pairwise

import aiohttp
import msgspec
import pytest

from opsentry.domain import incident, maintenance
from opsentry.domain.incident import OpenIncident
from opsentry.domain.maintenance import StartMaintenance
from opsentry.events import export
from opsentry.events.codec import Actor, Meta
from opsentry.events.hash_chain import check
from tests import commands
from tests.api.conftest import DRILL, make_token, raw
from tests.conftest import META, Client

NOT_FOUND = (404, b'{"error":"not found"}')
ENTRY = {
    "position", "stream_kind", "stream_id", "version", "type", "schema_version", "data", "actor", "request_id",
    "occurred_at", "recorded_at", "hash", "previous_hash",
}  # fmt: skip


async def every(api, path, **query):
    """All events of a list, page by page."""
    found, after = [], 0
    while after is not None:
        status, answer, headers = await api.get(path, params={**query, "after": after})
        assert status == 200
        assert (answer["after"], ("Link" in headers)) == (after, answer["next"] is not None)
        found += answer["events"]
        after = answer["next"]
    return found


async def test_history_says_who_did_what_in_order(api, parts, acme, things):
    number = things["incidents"]
    _, _, headers = await api.post(f"/incidents/{number}/resolve")
    await commands.change(parts, maintenance.DECIDER, acme.id, things["maintenance"], StartMaintenance(), META)
    whole = {entry["position"]: entry for entry in await every(api, "/events")}
    status, answer, _ = await api.get(f"/incidents/{number}/events")
    assert status == 200
    events = answer["events"]
    assert [e["type"] for e in events] == [
        "incident.opened", "incident.updated", "incident.updated", "incident.edited", "incident.resolved"
    ]  # fmt: skip
    assert [e["version"] for e in events] == [1, 2, 3, 4, 5]
    assert {frozenset(e) for e in events} == {frozenset(ENTRY)}
    assert all(whole[e["position"]] == e for e in events)
    prefix = acme.token[4:12]
    assert events[0]["actor"] == {
        "kind": "token",
        "id": events[0]["actor"]["id"],
        "prefix": prefix,
        "name": "acme token",
    }
    assert events[-1]["request_id"] == headers["X-Request-ID"]
    assert events[0]["data"]["title"] == "CANARY title"
    window = (await api.get(f"/maintenance/{things['maintenance']}/events"))[1]["events"]
    assert [(e["type"], e["actor"]["kind"]) for e in window] == [
        ("maintenance.scheduled", "token"), ("maintenance.started", "operator")
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["scheduler", "importer"])
async def test_the_actor_is_who_it_was(api, parts, acme, kind):
    made = await commands.create(parts, incident.DECIDER, acme.id, OpenIncident(title="T"), Meta(Actor(kind)))
    (event,) = (await api.get(f"/incidents/{made.stream_id}/events"))[1]["events"]
    assert event["actor"] == {"kind": kind}


@pytest.mark.parametrize("path", ["/incidents/{}/events", "/maintenance/{}/events"])
async def test_history_of_what_is_not_there_is_the_same_404(api, other_api, things, path):
    foreign = things[path.split("/")[1]]
    for client, number in ((api, "0"), (api, "987654"), (api, "x"), (other_api, foreign)):
        assert await raw(client, "GET", path.format(number)) == NOT_FOUND
    assert (await api.get(path.format(foreign) + "?after=999999"))[1]["events"] == []


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
async def test_pages_together_are_the_whole_ledger(api, other_api, things, limit):
    _, head, _ = await api.get("/events/head")
    found = await every(api, "/events", limit=limit)
    assert [e["position"] for e in found] == list(range(1, head["position"] + 1))
    assert found[0]["previous_hash"] == "00" * 32
    assert all(after["previous_hash"] == before["hash"] for before, after in pairwise(found))
    assert found[-1]["hash"] == head["hash"]
    assert "CANARY" not in json.dumps(await every(other_api, "/events"))
    story = await every(api, f"/incidents/{things['incidents']}/events", limit=limit)
    assert story == [e for e in found if (e["stream_kind"], e["stream_id"]) == ("incident", things["incidents"])]


async def test_one_type_is_found_wherever_it_is(api, things, monkeypatch):
    monkeypatch.setattr("opsentry.events.audit.SEARCH_WINDOW_EVENTS", 2)
    (created,) = await every(api, "/events", type="maintenance.scheduled")
    assert created["stream_id"] == things["maintenance"]
    assert len(await every(api, "/events", type="incident.updated", limit=1)) == 2
    assert await every(api, "/events", type="service.retired") == []


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=0", "limit"), ("limit=-1", "limit"), ("limit=x", "limit"), ("after=-1", "after"), ("after=x", "after"),
        ("type=nonsense", "type"), ("after=99999999999999999999", "after"),
    ],
)  # fmt: skip
async def test_bad_pages_are_refused(api, query, says):
    status, answer, _ = await api.get(f"/events?{query}")
    assert (status, answer["error"].split(":")[0]) == (400, says)


async def test_a_limit_beyond_the_highest_is_clamped(api):
    assert (await api.get("/events?limit=5000"))[1]["limit"] == 1000


@pytest.mark.parametrize("path", ["/events", "/events/head", "/events/export"])
async def test_the_ledger_is_for_auditors(api, parts, acme, path):
    reader = Client(api.session, api.base_url, await make_token(parts, acme.id, "read:status", "write:incidents"))
    assert await raw(reader, "GET", path) == (403, b'{"error":"missing required scope: read:audit"}')
    auditor = Client(api.session, api.base_url, await make_token(parts, acme.id, "read:audit"))
    assert (await raw(auditor, "GET", path))[0] == 200
    assert (await raw(auditor, "GET", "/incidents"))[0] == 403


# ------------------------------------------------------------------------------------------------ export


async def test_an_export_has_every_event_and_verifies(api, parts, acme, things, tmp_path):
    status, octets = await raw(api, "GET", "/events/export")
    assert status == 200
    lines = [msgspec.json.decode(line, type=export.Line) for line in octets.splitlines()]
    _, head, _ = await api.get("/events/head")
    assert [line.position for line in lines] == list(range(1, head["position"] + 1))
    assert lines[-1].hash == head["hash"]
    file = tmp_path / "file"
    file.write_bytes(octets)
    with export.opened(file) as opened:
        assert check(link for link, _ in export.Reader(opened).links()) is None
    for cut in (2, len(lines)):
        _, rest = await raw(api, "GET", f"/events/export?from_position={cut}")
        assert rest == b"".join(octets.splitlines(keepends=True)[cut - 1 :])
    _, part = await raw(api, "GET", "/events/export?from_position=2&to_position=3")
    assert part == b"".join(octets.splitlines(keepends=True)[1:3])
    assert await raw(api, "GET", f"/events/export?from_position={len(lines) + 1}") == (200, b"")
    assert (await raw(api, "GET", f"/events/export?from_position={len(lines) + 2}"))[0] == 400
    assert (await raw(api, "HEAD", "/events/export")) == (200, b"")


async def test_an_export_goes_by_pieces(api, things, monkeypatch):
    _, whole = await raw(api, "GET", "/events/export")
    monkeypatch.setattr("opsentry.application.ledger.EXPORT_BATCH_EVENTS", 3)
    assert await raw(api, "GET", "/events/export") == (200, whole)


async def test_an_export_is_packed_for_those_who_take_that(api, things):
    _, whole = await raw(api, "GET", "/events/export")
    url = f"{api.base_url}/api/v1/events/export"
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        async with session.get(url, headers={**api.headers, "Accept-Encoding": "gzip"}) as response:
            assert response.headers["Content-Encoding"] == "gzip"
            assert len(await response.read()) < len(whole)
        async with session.get(url, headers={**api.headers, "Accept-Encoding": "identity"}) as response:
            assert "Content-Encoding" not in response.headers
            assert response.headers["Content-Type"] == "application/x-ndjson"
            assert {"X-Request-ID", "RateLimit", "Opsentry-Position"} <= set(response.headers)
            assert await response.read() == whole


async def test_a_client_that_goes_away_does_no_harm(api, things, monkeypatch):
    monkeypatch.setattr("opsentry.application.ledger.EXPORT_BATCH_EVENTS", 1)
    for _ in range(3):
        async with api.session.get(f"{api.base_url}/api/v1/events/export", headers=api.headers) as response:
            await response.content.readline()
            response.close()
    await asyncio.sleep(0)
    assert (await raw(api, "GET", "/events/head"))[0] == 200


async def test_an_export_that_loses_the_database_breaks_off_visibly(api, things, monkeypatch):
    monkeypatch.setattr("opsentry.application.ledger.EXPORT_BATCH_EVENTS", 2)
    real = export.chunk

    async def failing(connection, tenant_id, after, until):
        if after >= 4:
            raise OSError("gone")
        return await real(connection, tenant_id, after, until)

    monkeypatch.setattr("opsentry.application.ledger.export.chunk", failing)
    with pytest.raises(aiohttp.ClientPayloadError):
        await raw(api, "GET", "/events/export")


# ------------------------------------------------------------------------------------------------ looking back


@pytest.mark.parametrize(
    ("moment", "says"),
    [
        ("yesterday", "must be a position, or an RFC 3339"),
        ("2026-06-01T02:00:00", "must be a position, or an RFC 3339"),
        ("2999-01-01T00:00:00Z", "must not be in the future"),
        ("99999", "the ledger ends at position"),
        ("-1", "must be a position"),
        ("0001-01-01T00:00:00Z", "out of range"),
        ("", "must be a position"),
    ],
)
async def test_moments_that_are_none_are_refused(api, things, moment, says):
    for path in ("/incidents", f"/incidents/{things['incidents']}", "/services", "/maintenance"):
        status, answer, _ = await api.get(f"{path}?as_of={moment}")
        assert status == 400
        assert answer["error"].startswith("as_of: ")
        assert says in answer["error"]


async def test_endpoints_that_show_only_the_present_refuse_as_of(api, things):
    for path in (f"/services/{things['services']}/uptime", "/maintenance/upcoming"):
        assert (await api.get(f"{path}?as_of=1"))[0] == 400


async def test_a_time_shows_what_was_there_then_with_any_offset(api, things, owner, acme):
    path = f"/incidents/{things['incidents']}"
    before, then = (
        await raw(api, "GET", path),
        await owner.fetchval(
            "SELECT to_char(clock_timestamp() + interval '2 h', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+02:00\"')"
        ),
    )
    await api.patch(path, {"title": "Changed"})
    assert await raw(api, "GET", f"{path}?as_of={then}") == before
    assert await raw(api, "GET", f"{path}?as_of={then.replace('+', '%2B')}") == before
    assert (await raw(api, "GET", f"{path}?as_of=1")) == NOT_FOUND
    _, past, headers = await api.get("/incidents?as_of=1")
    assert (past["incidents"], past["total"], headers["Opsentry-Position"]) == ([], 0, "1")
    assert (await api.get(f"/services/{things['services']}?as_of=1"))[0] == 404
    assert (await api.get(f"/maintenance/{things['maintenance']}?as_of=1"))[0] == 404


async def test_pages_of_the_past_are_linked_as_pages_of_the_past(api, things):
    for _ in range(3):
        await api.post("/incidents", {"title": "More"})
    position = (await api.get("/events/head"))[1]["position"]
    _, answer, headers = await api.get(f"/incidents?as_of={position}&limit=2&offset=1")
    assert (answer["total"], answer["limit"], answer["offset"], len(answer["incidents"])) == (4, 2, 1, 2)
    assert headers["Link"].count(f"as_of={position}") == 2
    assert (await api.get(f"/incidents?as_of={position}", headers={"If-None-Match": headers["ETag"]}))[0] == 304


# ------------------------------------------------------------------------------------------------ erasure


async def test_erasing_needs_both_scopes(api, parts, acme, things):
    body = {"fields": ["title"], "reason": "r"}
    for kind, own in (("incidents", "write:incidents"), ("maintenance", "write:maintenance")):
        for scopes, missing in (((own,), "read:audit"), (("read:audit",), own)):
            client = Client(api.session, api.base_url, await make_token(parts, acme.id, *scopes))
            status, answer, _ = await client.post(f"/{kind}/{things[kind]}/redactions", body)
            assert (status, answer["error"]) == (403, f"missing required scope: {missing}")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"reason": "r"}, "fields: name at least one field or event"),
        ({"fields": ["title"]}, "reason: is required"),
        ({"fields": ["title"], "reason": " "}, "reason: must not be blank"),
        ({"fields": ["status"], "reason": "r"}, "fields: must be one of title"),
        ({"fields": "title", "reason": "r"}, "fields: must be an array"),
        ({"events": [1], "reason": "r"}, "events: no erasable text is recorded at 1"),
        ({"events": [0], "reason": "r"}, "events[0]: must be an integer from 1"),
    ],
)
async def test_an_impossible_redaction_is_explained_and_loses_nothing(api, things, body, says):
    for kind in ("incidents", "maintenance"):
        before = await raw(api, "GET", f"/{kind}/{things[kind]}")
        status, answer, _ = await api.post(f"/{kind}/{things[kind]}/redactions", body)
        assert status == 400
        assert answer["error"].startswith(says)
        assert await raw(api, "GET", f"/{kind}/{things[kind]}") == before


async def test_erased_words_are_nowhere_and_the_record_says_who_and_why(api, owner, acme, things):
    texts = ("CANARY description", "CANARY message", "CANARY title")
    fields = {
        "incidents": ["description", "title", "root_cause", "postmortem"],
        "maintenance": ["description", "title"],
    }
    for kind, chosen in fields.items():
        path = f"/{kind}/{things[kind]}"
        messages = [e["position"] for e in (await api.get(f"{path}/events"))[1]["events"] if "message" in e["data"]]
        status, answer, _ = await api.post(
            f"{path}/redactions", {"fields": chosen, "events": messages, "reason": "asked to"}
        )
        assert status == 201
        assert {answer[name] for name in chosen} == {"[redacted]"}
        assert answer == (await api.get(path))[1]
        last = (await api.get(f"{path}/events"))[1]["events"][-1]
        assert (last["type"].split(".")[1], last["actor"]["name"]) == ("redacted", "acme token")
        assert (last["data"]["reason"], sorted(last["data"]["fields"])) == ("asked to", sorted(chosen))
    tables = await owner.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    for table in tables:
        for text in texts:
            count = f"SELECT count(*) FROM {table['tablename']} t WHERE strpos(t::text, $1) > 0"
            assert await owner.fetchval(count, text) == 0, (table, text)
    head = (await api.get("/events/head"))[1]["position"]
    reads = ["/incidents", "/incidents/active", "/maintenance", "/events", "/events/export"]
    reads += [f"/{kind}/{things[kind]}{more}" for kind in fields for more in ("", "/events")]
    reads += [f"/{kind}/{things[kind]}?as_of={position}" for kind in fields for position in range(1, head + 1)]
    for path in reads:
        octets = (await raw(api, "GET", path))[1]
        assert not any(text.encode() in octets for text in texts), path


async def test_the_reason_itself_can_be_erased(api, things):
    path = f"/incidents/{things['incidents']}"
    await api.post(f"{path}/redactions", {"fields": ["description"], "reason": "Jane Doe asked"})
    record = next(e for e in (await api.get(f"{path}/events"))[1]["events"] if e["type"] == "incident.redacted")
    status, _, _ = await api.post(
        f"{path}/redactions", {"events": [record["position"]], "reason": "a name in a reason"}
    )
    assert status == 201
    assert "Jane" not in str((await api.get(f"{path}/events"))[1])


async def test_words_that_nobody_asked_to_erase_stay(api):
    _, made, _ = await api.post("/incidents", {"title": "Logins fail", "description": "Says Jane"})
    path = f"/incidents/{made['id']}"
    await api.post(f"{path}/updates", {"message": "We look into it"})
    _, after, _ = await api.post(f"{path}/redactions", {"fields": ["description"], "reason": "r"})
    assert (after["title"], after["description"]) == ("Logins fail", "[redacted]")
    assert [update["message"] for update in after["updates"]] == ["[redacted]", "We look into it"]
    again = await api.post(f"{path}/redactions", {"fields": ["description"], "reason": "r"})
    assert (again[0], again[1]) == (201, after)
    window = (await api.post("/maintenance", {**DRILL, "title": "Move", "description": "Says Jane"}))[1]
    _, after, _ = await api.post(f"/maintenance/{window['id']}/redactions", {"fields": ["description"], "reason": "r"})
    assert (after["title"], after["description"]) == ("Move", "[redacted]")

"""Check that an invalid field or query parameter is named in a 400 and changes nothing."""

import json

import pytest

from tests.api.conftest import head, refused

WINDOW = {"title": "W", "scheduled_start": "2036-06-01T02:00:00Z", "scheduled_end": "2036-06-01T04:00:00Z"}
HUGE = 10**30

INCIDENT_BODIES = [
    ({}, "title: is required"),
    ({"title": None}, "title: must be a string"),
    ({"title": 5}, "title: must be a string"),
    ({"title": ""}, "title: must not be blank"),
    ({"title": " \n\t"}, "title: must not be blank"),
    ({"title": "x" * 301}, "title: must have at most 300 characters"),
    ({"title": "a\x00b"}, "title: must not contain the character NUL"),
    ({"title": "T", "description": 1}, "description: must be a string or null"),
    ({"title": "T", "description": "\x00"}, "description: must not contain the character NUL"),
    ({"title": "T", "severity": "terrible"}, "severity: must be one of informational, degraded, partial_outage"),
    ({"title": "T", "severity": 3}, "severity: must be one of informational"),
    ({"title": "T", "visibility": "secret"}, "visibility: must be one of public, internal"),
    ({"title": "T", "service_ids": 1}, "service_ids: must be an array"),
    ({"title": "T", "service_ids": ["1"]}, "service_ids[0]: must be an integer"),
    ({"title": "T", "service_ids": [True]}, "service_ids[0]: must be an integer"),
    ({"title": True}, "title: must be a string"),
    ({"title": ["T"]}, "title: must be a string"),
    ({"title": "\u2003\u00a0"}, "title: must not be blank"),
    ({"title": "T", "severity": "DEGRADED"}, "severity: must be one of informational"),
    ({"title": "T", "severity": "degraded\x00"}, "severity: must be one of informational"),
    ({"title": "T", "visibility": {}}, "visibility: must be one of public, internal"),
    ({"title": "T", "description": "x" * 50_001}, "description: must have at most 50000 characters"),
    ({"title": "T", "service_ids": {"0": 1}}, "service_ids: must be an array"),
    ({"title": "T", "service_ids": "1"}, "service_ids: must be an array"),
    ({"title": "T", "service_ids": [None]}, "service_ids[0]: must be an integer"),
    ({"title": "T", "service_ids": [[1]]}, "service_ids[0]: must be an integer"),
    ({"title": "T", "service_ids": [1.0]}, "service_ids[0]: must be an integer"),
    ({"title": "T", "service_ids": [1, 2, "x"]}, "service_ids[2]: must be an integer"),
    ({"title": "T", "service_ids": [5, 4, 5]}, "service_ids: no such service: 4, 5"),
    ({"title": "T", "service_ids": [-(2**63)]}, "service_ids[0]: must be an integer from 1"),
    ({"title": "T", "service_ids": [1.5]}, "service_ids[0]: must be an integer"),
    ({"title": "T", "service_ids": [0]}, "service_ids[0]: must be an integer from 1"),
    ({"title": "T", "service_ids": [-1]}, "service_ids[0]: must be an integer from 1"),
    ({"title": "T", "service_ids": [HUGE]}, "service_ids[0]: must be an integer"),
    ({"title": "T", "service_ids": [2**63]}, "service_ids[0]: must be an integer from 1"),
    ({"title": "T", "service_ids": [2**63 - 1]}, "service_ids: no such service: 9223372036854775807"),
    ([], "body: must be a JSON object"),
    ("text", "body: must be a JSON object"),
    (7, "body: must be a JSON object"),
    (True, "body: must be a JSON object"),
    ([{"title": "T"}], "body: must be a JSON object"),
]

WINDOW_BODIES = [
    ({"scheduled_start": None}, "scheduled_start: must be an RFC 3339 timestamp"),
    ({"scheduled_start": 1780279200}, "scheduled_start: must be an RFC 3339 timestamp"),
    ({"scheduled_start": "tomorrow"}, "scheduled_start: must be an RFC 3339 timestamp"),
    ({"scheduled_start": "2036-06-01"}, "scheduled_start: must be an RFC 3339 timestamp"),
    ({"scheduled_start": "2036-06-01T02:00:00"}, "scheduled_start: must have a time zone"),
    ({"scheduled_end": "2036-06-01T02:00:00Z"}, "scheduled_end: must be after scheduled_start"),
    ({"scheduled_end": "2036-06-01T03:00:00+02:00"}, "scheduled_end: must be after scheduled_start"),
    ({"scheduled_end": "9999-12-31T23:59:59-12:00"}, "scheduled_end: is out of range"),
    ({"scheduled_start": "0001-01-01T00:00:00+12:00"}, "scheduled_start: is out of range"),
    ({"scheduled_start": "0001-01-01T00:00:00+00:01"}, "scheduled_start: is out of range"),
    ({"scheduled_end": "9999-12-31T23:59:59-00:01"}, "scheduled_end: is out of range"),
    ({"scheduled_end": "10000-01-01T00:00:00Z"}, "scheduled_end: must be an RFC 3339 timestamp"),
    ({"scheduled_end": "2036-02-30T00:00:00Z"}, "scheduled_end: must be an RFC 3339 timestamp"),
    ({"scheduled_end": "2036-06-01T24:00:00Z"}, "scheduled_end: must be an RFC 3339 timestamp"),
    ({"scheduled_end": "2036-06-01T04:00:60Z"}, "scheduled_end: must be an RFC 3339 timestamp"),
    ({"scheduled_end": "2036-06-01T04:00:00+24:00"}, "scheduled_end: must be an RFC 3339 timestamp"),
    ({"scheduled_end": "2036-06-01T04:00:00\x00Z"}, "scheduled_end: must"),
    ({"scheduled_end": ""}, "scheduled_end: must be an RFC 3339 timestamp"),
    ({"scheduled_end": []}, "scheduled_end: must be an RFC 3339 timestamp"),
    ({"scheduled_end": True}, "scheduled_end: must be an RFC 3339 timestamp"),
    ({"scheduled_end": "2036-06-01T01:59:59Z"}, "scheduled_end: must be after scheduled_start"),
    ({"title": "a\x00b"}, "title: must not contain the character NUL"),
    ({"title": "x" * 301}, "title: must have at most 300 characters"),
    ({"title": 1}, "title: must be a string"),
    ({"description": "a\x00b"}, "description: must not contain the character NUL"),
    ({"description": "x" * 50_001}, "description: must have at most 50000 characters"),
    ({"description": False}, "description: must be a string or null"),
    ({"service_ids": [True]}, "service_ids[0]: must be an integer"),
    ({"service_ids": [2**64]}, "service_ids[0]: must be an integer"),
    ({"exclude_from_sla": None}, "exclude_from_sla: must be true or false"),
    ({"auto_complete": 0}, "auto_complete: must be true or false"),
    ({"title": " "}, "title: must not be blank"),
    ({"visibility": "x"}, "visibility: must be one of"),
    ({"exclude_from_sla": "yes"}, "exclude_from_sla: must be true or false"),
    ({"suppress_alerts": 1}, "suppress_alerts: must be true or false"),
    ({"auto_start": None}, "auto_start: must be true or false"),
    ({"service_ids": [99]}, "service_ids: no such service: 99"),
]


@pytest.mark.parametrize(("body", "message"), INCIDENT_BODIES)
async def test_a_bad_incident(api, parts, acme, body, message):
    before = await head(parts, acme.id)
    status, answer, headers = await api.send("POST", "/api/v1/incidents", json=body)
    assert (status, answer) == (400, refused(answer["error"]))
    assert answer["error"].startswith(message)
    assert headers["X-Request-ID"]
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("body", [{"severity": None}, {"visibility": None}, {"description": None, "service_ids": None}])
async def test_null_for_an_optional_field_equals_its_absence(api, body):
    status, created, _ = await api.post("/incidents", {"title": "T", **body})
    assert (status, created["severity"], created["visibility"]) == (201, "degraded", "public")
    assert (created["description"], created["service_ids"]) == (None, [])


@pytest.mark.parametrize(("change", "message"), WINDOW_BODIES)
async def test_a_bad_window(api, parts, acme, change, message):
    before = await head(parts, acme.id)
    status, answer, _ = await api.post("/maintenance", {**WINDOW, **change})
    assert (status, answer) == (400, refused(answer["error"]))
    assert answer["error"].startswith(message)
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("field", ["title", "scheduled_start", "scheduled_end"])
async def test_a_window_lacks_a_field(api, field):
    body = {key: value for key, value in WINDOW.items() if key != field}
    assert (await api.post("/maintenance", body))[:2] == (400, refused(f"{field}: is required"))


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("", {"title": None}, "title: must be a string"),
        ("", {"title": " "}, "title: must not be blank"),
        ("", {"title": "x" * 301}, "title: must have at most 300"),
        ("", {"title": "\x00"}, "title: must not contain"),
        ("", {"description": "\x00"}, "description: must not contain"),
        ("", {"description": []}, "description: must be a string or null"),
        ("", {"postmortem": "\x00"}, "postmortem: must not contain"),
        ("", {"postmortem": 1}, "postmortem: must be a string or null"),
        ("", {"root_cause": "x" * 50_001}, "root_cause: must have at most"),
        ("", {"service_ids": [0]}, "service_ids[0]: must be an integer from 1"),
        ("", {"service_ids": [1.0]}, "service_ids[0]: must be an integer"),
        ("", {"title": "fine", "severity": "bad"}, "severity: must be one of"),
        ("", {"title": "fine", "status": "resolved", "visibility": "bad"}, "visibility: must be one of"),
        ("", [], "body: must be a JSON object"),
        ("", None, "body: must be a JSON object"),
        ("", {"status": "closed"}, "status: must be one of investigating, identified, monitoring, resolved"),
        ("", {"status": None}, "status: must be one of"),
        ("", {"severity": None}, "severity: must be one of"),
        ("", {"visibility": 1}, "visibility: must be one of"),
        ("", {"root_cause": "\x00"}, "root_cause: must not contain"),
        ("", {"service_ids": [77]}, "service_ids: no such service: 77"),
        ("/updates", {}, "message: is required"),
        ("/updates", {"message": " "}, "message: must not be blank"),
        ("/updates", {"message": "\x00"}, "message: must not contain"),
        ("/updates", {"message": "m", "status": "x"}, "status: must be one of"),
        ("/updates", {"message": "m", "is_public": "no"}, "is_public: must be true or false"),
        ("/updates", {"message": None}, "message: must be a string"),
        ("/updates", {"message": "x" * 50_001}, "message: must have at most"),
        ("/updates", {"message": "m", "status": None}, "status: must be one of"),
        ("/updates", {"message": "m", "is_public": None}, "is_public: must be true or false"),
        ("/updates", [], "body: must be a JSON object"),
        ("/resolve", {"root_cause": "\x00"}, "root_cause: must not contain"),
        ("/resolve", {"postmortem": "\x00"}, "postmortem: must not contain"),
        ("/resolve", {"postmortem": "x" * 50_001}, "postmortem: must have at most"),
        ("/resolve", {"root_cause": 1}, "root_cause: must be a string or null"),
        ("/resolve", [], "body: must be a JSON object"),
    ],
)
async def test_a_bad_change(api, parts, acme, path, body, message):
    _, created, _ = await api.post("/incidents", {"title": "A"})
    method = "POST" if path else "PATCH"
    before = await head(parts, acme.id)
    octets, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    where = f"/api/v1/incidents/{created['id']}{path}"
    status, answer, _ = await api.send(method, where, data=octets, headers=headers)
    assert (status, answer) == (400, refused(answer["error"]))
    assert answer["error"].startswith(message)
    assert await head(parts, acme.id) == before
    assert (await api.get(f"/incidents/{created['id']}"))[1] == created


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/incidents?limit=0", "limit: must be a whole number, 1 or more"),
        ("/incidents?limit=-1", "limit: "),
        ("/incidents?limit=ten", "limit: "),
        ("/incidents?limit=1e3", "limit: "),
        ("/incidents?limit=", "limit: "),
        ("/incidents?limit=99999999999999999999", "limit: "),
        ("/incidents?limit=%D9%A1", "limit: "),
        ("/incidents?limit=0&limit=5", "limit: "),
        ("/incidents?limit=%2B5", "limit: "),
        ("/incidents?limit=5.0", "limit: "),
        ("/incidents?limit=5%00", "limit: "),
        ("/incidents?limit=5%0A", "limit: "),
        ("/incidents?limit=true", "limit: "),
        ("/services?limit=0", "limit: "),
        ("/maintenance?limit=-1", "limit: "),
        ("/incidents?offset=", "offset: "),
        ("/incidents?offset=x", "offset: "),
        ("/services?offset=-1", "offset: "),
        ("/maintenance?offset=1e3", "offset: "),
        ("/incidents?status=", "status: must be one of"),
        ("/incidents?status=Resolved", "status: must be one of"),
        ("/incidents?status=resolved%00", "status: must be one of"),
        ("/incidents?offset=-1", "offset: must be a whole number, 0 or more"),
        ("/incidents?offset=9223372036854775808", "offset: "),
        ("/incidents?status=closed", "status: must be one of investigating"),
        ("/incidents?severity=bad", "severity: must be one of"),
        ("/services?status=down", "status: must be one of operational"),
        ("/services?visibility=x", "visibility: must be one of"),
        ("/services?search=%00", "search: must not contain"),
        ("/maintenance?status=open", "status: must be one of scheduled"),
    ],
)
async def test_a_bad_query_parameter(api, path, message):
    status, answer, _ = await api.get(path)
    assert (status, answer) == (400, refused(answer["error"]))
    assert answer["error"].startswith(message)


@pytest.mark.parametrize("kind", ["incidents", "maintenance", "services"])
async def test_an_offset_beyond_the_end_is_an_empty_page(api, kind):
    status, page, headers = await api.get(f"/{kind}?offset=9223372036854775807&limit=9223372036854775807")
    assert (status, page) == (200, {kind: [], "total": 0, "limit": 200, "offset": 2**63 - 1})
    assert 'rel="next"' not in headers.get("Link", "")


@pytest.mark.parametrize("search", ["%ff%fe", "%ED%A0%80", "%zz%", "'; DROP TABLE services; --", "x" * 4000, "%25%5C"])
async def test_whatever_is_searched_for_is_only_text(api, search):
    assert (await api.get(f"/services?search={search}"))[1]["services"] == []


@pytest.mark.parametrize(
    "text", ["e\u0301\u202e\ufffe\x7f\x01", "🚀" * 300, "'; DROP TABLE incidents; --", '\\u0000 \\\\ "']
)
async def test_whatever_else_is_written_comes_back_as_it_was(api, text):
    body = {"title": text, "description": text}
    status, made, _ = await api.post("/incidents", body)
    assert (status, made["title"], made["updates"][0]["message"]) == (201, text, text)
    assert (await api.get("/incidents"))[1]["incidents"][0]["description"] == text

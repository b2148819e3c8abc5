"""Whatever is wrong with what was sent: 400 that names the field, or what HTTP has a status of its own for."""

import json

import pytest

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
    ({"title": "T", "service_ids": [1.5]}, "service_ids[0]: must be an integer"),
    ({"title": "T", "service_ids": [0]}, "service_ids[0]: must be an integer from 1"),
    ({"title": "T", "service_ids": [-1]}, "service_ids[0]: must be an integer from 1"),
    ({"title": "T", "service_ids": [HUGE]}, "service_ids[0]: must be an integer"),
    ({"title": "T", "service_ids": [2**63]}, "service_ids[0]: must be an integer from 1"),
    ({"title": "T", "service_ids": [2**63 - 1]}, "service_ids: no such service: 9223372036854775807"),
    ([], "body: must be a JSON object"),
    ("text", "body: must be a JSON object"),
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
    ({"title": " "}, "title: must not be blank"),
    ({"visibility": "x"}, "visibility: must be one of"),
    ({"exclude_from_sla": "yes"}, "exclude_from_sla: must be true or false"),
    ({"suppress_alerts": 1}, "suppress_alerts: must be true or false"),
    ({"auto_start": None}, "auto_start: must be true or false"),
    ({"service_ids": [99]}, "service_ids: no such service: 99"),
]


@pytest.mark.parametrize(("body", "message"), INCIDENT_BODIES)
async def test_a_bad_incident(api, body, message):
    status, answer, headers = await api.send("POST", "/api/v1/incidents", json=body)
    assert (status, set(answer)) == (400, {"error"})
    assert answer["error"].startswith(message)
    assert headers["X-Request-ID"]
    assert (await api.get("/incidents"))[1]["total"] == 0


@pytest.mark.parametrize(("change", "message"), WINDOW_BODIES)
async def test_a_bad_window(api, change, message):
    status, answer, _ = await api.post("/maintenance", {**WINDOW, **change})
    assert (status, set(answer)) == (400, {"error"})
    assert answer["error"].startswith(message)
    assert (await api.get("/maintenance"))[1]["total"] == 0


@pytest.mark.parametrize("field", ["title", "scheduled_start", "scheduled_end"])
async def test_a_window_lacks_a_field(api, field):
    body = {key: value for key, value in WINDOW.items() if key != field}
    assert (await api.post("/maintenance", body))[:2] == (400, {"error": f"{field}: is required"})


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("", {"title": None}, "title: must be a string"),
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
        ("/resolve", {"root_cause": 1}, "root_cause: must be a string or null"),
        ("/resolve", [], "body: must be a JSON object"),
    ],
)
async def test_a_bad_change(api, path, body, message):
    _, created, _ = await api.post("/incidents", {"title": "A"})
    method = "POST" if path else "PATCH"
    status, answer, _ = await api.send(method, f"/api/v1/incidents/{created['id']}{path}", json=body)
    assert (status, set(answer)) == (400, {"error"})
    assert answer["error"].startswith(message)
    assert (await api.get(f"/incidents/{created['id']}"))[1] == created


@pytest.mark.parametrize(
    "octets",
    [
        b"{",
        b"",
        b"nonsense",
        b"null",
        b'{"title": "\xff"}',
        b'{"title": "\\ud800"}',
        b'{"title": "a"} trailing',
        b"[" * 60_000,
        b'{"title": "T", "x": ' + b"[" * 60_000,
        b'{"x":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"title": NaN}',
    ],
)
async def test_what_is_no_json_is_a_bad_request(api, octets):
    headers = {"Content-Type": "application/json"}
    status, answer, _ = await api.send("POST", "/api/v1/incidents", data=octets, headers=headers)
    assert (status, set(answer)) == (400, {"error"})
    assert answer["error"].startswith(("body: ", "title: "))
    assert (await api.get("/incidents"))[1]["total"] == 0


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
async def test_another_content_type_is_refused(api, content_type):
    headers = {"Content-Type": content_type}
    status, answer, _ = await api.send("POST", "/api/v1/incidents", data=b'{"title": "T"}', headers=headers)
    assert (status, set(answer)) == (415, {"error"})


async def test_json_with_parameters_or_a_suffix_is_json(api):
    for content_type in ("application/json; charset=utf-8", "application/merge-patch+json"):
        headers = {"Content-Type": content_type}
        assert (await api.send("POST", "/api/v1/incidents", data=b'{"title": "T"}', headers=headers))[0] == 201


async def test_a_body_of_more_than_64_kib_is_too_large(api):
    async def in_chunks(octets):
        for start in range(0, len(octets), 1000):
            yield octets[start : start + 1000]

    headers = {"Content-Type": "application/json"}
    for size, expected in ((65_536, 201), (65_537, 413), (500_000, 413)):
        octets = json.dumps({"title": "T"}).encode().ljust(size)
        for data in (octets, in_chunks(octets)):
            status, answer, _ = await api.send("POST", "/api/v1/incidents", data=data, headers=headers)
            assert status == expected
            assert expected == 201 or set(answer) == {"error"}


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
    assert (status, set(answer)) == (400, {"error"})
    assert answer["error"].startswith(message)


async def test_an_offset_beyond_the_end_is_an_empty_page(api):
    assert (await api.get("/incidents?offset=9223372036854775807"))[1]["incidents"] == []

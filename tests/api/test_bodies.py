"""Check bodies that are invalid JSON, of another content type, too large, truncated or wrongly encoded."""

import asyncio
import gzip
import json

import pytest
import structlog

from tests.api.conftest import DRILL, head, refused

JSON = {"Content-Type": "application/json"}


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
        b"{'title': 'T'}",
        b'{"title": "T",}',
        b'{"title": "T"}{"title": "T"}',
        b'\xef\xbb\xbf{"title": "T"}',
        b'{"title": "T", "x": "\\udc00"}',
        b'{"title": "T", "x": "\x01"}',
        b'{"title": "\xed\xa0\x80"}',
        b"\x00" * 100,
        b" " * 1000,
        b'{"title": "T", "x": {"y": ' + b"[" * 30_000 + b"]" * 30_000 + b"}}",
    ],
)
async def test_invalid_json_is_a_bad_request(api, parts, acme, octets):
    _, created, _ = await api.post("/incidents", {"title": "A"})
    _, window, _ = await api.post("/maintenance", DRILL)
    before = await head(parts, acme.id)
    for method, path in (
        ("POST", "/incidents"),
        ("PATCH", f"/incidents/{created['id']}"),
        ("POST", f"/incidents/{created['id']}/updates"),
        ("POST", "/maintenance"),
        ("PATCH", f"/maintenance/{window['id']}"),
    ):
        status, answer, headers = await api.send(method, f"/api/v1{path}", data=octets, headers=JSON)
        assert (status, answer) == (400, refused(answer["error"]))
        assert answer["error"].startswith(("body: ", "title: ", "message: ", "scheduled_start: "))
        assert headers["X-Request-ID"]
    assert await head(parts, acme.id) == before


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


@pytest.mark.parametrize("name", ["x", "tenant_id", "id", "created_at", "status"])
async def test_fields_that_are_not_asked_for_are_skipped_whatever_they_hold(api, name):
    for value in ("1" * 5000, "1e400", "[" * 900 + "]" * 900, '"\\u0000"', "null", "-1e-999", '{"":{"":[]}}'):
        octets = f'{{"title": "T", "{name}": {value}}}'.encode()
        status, made, _ = await api.send("POST", "/api/v1/incidents", data=octets, headers=JSON)
        assert (status, made["title"], made["status"]) == (201, "T", "investigating")


async def test_a_body_without_any_declared_type_is_refused(api):
    data = b'{"title": "T"}'
    status, answer, _ = await api.send("POST", "/api/v1/incidents", data=data, skip_auto_headers=["Content-Type"])
    assert (status, set(answer)) == (415, {"error"})
    assert (await api.get("/incidents"))[1]["total"] == 0


async def test_a_body_may_be_compressed_but_not_be_a_bomb(api):
    async def send(octets, encoding):
        headers = {**JSON, "Content-Encoding": encoding}
        return (await api.send("POST", "/api/v1/incidents", data=octets, headers=headers))[:2]

    assert (await send(gzip.compress(b'{"title": "T"}'), "gzip"))[0] == 201
    assert (await send(gzip.compress(b'{"title": "T"}'.ljust(40_000_000)), "gzip"))[0] == 413
    for encoding in ("gzip", "deflate"):
        status, answer = await send(b'{"title": "T"}', encoding)
        assert status == 400
        assert answer == {"error": "body: did not arrive whole, or is not encoded as Content-Encoding says"}
    assert (await api.get("/incidents"))[1]["total"] == 1


async def test_a_client_that_leaves_in_the_middle_is_no_defect_of_ours(api, parts, acme):
    host, port = api.base_url.removeprefix("http://").split(":")
    before = await head(parts, acme.id)
    with structlog.testing.capture_logs() as lines:
        _, appender = await asyncio.open_connection(host, int(port))
        request = f"POST /api/v1/incidents HTTP/1.1\r\nHost: x\r\nAuthorization: {api.headers['Authorization']}\r\n"
        appender.write(f"{request}Content-Type: application/json\r\nContent-Length: 14\r\n\r\n".encode() + b'{"title"')
        await appender.drain()
        assert (await api.get("/health"))[0] == 200  # by now the server is at that body
        appender.close()
        await appender.wait_closed()
        assert (await api.get("/health"))[0] == 200
    assert lines == []
    assert await head(parts, acme.id) == before


@pytest.mark.parametrize("expect", ["100-continue", "100-Continue", "something-else"])
async def test_an_expect_header_never_blocks_a_request(api, expect):
    options = {"json": {"title": "T"}, "headers": {"Expect": expect}}
    status, _, headers = await asyncio.wait_for(api.send("POST", "/api/v1/incidents", **options), 5)
    assert status == 201
    assert headers["X-Request-ID"]

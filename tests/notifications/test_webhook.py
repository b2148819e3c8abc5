import asyncio
import errno
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_network

import aiohttp
import msgspec
import pytest
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from opsentry.notifications.channel import BadTarget, Outcome
from opsentry.notifications.channels import Dependencies, webhook
from opsentry.notifications.messages.signing import new_secret
from opsentry.notifications.transport.egress import http_session
from opsentry.notifications.transport.http import USER_AGENT
from opsentry.settings import Settings
from tests.notifications.conftest import LOOPBACK, Names, answering
from tests.notifications.messages import endpoint, incident, message
from tests.waiting import GENEROUS_SECONDS

SECRET = new_secret()
SETTINGS = Settings(webhook_allowed_networks=LOOPBACK)


@pytest.fixture
async def channel():
    async with http_session(LOOPBACK, 10) as http:
        yield webhook.make(Dependencies(SETTINGS, http))


async def raw(answer, *, hang_up=True):
    """Answer every request with these bytes."""

    async def handle(reader, appender):
        await reader.readuntil(b"\r\n\r\n")
        appender.write(answer)
        await appender.drain()
        if not hang_up:
            await reader.read()
        appender.close()

    return await asyncio.start_server(handle, "127.0.0.1", 0)


def url_of(server):
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


async def test_a_receiver_gets_a_signed_post(channel):
    seen = []

    async def answer(request):
        seen.append((request.method, request.path_qs, dict(request.headers), await request.read()))
        return web.Response(status=202)

    async with answering(answer) as url:
        assert await channel.send(endpoint(f"{url}/hook?a=1", SECRET), message()) == Outcome(response_status=202)
    ((method, path, headers, body),) = seen
    assert (method, path) == ("POST", "/hook?a=1")
    assert headers["Content-Type"] == "application/json"
    assert headers["User-Agent"] == USER_AGENT
    assert USER_AGENT.startswith("Opsentry/")
    assert headers["webhook-id"] == message().id
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 5
    assert Webhook(SECRET).verify(body, headers) == msgspec.json.decode(body)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body + b" ", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(body, headers)


async def test_both_secrets_sign_during_a_rotation(channel):
    seen = []

    async def answer(request):
        seen.append((dict(request.headers), await request.read()))
        return web.Response()

    newer = new_secret()
    async with answering(answer) as url:
        await channel.send(endpoint(url, newer, SECRET), message(incident(title="Zażółć \U0001f525 \u202e")))
    ((headers, body),) = seen
    assert len(headers["webhook-signature"].split(" ")) == 2
    assert Webhook(newer).verify(body, headers)
    assert Webhook(SECRET).verify(body, headers)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_2xx_is_a_success(channel, status):
    async def answer(_):
        return web.Response(status=status)

    async with answering(answer) as url:
        assert await channel.send(endpoint(url, SECRET), message()) == Outcome(response_status=status)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 410, 418, 429, 500, 502, 503, 504, 599])
async def test_any_other_status_is_a_failure(channel, status):
    async def answer(_):
        return web.Response(status=status, text="secret words of theirs")

    async with answering(answer) as url:
        outcome = await channel.send(endpoint(url, SECRET), message())
    assert outcome == Outcome(f"answered {status}", status, endpoint_gone=status == 410)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_redirects_are_not_followed(channel, listener, status):
    seen = []

    async def answer(request):
        seen.append(request.path)
        return web.Response(status=status, headers={"Location": f"http://127.0.0.1:{listener.port}/"})

    async with answering(answer) as url:
        outcome = await channel.send(endpoint(url, SECRET), message())
    assert outcome == Outcome(f"answered {status}: redirects are not followed", status)
    assert (len(seen), listener.connections) == (1, 0)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        ("86400", 86_400),
        ("86401", 86_400),
        ("9" * 4000, 86_400),
        (timedelta(hours=2), 7_200),
        (timedelta(days=300), 86_400),
        (-timedelta(hours=2), 0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("Mon, 99 Foo 99999 99:99:99 GMT", None),
        ("٣", None),
    ],
)
async def test_retry_after_is_read_as_seconds_or_date(channel, header, seconds):
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(UTC) + header, usegmt=True)

    async def answer(_):
        return web.Response(status=503, headers={"Retry-After": header})

    async with answering(answer) as url:
        outcome = await channel.send(endpoint(url, SECRET), message())
    assert (outcome.error, outcome.response_status) == ("answered 503", 503)
    assert outcome.retry_after == (None if seconds is None else pytest.approx(seconds, abs=60))


async def test_a_connection_is_reused_after_a_short_response_only(channel):
    peers = []

    async def answer(request):
        peers.append(request.transport.get_extra_info("peername"))
        return web.Response(text="x" * int(request.query["size"]))

    async with answering(answer) as url:
        for size in (0, 1000, 0, 1_000_000, 0):
            assert (await channel.send(endpoint(f"{url}/?size={size}", SECRET), message())).error is None
    assert peers[0] == peers[1] == peers[2] == peers[3]
    assert peers[3] != peers[4]


async def test_an_endless_response_body_is_not_read(channel):
    async def answer(request):
        response = web.StreamResponse(headers={"Content-Encoding": "gzip"})
        await response.prepare(request)
        while True:
            await response.write(b"x" * 1000)

    async with answering(answer) as url, asyncio.timeout(GENEROUS_SECONDS):
        assert await channel.send(endpoint(url, SECRET), message()) == Outcome(response_status=200)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_a_missing_response_times_out(channel, monkeypatch, head):
    monkeypatch.setattr("opsentry.notifications.transport.http._TIMEOUT", aiohttp.ClientTimeout(total=0.2))
    async with await raw(head, hang_up=False) as server:
        assert await channel.send(endpoint(url_of(server), SECRET), message()) == Outcome("no answer within 15 s")


async def test_a_status_counts_without_its_body(channel, monkeypatch):
    monkeypatch.setattr("opsentry.notifications.transport.http._TIMEOUT", aiohttp.ClientTimeout(total=1.0))
    async with await raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx", hang_up=False) as server:
        assert await channel.send(endpoint(url_of(server), SECRET), message()) == Outcome(response_status=200)
    async with await raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx") as server:
        assert await channel.send(endpoint(url_of(server), SECRET), message()) == Outcome(response_status=200)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "the connection was closed without a response"),
        (b"HTTP/1.1 200", "the connection was closed without a response"),
        (b"220 mail.example.com ESMTP\r\n", "the response is not HTTP"),
        (b"HTTP/1.1 abc\r\n\r\n", "the response is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", "the response is not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n", "the response is not HTTP"),
    ],
)
async def test_a_malformed_response_is_a_failure(channel, answer, error):
    async with await raw(answer) as server:
        assert await channel.send(endpoint(url_of(server), SECRET), message()) == Outcome(error)


async def test_connection_errors_reveal_no_address_and_no_query(unused_tcp_port):
    names = Names({"inside.example": [["10.1.2.3"]]})
    async with http_session((ip_network("127.0.0.1/32"),), 10, names) as http:
        channel = webhook.make(Dependencies(SETTINGS, http))
        said = {}
        for url in (
            f"http://127.0.0.1:{unused_tcp_port}/?key=hidden",
            "http://nowhere.example/?key=hidden",
            "http://inside.example/?key=hidden",
            "https://inside.example/?key=hidden",
            "http://[::1]/?key=hidden",
            "http://2130706433/?key=hidden",
            "nonsense",
        ):
            outcome = await channel.send(endpoint(url, SECRET), message())
            assert outcome._replace(error=None) == Outcome()
            said[url] = outcome.error
    assert list(said.values()) == [
        "connection refused",
        "the host name cannot be resolved",
        "connections to this host's address are not allowed",
        "connections to this host's address are not allowed",
        "connections to this host's address are not allowed",
        "the URL cannot be used",
        "the URL cannot be used",
    ]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
async def test_a_lack_of_sockets_is_an_internal_failure(channel, monkeypatch, number):
    def none_left(*_):
        raise OSError(number, "no more")

    monkeypatch.setattr("opsentry.notifications.transport.egress.socket.socket", none_left)
    outcome = await channel.send(endpoint("http://127.0.0.1:1/", SECRET), message())
    assert outcome == Outcome("too many open connections on our side", internal_failure=True)


def test_a_target_is_validated_and_displayed_whole():
    channel = webhook.make(Dependencies(Settings(), None))  # type: ignore[arg-type]
    assert (channel.name, channel.signs_messages, channel.has_secret_target) == ("webhook", True, False)
    assert (
        channel.validate_target("https://example.com/a")
        == channel.display_target("https://example.com/a")
        == "https://example.com/a"
    )
    with pytest.raises(BadTarget):
        channel.validate_target("http://127.0.0.1/")


# ------------------------------------------------------------------------------------------------ TLS


async def test_certificates_are_verified(certified, monkeypatch):
    context, file = certified
    names = Names({"receiver.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]})

    async def answer(_):
        return web.Response()

    async def said(url):
        async with http_session(LOOPBACK, 10, names) as http:
            return await webhook.make(Dependencies(SETTINGS, http)).send(endpoint(url, SECRET), message())

    async with answering(answer, context) as url, answering(answer) as plain:
        receiver = url.replace("127.0.0.1", "receiver.example")
        assert await said(receiver) == Outcome("TLS: self-signed certificate")
        assert (await said(plain.replace("http:", "https:"))).error.startswith("TLS: ")
        trusting = ssl.create_default_context(cafile=file)
        monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
        assert await said(receiver) == Outcome(response_status=200)
        for wrong in (url, url.replace("127.0.0.1", "other.example")):
            assert (await said(wrong)).error.startswith("TLS: ")

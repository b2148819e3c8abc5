import asyncio
import socket
from ipaddress import ip_address, ip_network

import aiohttp
import pytest
from aiohttp import web

from opsentry.notifications.channel import BadTarget
from opsentry.notifications.transport.egress import BlockedAddress, check_url, http_session, is_allowed
from tests.notifications.conftest import LOOPBACK, Names, answering, tried

# Addresses that nobody may make us connect to, as `getaddrinfo` or a URL may have them.
CLOSED = """
127.0.0.1 127.1.2.3 127.255.255.255 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1
169.254.169.254 169.254.0.1 100.64.0.1 100.100.100.200 100.127.255.255 192.0.0.1 192.0.0.8 192.0.0.170 192.0.0.192
192.0.2.1 198.51.100.1 203.0.113.1 198.18.0.1 198.19.255.255 192.88.99.1 224.0.0.1 233.252.0.1 239.255.255.255
240.0.0.1 255.255.255.254 255.255.255.255
:: ::1 ::2 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0.0.0.0
::ffff:0:127.0.0.1 64:ff9b::127.0.0.1 64:ff9b::8.8.8.8 64:ff9b:1::127.0.0.1 64:ff9b:1:ffff::1 100::1 100:0:0:1::1
2001::1 2001:0:7f00:1:: 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:a00:1::1 2002:808:808::1
3fff::1 5f00::1 fc00::1 fd00::1 fd00:ec2::254 fe80::1 fe80::a9fe:a9fe fec0::1 ff02::1 ff0e::1 4000::1 e000::1
2a00:1450:4001:80e:0:5efe:7f00:1 2a00:1450:4001:80e:200:5efe:a00:1
""".split()  # noqa: SIM905

OPEN = """
8.8.8.8 1.1.1.1 100.63.255.255 100.128.0.1 172.15.255.255 172.32.0.1 192.0.1.1 198.17.255.255 198.20.0.1 223.255.255.1
9.255.255.255 11.0.0.1 126.255.255.255 128.0.0.1 169.253.255.255 192.167.1.1 192.169.1.1
2a00:1450:4001:80e::200e 2606:4700:4700::1111 2001:4860:4860::8888 2001:200::1 2003::1 ::ffff:8.8.8.8
""".split()  # noqa: SIM905

# Hosts of URLs that are loopback, or something else that is closed, in some notation.
NOTATIONS = """
127.0.0.1 127.1 127.0.1 2130706433 017700000001 0x7f000001 0X7F.0x0.0x0.0x1 0x7f.1 0177.0.0.1 0177.1 127.0.0.01 0 0x0
0.0.0.0 00000000000000000000177.0.0.1 127.0.0.1. 127.1. localhost LOCALHOST localhost. a.localhost 2852039166
0xa9fea9fe 169.254.43518 192.168.257 [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1]
[64:ff9b::7f00:1] [2002:7f00:1::] [2001:0:7f00:1::] [fe80::1%25eth0] [fe80::1%eth0] [fd00:ec2::254] [ff02::1]
[::1%25lo]
127\u30020\u30020\u30021 \uff11\uff12\uff17.0.0.1 \u2460\u2461\u2466.\u24ea.\u24ea.\u2460
127\uff0e0\uff0e0\uff0e1
255.255.255.255 \u24c1\u24c4\u24b8\u24b6\u24c1\u24bd\u24c4\u24c8\u24c9
""".split()  # noqa: SIM905

NO_TARGET = [
    "",
    "webhook",
    "//example.com/",
    "http:",
    "http:///",
    "http:example.com",
    "https://",
    "https://:443/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "unix:///run/docker.sock",
    "http+unix://%2Frun%2Fdocker.sock/",
    "ws://example.com/",
    "tcp://example.com:25/",
    "javascript:alert(1)",
    "https://user@example.com/",
    "https://user:password@example.com/",
    "https://@example.com/",
    "https://:@example.com/",
    "https://example.com@127.0.0.1/",
    "https://example.com\\@127.0.0.1/",
    "https://127.0.0.1\\.example.com/",
    "https://exam ple.com/",
    "https://example.com/a b",
    " https://example.com/",
    "https://example.com/\r\nX-Header: 1",
    "https://example.com/\x00",
    "https://example.com/\u202e",
    "https://example.com/\u2028",
    "https://example.com/\u00a0",
    "https://example.com:0/",
    "https://example.com:65536/",
    "https://example.com:-1/",
    "https://example.com:http/",
    "https://example.com:80:80/",
    "https://example..com/",
    "https://.example.com/",
    "https://ex%61mple.com/",
    "https://%31%32%37.0.0.1/",
    "https://[::1/",
    "https://[::1]example.com/",
    "https://[127.0.0.1]/",
    "https://[::g]/",
    "https://1.2.3.4.5/",
    "https://256.256.256.256/",
    "https://1.2.3.0x/",
    "https://example.1/",
    "https://134744072/",  # is 8.8.8.8, and nothing that aiohttp would dial
    "https://8.8.2056/",
    "https://" + "a" * 254 + "/",
    "https://example.com/" + "a" * 2_000,
]


def refused(got):
    return isinstance(getattr(got, "os_error", None), BlockedAddress)


@pytest.mark.parametrize("address", CLOSED)
def test_special_addresses_are_blocked(address):
    assert not is_allowed(ip_address(address), ())


@pytest.mark.parametrize("address", OPEN)
def test_public_addresses_are_allowed(address):
    assert is_allowed(ip_address(address), ())


@pytest.mark.parametrize("host", NOTATIONS)
def test_a_url_with_a_blocked_address_is_refused_in_any_notation(host):
    with pytest.raises(BadTarget, match="is blocked: only public addresses are allowed"):
        check_url(f"https://{host}:8443/hook?a=1", ())


@pytest.mark.parametrize("url", NO_TARGET)
def test_invalid_urls_are_refused(url):
    with pytest.raises(BadTarget) as caught:
        check_url(url, ())
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "http://example.com:8080/hook?a=1&b=%20#c",
        "https://EXAMPLE.com./",
        "https://b\u00fccher.example/",
        "https://xn--bcher-kva.example/",
        "https://a_b.example/@path",
        "https://8.8.8.8/",
        "https://[2a00:1450:4001:80e::200e]:8443/",
        "https://intranet/",
        "https://127.0.0.1.example.com/",
        "https://localhost.example.com/",
        "https://x/" + "a" * 1_990,
    ],
)
def test_valid_urls_are_kept_unchanged(url):
    assert check_url(url, ()) == url


def test_checking_a_url_resolves_no_name(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert check_url("https://metadata.google.internal/", ()) == "https://metadata.google.internal/"


def test_an_allowed_network_is_allowed_in_ipv4_and_mapped_form():
    networks = (ip_network("10.1.0.0/16"), ip_network("fd00:1::/32"))
    assert check_url("http://10.1.2.3:8000/", networks)
    assert check_url("http://[::ffff:10.1.2.3]/", networks)
    assert check_url("http://[fd00:1::5]/", networks)
    for host in ("10.2.0.1", "[::ffff:10.2.0.1]", "[fd00:2::5]", "[64:ff9b::10.1.2.3]"):
        with pytest.raises(BadTarget):
            check_url(f"http://{host}/", networks)
    assert check_url("http://localhost:8000/", LOOPBACK)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_no_notation_of_a_blocked_address_gets_a_connection(listener, scheme):
    async with http_session((), 10) as session:
        for host in NOTATIONS:
            got = await tried(session, f"{scheme}://{host}:{listener.port}/")
            # Some notations aiohttp does not take for a host to begin with.
            assert refused(got) or isinstance(got, aiohttp.InvalidURL | aiohttp.ClientConnectorDNSError), (host, got)
    assert listener.connections == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_no_name_of_a_blocked_address_gets_a_connection(listener, scheme):
    names = Names({f"n{number}.example": [[address]] for number, address in enumerate(CLOSED)})
    async with http_session((), 10, names) as session:
        for name in list(names.left):
            got = await tried(session, f"{scheme}://{name}:{listener.port}/")
            assert refused(got)
            assert str(got).endswith("[connections to this host's address are not allowed]")
    assert listener.connections == 0


async def test_each_address_of_a_name_is_checked(listener):
    names = Names({"many.example": [["127.0.0.1", "::1", "10.0.0.1", "::ffff:127.0.0.1"] * 5]})
    async with http_session((), 10, names) as session:
        assert refused(await tried(session, f"http://many.example:{listener.port}/"))
    assert listener.connections == 0


async def test_the_address_at_the_moment_of_connecting_counts(listener, monkeypatch):
    # ::1 stands for the public address that the name has when it is looked at.
    monkeypatch.setattr("opsentry.notifications.transport.egress._DNS_CACHE_SECONDS", -1)
    names = Names({"rebinding.example": [["::1"], ["127.0.0.1"], ["::1"]]})
    async with http_session((ip_network("::1/128"),), 10, names) as session:
        url = f"http://rebinding.example:{listener.port}/"
        assert await tried(session, url) == 200
        assert refused(await tried(session, url))
        assert await tried(session, url) == 200
    assert listener.connections == 2


async def test_a_resolver_that_answers_a_name_gets_no_connection(listener):
    names = Names({"again.example": [["localhost"]]})
    async with http_session(LOOPBACK, 10, names) as session:
        assert refused(await tried(session, f"http://again.example:{listener.port}/"))
    assert listener.connections == 0


async def test_an_allowed_network_gets_connections_by_name_and_by_address(listener):
    names = Names({"four.example": [["127.0.0.1"]], "six.example": [["::1"]], "mapped.example": [["::ffff:127.0.0.1"]]})
    async with http_session(LOOPBACK, 10, names) as session:
        for host in (*names.left, "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"):
            assert await tried(session, f"http://{host}:{listener.port}/") == 200
    assert listener.connections == 6


async def test_the_system_resolver_is_the_default(listener):
    async with http_session(LOOPBACK, 10) as session:
        assert await tried(session, f"http://localhost:{listener.port}/") == 200
        got = await tried(session, "http://no-such-name.invalid/")
        assert isinstance(got, aiohttp.ClientConnectorDNSError)
    async with http_session((), 10) as session:
        assert refused(await tried(session, f"http://localhost:{listener.port}/"))
    assert listener.connections == 1


async def test_proxies_in_the_environment_are_ignored(listener, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.port}")

    async def answer(_):
        return web.Response(status=204)

    async with answering(answer) as url, http_session(LOOPBACK, 10) as session:
        assert await tried(session, url) == 204
    async with http_session((), 10, Names({"a.example": [["10.0.0.1"]]})) as session:
        for scheme in ("http", "https"):
            assert refused(await tried(session, f"{scheme}://a.example/"))
    assert listener.connections == 0


async def test_cookies_are_not_kept():
    seen = []

    async def answer(request):
        seen.append(dict(request.cookies))
        response = web.Response()
        response.set_cookie("a", "1")
        return response

    async with answering(answer) as url, http_session(LOOPBACK, 10) as session:
        assert await tried(session, url) == await tried(session, url) == 200
    assert seen == [{}, {}]


async def test_connections_to_one_host_are_unlimited():
    together = asyncio.Barrier(200)

    async def answer(_):
        await together.wait()
        return web.Response()

    async with answering(answer) as url, http_session(LOOPBACK, 10) as session:
        assert set(await asyncio.gather(*(tried(session, url) for _ in range(200)))) == {200}

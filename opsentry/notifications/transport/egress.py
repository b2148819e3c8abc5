"""The egress filter: allow connections to public addresses, and to private networks that the operator allows.

The filter checks the address of each connection at the moment of connecting. An earlier resolution of the name proves
nothing: its owner may answer another address the next time (DNS rebinding).
"""

import asyncio
import errno
import re
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from opsentry.notifications.channel import BadTarget
from opsentry.settings import Network

MAX_URL_CHARACTERS = 2_000
_MAX_HOST_CHARACTERS = 253

_DNS_CACHE_SECONDS = 10
# Short, because at a thousand hosts a second each idle connection holds a file descriptor.
_KEEPALIVE_SECONDS = 5
# A name may have any number of addresses, and each would be tried in turn.
_MAX_ADDRESSES_PER_NAME = 8

# IANA's special-purpose address registry without its globally reachable entries, and the multicast block.
# `is_global` cannot replace this list: it differs between releases of Python and includes multicast.
_BLOCKED_IPV4 = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # behind a provider's NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, with the metadata of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
# Contains the whole public Internet, but no loopback, unique local, link-local, site-local, multicast, NAT64 or
# IPv4-compatible addresses.
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_BLOCKED_IPV6 = tuple(
    ip_network(network)
    for network in (
        "2001::/23",  # protocol assignments, with Teredo, ORCHID and benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which leads to any IPv4 address
        "3fff::/20",  # documentation
    )
)
# ISATAP: in any network, this interface identifier leads to the IPv4 address in the last 32 bits (RFC 5214).
_ISATAP_IDENTIFIERS = (0x0000_5EFE, 0x0200_5EFE)

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")
_LOCALHOST = IPv4Address("127.0.0.1")


class BlockedAddress(OSError):
    """The egress filter blocked a connection. The message does not name the address, which may reveal our network."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "connections to this host's address are not allowed")


def is_allowed(address: IPv4Address | IPv6Address, webhook_allowed_networks: Sequence[Network]) -> bool:
    """Return whether the egress filter allows connections to an address.

    An IPv4-mapped IPv6 address counts as the IPv4 address. Other IPv6 addresses that embed an IPv4 address (NAT64,
    6to4, Teredo, ISATAP, IPv4-compatible) are blocked, unless `webhook_allowed_networks` contains them literally.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address in network for network in webhook_allowed_networks):
        return True
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _BLOCKED_IPV4)
    if address not in _GLOBAL_IPV6 or any(address in network for network in _BLOCKED_IPV6):
        return False
    return int(address) >> 32 & 0xFFFF_FFFF not in _ISATAP_IDENTIFIERS


def check_url(url: str, webhook_allowed_networks: Sequence[Network]) -> str:
    """Return `url` if messages can be sent there, without resolving its host.

    Raises:
        BadTarget: It is no usable http(s) URL, or its host is a blocked address in any notation.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise BadTarget(f"must have at most {MAX_URL_CHARACTERS} characters")
    if any(character.isspace() or not character.isprintable() or character == "\\" for character in url):
        raise BadTarget("must not contain spaces, control characters or backslashes")
    try:
        # The HTTP client uses the same parser, so both see the same host.
        parsed = URL(url)
        host, port = parsed.raw_host, parsed.port
    except ValueError:
        raise BadTarget("must be a URL") from None
    if parsed.scheme not in {"http", "https"}:
        raise BadTarget("must be a URL that begins with https:// or http://")
    if not host:
        raise BadTarget("must name a host")
    if "@" in parsed.raw_authority or "@" in url.partition("//")[2].partition("/")[0]:
        raise BadTarget("must not contain a user or password")
    if not port:
        raise BadTarget("must have a port from 1 to 65535, or none")
    _check_host(host, webhook_allowed_networks)
    return url


def _check_host(host: str, webhook_allowed_networks: Sequence[Network]) -> None:
    if ":" in host:
        try:
            address: IPv4Address | IPv6Address | None = ip_address(host.partition("%")[0])
        except ValueError:
            raise BadTarget(f"{host} is not a valid address") from None
    elif len(host) > _MAX_HOST_CHARACTERS or not _NAME.fullmatch(host):
        raise BadTarget("must name a host")
    else:
        address = _parse_ipv4(host)
    if address is None:
        return
    if not is_allowed(address, webhook_allowed_networks):
        raise BadTarget(f"{host} is blocked: only public addresses are allowed")
    if isinstance(address, IPv4Address) and address != _LOCALHOST and host != str(address):
        raise BadTarget(f"{host} must be written {address}")


def _parse_ipv4(host: str) -> IPv4Address | None:
    """Return the IPv4 address that a host means in any notation of `inet_aton`; `None` for a name."""
    host = host.rstrip(".")
    last = host.rpartition(".")[2].lower()
    if last == "localhost":  # always loopback (RFC 6761)
        return _LOCALHOST
    if not _NUMBER.fullmatch(last):
        return None
    try:
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        raise BadTarget(f"{host} is not a valid address") from None


@asynccontextmanager
async def http_session(
    webhook_allowed_networks: Sequence[Network], max_lookups: int, resolver: AbstractResolver | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session behind the egress filter. It uses neither proxies nor cookies.

    Callers pass `allow_redirects=False` with each request. The number of connections is unlimited.

    Args:
        webhook_allowed_networks: Private networks to allow in addition.
        max_lookups: The limit of concurrent DNS lookups. Each occupies a thread, for about 20 s if no server answers.
        resolver: A replacement for the system's resolver.
    """

    def create_socket(where: aiohttp.AddrInfoType) -> socket.socket:
        # Called before each connection, whether the address was in the URL or resolved.
        family, kind, protocol, _, name = where
        try:
            # A name in place of an address is refused: the event loop would resolve it while connecting.
            address = ip_address(str(name[0]).partition("%")[0])
        except ValueError:
            raise BlockedAddress from None
        if kind != socket.SOCK_STREAM or not is_allowed(address, webhook_allowed_networks):
            raise BlockedAddress
        return socket.socket(family, kind, protocol)

    resolver = resolver or _Resolver(max_lookups)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            socket_factory=create_socket,
            resolver=resolver,
            ttl_dns_cache=_DNS_CACHE_SECONDS,
            limit=0,
            keepalive_timeout=_KEEPALIVE_SECONDS,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
    )
    try:
        yield session
    finally:
        await session.close()
        await resolver.close()


class _Resolver(AbstractResolver):
    """Resolve by the system, on own threads: the event loop's are few, and slow names would occupy all of them."""

    def __init__(self, max_lookups: int) -> None:
        self._threads = ThreadPoolExecutor(max_lookups, "resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return at most `_MAX_ADDRESSES_PER_NAME` addresses of a host."""
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        )
        return [
            ResolveResult(hostname=host, host=str(name[0]), port=port, family=kind, proto=protocol, flags=0)
            for kind, _, protocol, _, name in found[:_MAX_ADDRESSES_PER_NAME]
        ]

    async def close(self) -> None:
        """Let the threads end after their present lookup."""
        self._threads.shutdown(wait=False, cancel_futures=True)

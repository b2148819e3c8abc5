"""What may be dialled: public addresses, and the private networks that the operator opens.

A name is judged by the address that is really connected to, when it is connected to: what it resolved to before says
nothing, because whoever owns the name may answer anything the next time.
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

MAX_URL = 2_000
_MAX_HOST = 253

_NAMES_CACHED_SECONDS = 10
# Of a thousand hosts a second, each connection is kept for so long after its message.
_KEPT_SECONDS = 5
# A name may have any number of addresses, and each is tried: so many are enough.
_ADDRESSES_TRIED = 8

# IANA's special-purpose registry and the multicast block, with what is globally reachable in the registry left out.
# Listed here because `is_global` says something else in each release of Python, and calls multicast global.
_REFUSED_4 = tuple(
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
# All of the public Internet is in here; loopback, unique local, link-local, site-local, multicast, NAT64 and addresses
# that only hold an IPv4 address are not.
_GLOBAL_6 = IPv6Network("2000::/3")
_REFUSED_6 = tuple(
    ip_network(network)
    for network in (
        "2001::/23",  # protocol assignments, with Teredo, ORCHID and benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which leads to any IPv4 address
        "3fff::/20",  # documentation
    )
)
# ISATAP: in any network, an interface with this name leads to the IPv4 address in the last 32 bits (RFC 5214).
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")
_LOCALHOST = IPv4Address("127.0.0.1")


class BlockedAddress(OSError):
    """The address that a connection was about to be made to is not open. It is not named: it may be our secret."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "the address of this host may not be dialled")


def may_be_dialled(address: IPv4Address | IPv6Address, webhook_allowed_networks: Sequence[Network]) -> bool:
    """Tell whether a connection may be made to this address. One in IPv4-mapped form is judged as what it stands for.

    Other forms that hold an IPv4 address (NAT64, 6to4, Teredo, ISATAP, IPv4-compatible) are closed altogether, unless
    `webhook_allowed_networks` has them as they are.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address in network for network in webhook_allowed_networks):
        return True
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _REFUSED_4)
    if address not in _GLOBAL_6 or any(address in network for network in _REFUSED_6):
        return False
    return int(address) >> 32 & 0xFFFF_FFFF not in _ISATAP


def check_url(url: str, webhook_allowed_networks: Sequence[Network]) -> str:
    """Return `url` if messages can be sent there, as far as can be told without resolving its host.

    Raises:
        BadTarget: It is no usable http(s) URL, or its host is an address, in any notation, that may not be dialled.
    """
    if len(url) > MAX_URL:
        raise BadTarget(f"must have at most {MAX_URL} characters")
    if any(character.isspace() or not character.isprintable() or character == "\\" for character in url):
        raise BadTarget("must not contain spaces, control characters or backslashes")
    try:
        # The parser that sending uses too, so that both see the same host in it.
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
            raise BadTarget(f"{host} is no address") from None
    elif len(host) > _MAX_HOST or not _NAME.fullmatch(host):
        raise BadTarget("must name a host")
    else:
        address = _address_4(host)
    if address is None:
        return
    if not may_be_dialled(address, webhook_allowed_networks):
        raise BadTarget(f"{host} may not be dialled: only public addresses may")
    if isinstance(address, IPv4Address) and address != _LOCALHOST and host != str(address):
        raise BadTarget(f"{host} must be written {address}")


def _address_4(host: str) -> IPv4Address | None:
    """Return what a host in any of the notations of `inet_aton` stands for; `None` for a name."""
    host = host.rstrip(".")
    last = host.rpartition(".")[2].lower()
    if last == "localhost":  # always loopback (RFC 6761)
        return _LOCALHOST
    if not _NUMBER.fullmatch(last):
        return None
    try:
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        raise BadTarget(f"{host} is no address") from None


@asynccontextmanager
async def http_session(
    webhook_allowed_networks: Sequence[Network], lookups: int, resolver: AbstractResolver | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    """Lend a session that connects to nothing that may not be dialled.

    It knows neither proxies nor cookies. Whoever asks it for something has to say that redirects are not followed.

    Args:
        webhook_allowed_networks: Private networks that are open too.
        lookups: So many names are resolved at once, each on a thread: one whose servers never answer keeps it for some
            20 s, and others are to go on being looked up meanwhile. Connections are as many as are asked for.
        resolver: What names are resolved with, instead of the system.
    """

    def guarded(where: aiohttp.AddrInfoType) -> socket.socket:
        # Asked for each address that is about to be connected to, whether it was written in the URL or resolved.
        family, kind, protocol, _, name = where
        try:
            # Also refuses what is no address: the loop would resolve it when connecting.
            address = ip_address(str(name[0]).partition("%")[0])
        except ValueError:
            raise BlockedAddress from None
        if kind != socket.SOCK_STREAM or not may_be_dialled(address, webhook_allowed_networks):
            raise BlockedAddress
        return socket.socket(family, kind, protocol)

    names = resolver or _Resolver(lookups)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            socket_factory=guarded,
            resolver=names,
            ttl_dns_cache=_NAMES_CACHED_SECONDS,
            limit=0,
            keepalive_timeout=_KEPT_SECONDS,
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
    )
    try:
        yield session
    finally:
        await session.close()
        await names.close()


class _Resolver(AbstractResolver):
    """The system's resolver on threads of its own: those that loops have are few, and one slow name would hold all."""

    def __init__(self, at_once: int) -> None:
        self._threads = ThreadPoolExecutor(at_once, "resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the host's first addresses."""
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        )
        return [
            ResolveResult(hostname=host, host=str(name[0]), port=port, family=kind, proto=protocol, flags=0)
            for kind, _, protocol, _, name in found[:_ADDRESSES_TRIED]
        ]

    async def close(self) -> None:
        """Let the threads end, with what they are at."""
        self._threads.shutdown(wait=False, cancel_futures=True)

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from opsentry.bootstrap import LedgerSubscriptionDisabler
from opsentry.infrastructure.encryption import SecretBox
from opsentry.notifications.delivery.service import DeliveryService
from opsentry.notifications.messages.builder import MessageBuilder
from opsentry.projections.as_of import AsOfQueries
from tests.notifications.driver import DeliveryDriver
from tests.notifications.scripted_channel import ScriptedChannel
from tests.waiting import until

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


class Names(AbstractResolver):
    """A scripted resolver. Each lookup of a name takes its next answer; the last answer repeats."""

    def __init__(self, answers: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self.left = {name: list(said) for name, said in answers.items()}

    async def resolve(self, host, port=0, family=socket.AF_INET):  # noqa: ARG002
        if host not in self.left:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        said = self.left[host]
        addresses = said.pop(0) if len(said) > 1 else said[0]
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in addresses
        ]

    async def close(self):
        pass


class Listener:
    """Listens on one port of 127.0.0.1 and [::1], answers 200 to every request, and counts connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Listener"]:
        async def answer(reader, appender):
            self.connections += 1
            with closing(appender):
                await reader.readuntil(b"\r\n\r\n")
                appender.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await appender.drain()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as first:
            self.port = first.sockets[0].getsockname()[1]
            async with await asyncio.start_server(answer, "::1", self.port):
                yield self


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with Listener().listening() as listening:
        yield listening


@asynccontextmanager
async def answering(handler: Callable[[web.Request], Awaitable[web.Response]], ssl=None) -> AsyncIterator[str]:
    """Serve `handler` at every path on 127.0.0.1; yields the base URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ssl).start()
        yield f"{'http' if ssl is None else 'https'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def tried(session: aiohttp.ClientSession, url: str) -> BaseException | int:
    """Post to `url`; return the status or the exception."""
    try:
        async with session.post(url, data=b"{}", allow_redirects=False, timeout=aiohttp.ClientTimeout(total=5)) as got:
            return got.status
    except (aiohttp.ClientError, OSError) as error:
        return error


@pytest.fixture
def certified(tmp_path):
    """A server's TLS context for receiver.example, and the file of its certificate authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "receiver.example")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("receiver.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "certificate.pem"
    file.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context, str(file)


# ------------------------------------------------------------------------------------------------ delivery


@pytest.fixture
def channel():
    return ScriptedChannel()


@pytest.fixture
def driver(parts, acme):
    return DeliveryDriver(parts, acme)


@pytest.fixture
def sending(parts, channel):
    """Run a delivery service with `channel`, or with the given `channels`."""

    @asynccontextmanager
    async def run(channels=None, **options):
        builder = MessageBuilder(AsOfQueries(parts.database, parts.projector), parts.database)
        known = {each.name: each for each in channels or [channel]}
        service = DeliveryService(
            parts.database,
            LedgerSubscriptionDisabler(parts.application),
            builder,
            known,
            SecretBox(()),
            **{"coalesce_seconds": 0.0, **options},
        )
        service.start()
        yield service
        await service.stop()

    return run


@pytest.fixture
def wait_until_idle(driver):
    """Wait until nothing is left to enqueue or to send now."""

    async def wait():
        await until(is_idle)

    async def is_idle():
        await driver.parts.projector.catch_up(driver.tenant.id, 0)
        return not await driver.parts.database.fetch(
            "SELECT tenant_id FROM outbox_backlog UNION ALL"
            " SELECT tenant_id FROM endpoints WHERE available_at <= now() OR lease IS NOT NULL"
        )

    return wait

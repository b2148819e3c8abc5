"""Fixtures: real servers for all tests, one template database cloned for each."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import CodeType
from typing import Any

import aiohttp
import asyncpg
import pytest

from opsentry.bootstrap import Core, core, serving
from opsentry.demo.embedded import APP_USER, EmbeddedPostgres, EmbeddedValkey
from opsentry.domain import service
from opsentry.domain.service import RegisterService
from opsentry.events.codec import Actor, Meta
from opsentry.identity import api_tokens, tenants
from opsentry.identity.scopes import SCOPES
from opsentry.infrastructure import single_flight
from opsentry.infrastructure.encryption import generate_key
from opsentry.infrastructure.migrations import migrate, migrations
from opsentry.infrastructure.single_flight import TtlCache
from opsentry.settings import Settings
from tests import commands
from tests.contract import check_response
from tests.waiting import GENEROUS_SECONDS, Clock

META = Meta(Actor("operator"))
SECRET_KEY = generate_key()
_ROOM = 4 * 1024**3
_TEMPLATE = "opsentry_template"
_numbers = count(1)


def expire_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every cached answer count as expired for the rest of the test."""
    monkeypatch.setattr(TtlCache, "peek", lambda _self, _key, default: default)


# A test that uses none of these fixtures, directly or through others, needs no server.
_SERVER_FIXTURES = frozenset({"servers_folder", "own_postgres", "own_valkey"})
# A test that names one of these starts a process or a server itself.
_STARTERS = frozenset({"opsentry", "running", "server", "subprocess", "EmbeddedPostgres", "EmbeddedValkey"})


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored, and processes that tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need no server and no process as `unit`, before pytest selects tests by their marks."""
    system = Path(__file__).parent / "system"
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and system not in item.path.parents
            and _SERVER_FIXTURES.isdisjoint(item.fixturenames)
            and _STARTERS.isdisjoint(_names_in(item.function.__code__))
        ):
            item.add_marker(pytest.mark.unit)


def _names_in(code: CodeType) -> set[str]:
    """Return the global names and attributes that a function and the functions inside it use."""
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    # Each test has a database of its own: in memory, where there is room, they are copied in no time.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM
    where = memory if roomy else None
    with tempfile.TemporaryDirectory(prefix="opsentry-tests-", dir=where, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres(servers_folder: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(servers_folder / "postgres")
    server.start()
    asyncio.run(_make_template(server))
    yield server
    server.stop("immediate")


async def _make_template(server: EmbeddedPostgres) -> None:
    connection = await asyncpg.connect(server.url("postgres"))
    # Tests crash the server's clients, never the machine: nothing has to reach the disk.
    await connection.execute("ALTER SYSTEM SET fsync = off")
    await connection.execute("ALTER SYSTEM SET full_page_writes = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.execute(f"CREATE DATABASE {_TEMPLATE}")
    await connection.close()
    connection = await asyncpg.connect(server.url(_TEMPLATE))
    await migrate(connection, migrations())
    await connection.execute(f"CREATE ROLE {APP_USER} LOGIN IN ROLE opsentry_app")
    await connection.close()


@pytest.fixture(scope="session")
def valkey(servers_folder: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(servers_folder / "valkey")
    server.start()
    yield server
    server.stop()


@asynccontextmanager
async def new_database(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """Make a migrated database and lend its name."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    connection = await asyncpg.connect(postgres.url("postgres"))
    await connection.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE} STRATEGY file_copy")
    yield name
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


@pytest.fixture
async def database_name(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A migrated database of its own."""
    async with new_database(postgres) as name:
        yield name


def settings_for(postgres: EmbeddedPostgres, valkey: EmbeddedValkey, database_name: str) -> Settings:
    """Return settings of the application's own role, with limits that no test meets by accident."""
    return Settings(
        database_url=postgres.url(database_name, APP_USER),
        migration_database_url=postgres.url(database_name),
        redis_url=valkey.url,
        port=0,
        database_timeout_ms=int(1000 * GENEROUS_SECONDS),
        readiness_timeout_ms=int(1000 * GENEROUS_SECONDS),
        rate_limit="1000000/minute",
        auth_failure_rate_limit="1000000/minute",
        subscribe_rate_limit="1000000/minute",
        encryption_keys=(SECRET_KEY,),
        log_level="error",
    )


@pytest.fixture
def settings(
    request: pytest.FixtureRequest, postgres: EmbeddedPostgres, valkey: EmbeddedValkey, database_name: str
) -> Settings:
    """Settings for a database of the test's own; timeouts are generous unless the test is about a timeout."""
    found = settings_for(postgres, valkey, database_name)
    if request.node.get_closest_marker("production_timeouts") is None:
        return found
    production = Settings()
    return replace(
        found,
        database_timeout_ms=production.database_timeout_ms,
        readiness_timeout_ms=production.readiness_timeout_ms,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of every TTL cache and batch loader, which only the test moves."""
    clock = Clock()
    monkeypatch.setattr(single_flight, "time", clock)
    return clock


@pytest.fixture
async def owner(settings: Settings) -> AsyncIterator[Any]:
    """A connection of the database's owner, a superuser."""
    connection = await asyncpg.connect(settings.migration_database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def app_connection(settings: Settings) -> AsyncIterator[Any]:
    """A connection of the application's role."""
    connection = await asyncpg.connect(settings.database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def parts(settings: Settings) -> AsyncIterator[Core]:
    async with core(settings) as running:
        yield running


@dataclass(frozen=True)
class Tenant:
    """A tenant with a token for everything."""

    id: int
    slug: str
    token: str


async def make_tenant(parts: Core, slug: str) -> Tenant:
    async with parts.database.connection(10) as connection:
        tenant_id = await tenants.create_tenant(connection, slug=slug, name=slug.title(), meta=META)
        token = await api_tokens.create_api_token(connection, tenant_id, name=f"{slug} token", scopes=SCOPES, meta=META)
    return Tenant(tenant_id, slug, token)


async def make_service(parts: Core, tenant_id: int, slug: str, **fields: Any) -> int:
    occurred_at = fields.pop("occurred_at", None)
    command = RegisterService(slug=slug, name=fields.pop("name", slug), **fields)
    executed = await commands.create(
        parts,
        service.DECIDER,
        tenant_id,
        command,
        META,
        reservation=service.slug_reservation(slug),
        occurred_at=occurred_at,
    )
    await parts.projector.catch_up(tenant_id, executed.position)
    return executed.stream_id


@pytest.fixture
async def acme(parts: Core) -> Tenant:
    return await make_tenant(parts, "acme")


@pytest.fixture
async def globex(parts: Core) -> Tenant:
    return await make_tenant(parts, "globex")


class Client:
    """An API client of one tenant; answers (status, decoded body, headers)."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, token: str | None) -> None:
        self.session = session
        self.base_url = base_url
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    async def send(self, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
        headers = {**self.headers, **options.pop("headers", {})}
        async with self.session.request(method, self.base_url + path, headers=headers, **options) as response:
            text = await response.text()
            body = await response.json() if response.content_type == "application/json" else text
            return response.status, body, response.headers

    async def get(self, path: str, **options: Any) -> tuple[int, Any, Any]:
        return await self.send("GET", f"/api/v1{path}", **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any, Any]:
        return await self.send("POST", f"/api/v1{path}", **({} if body is None else {"json": body}), **options)

    async def delete(self, path: str, **options: Any) -> tuple[int, Any, Any]:
        return await self.send("DELETE", f"/api/v1{path}", **options)

    async def patch(self, path: str, body: Any, **options: Any) -> tuple[int, Any, Any]:
        return await self.send("PATCH", f"/api/v1{path}", json=body, **options)


async def _hold_to_the_contract(
    request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    response = await send(request)
    octets = await response.read() if response.content_type == "application/json" else b""
    check_response(request.method, str(request.url), response.status, response.headers, octets)
    return response


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client session that holds every response of the API to its OpenAPI document."""
    async with aiohttp.ClientSession(middlewares=(_hold_to_the_contract,)) as session:
        yield session


@pytest.fixture
async def base_url(settings: Settings, parts: Core) -> AsyncIterator[str]:
    """The API, served in this process."""
    async with serving(settings, parts) as url:
        yield url


@pytest.fixture
async def api(http: aiohttp.ClientSession, base_url: str, acme: Tenant) -> Client:
    """A client with every scope of tenant acme."""
    return Client(http, base_url, acme.token)


@pytest.fixture
async def other_api(http: aiohttp.ClientSession, base_url: str, globex: Tenant) -> Client:
    """A client with every scope of tenant globex, who must never see anything of acme."""
    return Client(http, base_url, globex.token)


@pytest.fixture
async def anonymous(http: aiohttp.ClientSession, base_url: str) -> Client:
    return Client(http, base_url, None)


@pytest.fixture
async def limited_settings(settings: Settings) -> Settings:
    return replace(settings, rate_limit="5/minute", auth_failure_rate_limit="3/minute")


@pytest.fixture(scope="session")
def real_history() -> Path:
    """The path of real incident history; skipped aloud where there is none."""
    path = os.environ.get("OPSENTRY_REAL_HISTORY")
    if not path:
        pytest.skip("OPSENTRY_REAL_HISTORY names no file: the real history is not tested here")
    return Path(path)

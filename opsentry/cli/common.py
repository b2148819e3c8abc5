"""Run the work of a command: settings, event loop, connections, and errors as exit codes."""

import gc
import os
import resource
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar, cast

import asyncpg
import click
import msgspec
import uvloop

from opsentry.bootstrap import Core, configure_logging, core, new_database
from opsentry.domain.decider import DomainError, InvalidField
from opsentry.events import audit, store
from opsentry.events.appender import TenantBusy
from opsentry.events.codec import Actor, Meta
from opsentry.events.command_handler import ConcurrencyConflict, NameReserved, StreamNotFound
from opsentry.events.verification import BadExport
from opsentry.identity import tenants
from opsentry.identity.tenants import SlugTaken, TenantNotFound
from opsentry.identity.tokens import TokenNotFound
from opsentry.importing.statuspage import MalformedExport
from opsentry.infrastructure.postgres import Connection, Database, DatabaseUnavailable, MigrationRefused, OutcomeUnknown
from opsentry.projections.engine.projector import PositionNotReached
from opsentry.projections.engine.rebuild_pool import RebuildProcessFailed
from opsentry.settings import InvalidSettings, Settings

T = TypeVar("T")

META = Meta(Actor("operator"))

# An operator at a terminal waits longer than an HTTP client does.
COMMAND_TIMEOUT_SECONDS = 30.0
# Garbage collection at the default threshold of 700 objects takes a tenth of a busy sender's time.
GC_THRESHOLD_OBJECTS = 50_000

for_tenant = click.option("--tenant", "slug", required=True, metavar="SLUG", help="Slug of the tenant.")
for_any_tenant = click.option("--tenant", "slug", metavar="SLUG", help="Slug of one tenant. Default: all tenants.")
expiring = click.option(
    "--expires",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]),
    callback=lambda _, __, at: None if at is None else at.replace(tzinfo=UTC),
    help="UTC time at which the token expires. Default: never.",
)


def settings() -> Settings:
    """Return the settings and configure logging by them.

    Raises:
        click.UsageError: A setting has an unusable value.
    """
    try:
        found = Settings.from_environment()
    except InvalidSettings as error:
        raise click.UsageError(str(error)) from None
    configure_logging(found.log_level)
    return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on a new event loop and return its result; its errors end the process with a clear line."""
    # The soft limit, often 1,024, protects programs that use select(). Event loops do not use it.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Imported modules live until the process ends, so the collector need not visit them.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD_OBJECTS)
    with errors_explained():
        return uvloop.run(work)


@contextmanager
def errors_explained() -> Iterator[None]:
    """Turn errors that an operator can act on into one line and exit code 1, or 2 for wrong use."""
    try:
        yield
    except InvalidField as error:
        raise click.UsageError(str(error)) from None
    except OutcomeUnknown as error:
        raise click.ClickException(
            f"{error}. The change may or may not be recorded. Check before you run the command again."
        ) from None
    except DatabaseUnavailable as error:
        raise click.ClickException(
            f"{error}. Check OPSENTRY_DATABASE_URL, and that the database is up and migrated (`opsentry migrate`)."
        ) from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise click.ClickException(
            f"database: {error}. Set OPSENTRY_MIGRATION_DATABASE_URL to a URL of the database's owner."
        ) from None
    except BrokenPipeError:
        # The reader closed the pipe, as `| head` does. Python would complain when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (
        BadExport,
        ConcurrencyConflict,
        DomainError,
        RebuildProcessFailed,
        MalformedExport,
        MigrationRefused,
        NameReserved,
        StreamNotFound,
        TenantNotFound,
        TokenNotFound,
        PositionNotReached,
        SlugTaken,
        TenantBusy,
        OSError,
    ) as error:
        raise click.ClickException(str(error)) from None


@asynccontextmanager
async def opened(found: Settings) -> AsyncIterator[Database]:
    """Open the database with one connection and close it at the end.

    Print after giving a connection back: an error of the output must not look like one of the database.
    """
    database = new_database(found, 1)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def connected(found: Settings) -> AsyncIterator[Connection]:
    """Lend a connection for at most `COMMAND_TIMEOUT_SECONDS`."""
    async with opened(found) as database, database.connection(COMMAND_TIMEOUT_SECONDS) as connection:
        yield connection


async def transaction(work: Callable[[Connection], Awaitable[T]]) -> T:
    """Run `work` in one transaction and return its result."""
    async with opened(settings()) as database, database.transaction(COMMAND_TIMEOUT_SECONDS) as connection:
        return await work(connection)


@asynccontextmanager
async def tenant_core(slug: str) -> AsyncIterator[tuple[Core, int]]:
    """Lend the core and the id of the tenant `slug`.

    Raises:
        TenantNotFound: No tenant has this slug.
    """
    async with core(settings()) as parts:
        async with parts.database.connection(COMMAND_TIMEOUT_SECONDS) as connection:
            tenant_id = await tenant_id_of(connection, slug)
        yield parts, tenant_id


async def tenant_id_of(connection: Connection, slug: str) -> int:
    """Return the id of the tenant `slug`.

    Raises:
        TenantNotFound: No tenant has this slug.
    """
    return int((await tenants.find_tenant(connection, slug))["tenant_id"])


async def optional_tenant_id(connection: Connection, slug: str | None) -> int | None:
    """Return the id of the tenant `slug`, or `None` for all tenants.

    Raises:
        TenantNotFound: No tenant has this slug.
    """
    return None if slug is None else await tenant_id_of(connection, slug)


async def parse_position(connection: Connection, tenant_id: int, text: str) -> int:
    """Return the position that `text` names: itself a position, or an RFC 3339 time.

    Raises:
        click.UsageError: `text` is neither, or names something after the end of the ledger.
    """
    last = await store.read_head_position(connection, tenant_id)
    if text.isdecimal():
        if int(text) > last:
            raise click.UsageError(f"{text}: the ledger ends at position {last}")
        return int(text)
    found = await audit.position_at(connection, tenant_id, parse_time(text, "a position, or a time"))
    if found is None:
        raise click.UsageError(f"{text}: lies in the future")
    return found


def parse_time(text: str, expected: str = "a time") -> datetime:
    """Return the time that an RFC 3339 `text` names.

    Raises:
        click.UsageError: `text` is no time with an offset; the message asks for `expected`.
    """
    try:
        return cast("datetime", msgspec.convert(text, Annotated[datetime, msgspec.Meta(tz=True)]))
    except msgspec.ValidationError:
        raise click.UsageError(f"{text}: must be {expected} such as 2026-06-01T02:00:00Z") from None

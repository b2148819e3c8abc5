"""Run the work of a command: settings, event loop, connections, and errors as exit codes."""

import gc
import os
import resource
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar, cast

import asyncpg
import click
import msgspec
import uvloop

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.errors import ConcurrencyConflict
from opsentry.application.queries import resolve_as_of
from opsentry.application.tenants import find_tenant_id
from opsentry.bootstrap import Core, configure_logging, core, new_database
from opsentry.domain.decider import DomainError, InvalidField
from opsentry.events.codec import Actor
from opsentry.events.export_verification import BadExport
from opsentry.identity import tenants
from opsentry.identity.tenants import SlugTaken, TenantNotFound
from opsentry.identity.tokens import TokenNotFound
from opsentry.importing.statuspage import MalformedExport
from opsentry.infrastructure.migrations import MigrationRefused
from opsentry.infrastructure.postgres import (
    Connection,
    Database,
    DatabaseUnavailable,
    OutcomeUnknown,
    TransientError,
)
from opsentry.projections.engine.projector import PositionNotReached
from opsentry.projections.engine.rebuild_pool import RebuildProcessFailed
from opsentry.settings import InvalidSettings, Settings

T = TypeVar("T")

OPERATOR = Actor("operator")

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
        TenantNotFound,
        TokenNotFound,
        PositionNotReached,
        SlugTaken,
        TransientError,
        OSError,
    ) as error:
        raise click.ClickException(str(error)) from None


@asynccontextmanager
async def opened(found: Settings) -> AsyncIterator[Database]:
    """Open the database with one connection and close it at the end.

    Print after giving a connection back: an error of the output must not look like one of the database.
    """
    database = new_database(_with_command_timeout(found), 1)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


async def transaction(work: Callable[[Connection], Awaitable[T]]) -> T:
    """Run `work` in one transaction and return its result."""
    async with opened(settings()) as database, database.transaction() as connection:
        return await work(connection)


@asynccontextmanager
async def opened_core() -> AsyncIterator[Core]:
    """Lend the parts of a process, with the timeout of commands."""
    async with core(_with_command_timeout(settings())) as parts:
        yield parts


@asynccontextmanager
async def application() -> AsyncIterator[Application]:
    """Lend the application."""
    async with opened_core() as parts:
        yield parts.application


@asynccontextmanager
async def application_for(slug: str, actor: Actor = OPERATOR) -> AsyncIterator[tuple[Application, Caller]]:
    """Lend the application, and a caller with all permissions of the tenant `slug`.

    Raises:
        TenantNotFound: No tenant has this slug.
    """
    async with application() as app:
        yield app, Caller(tenant_id=await find_tenant_id(app, slug), actor=actor)


def _with_command_timeout(found: Settings) -> Settings:
    milliseconds = int(1000 * COMMAND_TIMEOUT_SECONDS)
    return replace(found, database_timeout_ms=max(found.database_timeout_ms, milliseconds))


async def optional_tenant_id(connection: Connection, slug: str | None) -> int | None:
    """Return the id of the tenant `slug`, or `None` for all tenants.

    Raises:
        TenantNotFound: No tenant has this slug.
    """
    return None if slug is None else int((await tenants.find_tenant(connection, slug))["tenant_id"])


async def find_position(app: Application, caller: Caller, text: str) -> int:
    """Return the position that `text` names: itself a position, or an RFC 3339 time.

    Raises:
        click.UsageError: `text` is neither, or names something after the end of the ledger.
    """
    moment = int(text) if text.isdecimal() else parse_time(text, "a position, or a time")
    try:
        return await resolve_as_of(app, caller, moment)
    except InvalidField as error:
        raise click.UsageError(f"{text}: {error.problem}") from None


def parse_time(text: str, expected: str = "a time") -> datetime:
    """Return the time that an RFC 3339 `text` names.

    Raises:
        click.UsageError: `text` is no time with an offset; the message asks for `expected`.
    """
    try:
        return cast("datetime", msgspec.convert(text, Annotated[datetime, msgspec.Meta(tz=True)]))
    except msgspec.ValidationError:
        raise click.UsageError(f"{text}: must be {expected} such as 2026-06-01T02:00:00Z") from None

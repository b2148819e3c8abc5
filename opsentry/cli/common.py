"""What all commands share: settings, the event loop, errors as exit codes, output for people and for machines."""

import gc
import json
import os
import resource
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar, cast

import asyncpg
import click
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from opsentry.bootstrap import Core, configure_logging, core
from opsentry.domain.decider import DomainError, InvalidField
from opsentry.events import audit, store
from opsentry.events.appender import TenantBusy
from opsentry.events.codec import Actor, Meta
from opsentry.events.command_handler import ConcurrencyConflict, NameReserved, StreamNotFound
from opsentry.events.verification import BadExport
from opsentry.identity import api_tokens, tenants
from opsentry.identity.api_tokens import TokenNotFound
from opsentry.identity.tenants import SlugTaken, TenantNotFound
from opsentry.importing.statuspage import Malformed
from opsentry.infrastructure.postgres import Connection, Database, DatabaseUnavailable, MigrationRefused, OutcomeUnknown
from opsentry.projections.engine.projector import PositionNotReached
from opsentry.projections.engine.rebuild_pool import RebuildProcessFailed
from opsentry.settings import InvalidSettings, Settings

T = TypeVar("T")

META = Meta(Actor("operator"))

# Command lines are patient: nobody's browser waits for them.
PATIENCE = 30.0

as_json = click.option("--json", "json_output", is_flag=True, help="Print JSON instead of a table.")
for_tenant = click.option("--tenant", "slug", required=True, metavar="SLUG", help="The tenant's slug.")
expiring = click.option(
    "--expires",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"]),
    callback=lambda _, __, moment: None if moment is None else moment.replace(tzinfo=UTC),
    help="When it stops working, in UTC; never if left out.",
)


def settings() -> Settings:
    """Return the settings and set logging up by them; bad ones are wrong use."""
    try:
        found = Settings.from_environment()
    except InvalidSettings as error:
        raise click.UsageError(str(error)) from None
    configure_logging(found.log_level)
    return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, its errors explained, with as many files and sockets open as the system lets it have."""
    # The soft limit is often 1,024 for the sake of programs that use select(), which event loops do not.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # What was imported stays; and most garbage goes by reference counts, without a search every 700 objects. A tenth of
    # the time of a busy sender went into that.
    gc.freeze()
    gc.set_threshold(50_000)
    with explained():
        return uvloop.run(work)


@contextmanager
def explained() -> Iterator[None]:
    """End what people can do something about with a clear line and exit code 1 (or 2: wrong use)."""
    try:
        yield
    except InvalidField as error:
        raise click.UsageError(str(error)) from None
    except OutcomeUnknown as error:
        raise click.ClickException(f"{error}: it may or may not be recorded; look before trying again") from None
    except DatabaseUnavailable as error:
        raise click.ClickException(f"{error} (is OPSENTRY_DATABASE_URL right, and the database migrated?)") from None
    except asyncpg.InsufficientPrivilegeError as error:
        raise click.ClickException(f"database: {error} (OPSENTRY_MIGRATION_DATABASE_URL must be its owner's)") from None
    except BrokenPipeError:
        # Whoever read has had enough, as `| head` has; what is still to be flushed goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (
        BadExport,
        ConcurrencyConflict,
        DomainError,
        RebuildProcessFailed,
        Malformed,
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
    """Lend the database.

    What is read there is best written once its connection was given back: an output that fails is no such database.
    """
    database = Database(found.database_url, size=1)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def connected(found: Settings) -> AsyncIterator[Connection]:
    """Lend a connection."""
    async with opened(found) as database, database.connection(PATIENCE) as connection:
        yield connection


@asynccontextmanager
async def tenant_core(slug: str) -> AsyncIterator[tuple[Core, int]]:
    """Lend the core and the id of a tenant.

    Raises:
        TenantNotFound: There is none with this slug.
    """
    async with core(settings()) as parts:
        async with parts.database.connection() as connection:
            tenant_id: int = (await tenants.find_tenant(connection, slug))["tenant_id"]
        yield parts, tenant_id


@asynccontextmanager
async def stream_core(kind: str, stream_id: int, slug: str | None) -> AsyncIterator[tuple[Core, int]]:
    """Lend the core and the id of the tenant that has this stream, which must be `slug` if that is given.

    Raises:
        TenantNotFound: There is no such stream, or none of this tenant's.
    """
    async with core(settings()) as parts:
        async with parts.database.connection(PATIENCE) as connection:
            row = await tenants.of_stream(connection, kind, stream_id)
        if slug not in {None, row["slug"]}:
            raise TenantNotFound(f"{slug} has no {kind} {stream_id}")
        yield parts, row["tenant_id"]


async def parse_position(connection: Connection, tenant_id: int, moment: str) -> int:
    """Return the position that `moment` names, itself a position or an RFC 3339 timestamp.

    Raises:
        click.UsageError: It is neither, or lies in the future.
    """
    ends = await store.read_head_position(connection, tenant_id)
    if moment.isdecimal():
        if int(moment) > ends:
            raise click.UsageError(f"{moment}: the ledger ends at position {ends}")
        return int(moment)
    found = await audit.position_at(connection, tenant_id, time(moment, "a position, or a time"))
    if found is None:
        raise click.UsageError(f"{moment}: lies in the future")
    return found


def time(moment: str, what: str = "a time") -> datetime:
    """Return the moment that an RFC 3339 timestamp names.

    Raises:
        click.UsageError: It is none.
    """
    try:
        return cast("datetime", msgspec.convert(moment, Annotated[datetime, msgspec.Meta(tz=True)]))
    except msgspec.ValidationError:
        raise click.UsageError(f"{moment}: must be {what} such as 2026-06-01T02:00:00Z") from None


def show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, json_output: bool) -> None:
    """Print rows as a table, or as a JSON array."""
    if json_output:
        click.echo(json.dumps([{column: row[column] for column in columns} for row in rows], default=_plain, indent=2))
        return
    table = Table()
    for column in columns:
        # What other commands want to be told must be there to be copied.
        table.add_column(column, no_wrap=column == "id", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def show_token(value: str, *, json_output: bool) -> None:
    """Print a new token's value, this once."""
    if json_output:
        show([{"token": value, "prefix": api_tokens.prefix(value)}], ["token", "prefix"], json_output=True)
    else:
        click.echo(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(_plain(value))


def _plain(value: Any) -> Any:
    isoformat: Callable[[], str] | None = getattr(value, "isoformat", None)
    return isoformat().replace("+00:00", "Z") if isoformat else value

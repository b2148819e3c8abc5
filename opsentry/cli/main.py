"""The top of the command line, and the commands that run processes."""

import asyncio
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from opsentry import __version__
from opsentry.bootstrap import core, serving, until_stopped, working
from opsentry.cli.common import PATIENCE, explained, run, settings
from opsentry.cli.deliveries import outbox_group, secret_key
from opsentry.cli.imports import import_group
from opsentry.cli.ledger import events_group, verify
from opsentry.cli.ledger_history import history, redact
from opsentry.cli.operator_tokens import operator_group
from opsentry.cli.projections import projections_group
from opsentry.cli.tenants import service_group, tenant_group, token_group
from opsentry.infrastructure.postgres import Database, migrate, migrations
from opsentry.settings import Settings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="opsentry")
def cli() -> None:
    """Incidents, maintenance and service status, event-sourced on PostgreSQL.

    Settings are environment variables; `opsentry config` lists them.
    Exit codes: 0 done, 1 failed, 2 wrong use.
    """


@cli.command()
@click.option("--host", help="Address to listen on, instead of OPSENTRY_HOST.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on, instead of OPSENTRY_PORT.")
def serve(host: str | None, port: int | None) -> None:
    """Serve the HTTP API until SIGINT or SIGTERM."""
    found = settings()

    async def work() -> None:
        async with core(found) as parts, serving(found, parts, host=host, port=port) as url:
            await _announced(f"serving {url}")

    run(work())


@cli.command()
@click.option(
    "--heartbeat",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="A file to touch whenever all work was gone through, for a container's health check.",
)
def worker(heartbeat: Path | None) -> None:
    """Catch projections up, send notifications and move maintenance windows on, until SIGINT or SIGTERM."""
    found = settings()

    async def work() -> None:
        async with core(found) as parts, working(parts, heartbeat):
            await _announced("working")

    run(work())


async def _announced(line: str) -> None:
    """Print `line` once signals are listened to, since whoever reads it may send one; return when one came."""
    stopped = asyncio.create_task(until_stopped())
    await asyncio.sleep(0)
    click.echo(line)
    await stopped


@cli.command(name="migrate")
def migrate_command() -> None:
    """Bring the database's schema up to this version. Safe to run again, and by many at once."""
    found = settings()

    async def work() -> None:
        database = Database(found.migration_database_url or found.database_url, size=1)
        await database.open()
        try:
            async with database.connection(10 * PATIENCE) as connection:
                done = await migrate(connection, migrations())
        finally:
            await database.close()
        for step in done:
            click.echo(f"applied {step.name}")
        click.echo("the schema is up to date")

    run(work())


@cli.command()
def config() -> None:
    """List all settings with their defaults."""
    table = Table("variable", "default", "what it is")
    for name, default, says in Settings.catalogue():
        table.add_row(name, default, says)
    Console().print(table)


@cli.command()
def demo() -> None:
    """Run everything on embedded servers, with a tenant to try it on, until Ctrl-C."""
    from opsentry.demo.run import run_demo  # noqa: PLC0415 - only this command needs the extra `embedded`

    with explained():
        run_demo(settings())


cli.add_command(tenant_group)
cli.add_command(token_group)
cli.add_command(service_group)
cli.add_command(import_group)
cli.add_command(history)
cli.add_command(redact)
cli.add_command(events_group)
cli.add_command(verify)
cli.add_command(projections_group)
cli.add_command(operator_group)
cli.add_command(outbox_group)
cli.add_command(secret_key)

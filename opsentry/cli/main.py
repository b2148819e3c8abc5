"""The command `opsentry`, and its subcommands that run processes."""

import asyncio
from pathlib import Path

import click

from opsentry import __version__
from opsentry.bootstrap import core, serving, until_stopped, working
from opsentry.cli.common import COMMAND_TIMEOUT_SECONDS, errors_explained, run, settings
from opsentry.cli.deliveries import deliveries_group
from opsentry.cli.imports import import_group
from opsentry.cli.keys import keys_group
from opsentry.cli.ledger import ledger_group
from opsentry.cli.operator import operator_group
from opsentry.cli.output import print_table, table
from opsentry.cli.projections import projections_group
from opsentry.cli.sending import sending_group
from opsentry.cli.service import service_group
from opsentry.cli.tenant import tenant_group
from opsentry.cli.token import token_group
from opsentry.infrastructure.migrations import migrate, migrations
from opsentry.infrastructure.postgres import Database
from opsentry.settings import Settings

# A migration may rewrite large tables.
MIGRATION_TIMEOUT_SECONDS = 10 * COMMAND_TIMEOUT_SECONDS


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="opsentry")
def cli() -> None:
    """Incidents, maintenance and service status, event-sourced on PostgreSQL.

    Settings are environment variables; `opsentry config` lists them.
    Exit codes: 0 done, 1 failed, 2 wrong use.
    """


@cli.command()
@click.option("--host", help="Address to listen on. Default: OPSENTRY_HOST.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on. Default: OPSENTRY_PORT.")
def serve(host: str | None, port: int | None) -> None:
    """Serve the HTTP API and the public pages until SIGINT or SIGTERM."""
    found = settings()

    async def work() -> None:
        async with core(found) as parts, serving(found, parts, host=host, port=port) as url:
            await _announce(f"serving {url}")

    run(work())


@cli.command()
@click.option(
    "--heartbeat",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="File to touch after each round of work, for a container's health check.",
)
def worker(heartbeat: Path | None) -> None:
    """Catch projections up, send notifications and run maintenance schedules until SIGINT or SIGTERM."""
    found = settings()

    async def work() -> None:
        async with core(found) as parts, working(parts, heartbeat):
            await _announce("working")

    run(work())


async def _announce(line: str) -> None:
    """Print `line` and wait for a signal to stop."""
    # A reader of the line may signal at once, so the handlers must be in place before it appears.
    stopped = asyncio.create_task(until_stopped())
    await asyncio.sleep(0)
    click.echo(line)
    await stopped


@cli.command(name="migrate")
def migrate_command() -> None:
    """Bring the database schema up to this version.

    It is safe to run it again, and to run several at once.
    """
    found = settings()

    async def work() -> None:
        url = found.migration_database_url or found.database_url
        database = Database(url, size=1, timeout_seconds=MIGRATION_TIMEOUT_SECONDS)
        await database.open()
        try:
            async with database.connection() as connection:
                applied = await migrate(connection, migrations())
        finally:
            await database.close()
        for migration in applied:
            click.echo(f"applied {migration.name}")
        click.echo("the schema is up to date")

    run(work())


@cli.command()
def config() -> None:
    """List all settings with their defaults and meanings."""
    listed = table("variable", "default", "meaning")
    for setting in Settings.describe():
        listed.add_row(*setting)
    print_table(listed)


@cli.command()
def demo() -> None:
    """Run everything on embedded servers, with example tenants, until Ctrl-C."""
    from opsentry.demo.run import run_demo  # noqa: PLC0415 - only this command needs the extra `embedded`

    with errors_explained():
        run_demo(settings())


for group in (
    deliveries_group,
    import_group,
    keys_group,
    ledger_group,
    operator_group,
    projections_group,
    sending_group,
    service_group,
    tenant_group,
    token_group,
):
    cli.add_command(group)

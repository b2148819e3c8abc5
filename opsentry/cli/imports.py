"""`opsentry import`: history from elsewhere."""

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opsentry.cli.common import as_json, for_tenant, run, tenant_core
from opsentry.importing import statuspage
from opsentry.importing.importer import Importer, Result


@click.group(name="import")
def import_group() -> None:
    """Bring in history from elsewhere."""


@import_group.command(name="statuspage")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@for_tenant
@as_json
def import_statuspage(file: Path, slug: str, *, json_output: bool) -> None:
    """Load incidents, windows and components from FILE, in the JSON of Statuspage's API (v2).

    Times are kept. Nothing is doubled when it runs again, and nobody is notified.
    """

    async def work() -> Result:
        export = statuspage.read(file)
        total = len(export.components) + len(export.incidents) + len(export.scheduled_maintenances)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        async with tenant_core(slug) as (parts, tenant_id):
            with Progress(*columns, console=Console(stderr=True)) as progress:
                task = progress.add_task(file.name, total=total)
                importer = Importer(parts.database, parts.appender, parts.projector, tenant_id)
                return await importer.load(export, lambda: progress.advance(task))

    result = run(work())
    if json_output:
        click.echo(msgspec.json.format(msgspec.json.encode(result)).decode())
        return
    for skipped in result.skipped:
        click.echo(f"not taken: {skipped.what}: {skipped.why}")
    click.echo(
        f"added {result.events} events: {result.services} services, {result.incidents} incidents,"
        f" {result.maintenance} maintenance windows, {result.updates} updates;"
        f" {result.unchanged} records were there already"
    )

"""`opsentry import`: history from other products."""

from pathlib import Path

import click

from opsentry.application import imports
from opsentry.application.imports import ImportResult
from opsentry.cli.common import application_for, for_tenant, run
from opsentry.cli.output import as_json, print_json, progress_bar
from opsentry.events.codec import Actor
from opsentry.importing.statuspage import read_export

IMPORTER = Actor("importer")


@click.group(name="import")
def import_group() -> None:
    """Import history from other products."""


@import_group.command(name="statuspage")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@for_tenant
@as_json
def import_statuspage(file: Path, slug: str, *, json_output: bool) -> None:
    """Import incidents, maintenance windows and components from FILE, in the JSON of Statuspage's API (v2).

    Events keep their original times. A second run adds only what is new. Subscribers are not notified.
    """

    async def work() -> ImportResult:
        export = read_export(file)
        total = len(export.components) + len(export.incidents) + len(export.scheduled_maintenances)
        async with application_for(slug, IMPORTER) as (app, caller):
            with progress_bar() as progress:
                task = progress.add_task(file.name, total=total)
                return await imports.import_statuspage(app, caller, export, lambda: progress.advance(task))

    result = run(work())
    if json_output:
        print_json(result)
        return
    for skipped in result.skipped:
        click.echo(f"skipped {skipped.record}: {skipped.reason}")
    click.echo(
        f"added {result.events} events: {result.services} services, {result.incidents} incidents,"
        f" {result.maintenance} maintenance windows, {result.updates} updates;"
        f" {result.unchanged} records were there already"
    )

"""`opsentry projections`: how the read models stand, and deriving them anew."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opsentry.access import tenants
from opsentry.cli.common import PATIENCE, as_json, run, settings, show
from opsentry.events import ledger
from opsentry.projections.projection import Projection
from opsentry.projections.rebuild import Difference, Rebuilder
from opsentry.projections.runner import Poison
from opsentry.wiring import Core, core, projections

_ALL = {projection.name: projection for projection in projections()}

chosen = click.argument("name", type=click.Choice(list(_ALL)), required=False)
all_of_them = click.option("--all", "everything", is_flag=True, help="All projections.")
of_tenant = click.option("--tenant", "slug", metavar="SLUG", help="One tenant; all if left out.")


@click.group(name="projections")
def projections_group() -> None:
    """See how read models stand, compare them with the ledger, derive them anew."""


@projections_group.command(name="list")
@as_json
def list_projections(*, json_output: bool) -> None:
    """List projections: tenants that are done, behind and parked, and the lag."""

    async def work() -> Sequence[Any]:
        async with core(settings()) as parts:
            return await parts.runner.standing()

    columns = ["projection", "generation", "tenants", "done", "behind", "parked", "lag_events", "lag_seconds"]
    show(run(work()), columns, json_output=json_output)


@projections_group.command(name="parked")
@as_json
def list_parked(*, json_output: bool) -> None:
    """List what stopped at an event that it cannot apply, and why."""

    async def work() -> Sequence[Any]:
        async with core(settings()) as parts:
            return await parts.runner.parked()

    show(run(work()), ["slug", "projection", "seq", "error"], json_output=json_output)


@projections_group.command(name="retry")
@chosen
@all_of_them
@of_tenant
@as_json
def retry(name: str | None, slug: str | None, *, everything: bool, json_output: bool) -> None:
    """Let what is parked go on from where it stopped. Exit code 1 if something stops again."""
    names = [projection.name for projection in _chosen(name, everything=everything)]

    async def work() -> tuple[int, int]:
        async with core(settings()) as parts:
            tenant_id = await _tenant(parts, slug)
            released = await parts.runner.retry(names, tenant_id)
            still = [
                row
                for row in await parts.runner.parked()
                if row["projection"] in names and tenant_id in {None, row["tenant_id"]}
            ]
            return released, len(still)

    released, still = run(work())
    if json_output:
        click.echo(msgspec.json.encode({"retried": released, "parked": still}))
    else:
        click.echo(f"{released} went on; {still} stopped again" if still else f"{released} went on")
    if still:
        raise SystemExit(1)


@projections_group.command(name="rebuild")
@chosen
@all_of_them
@of_tenant
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Tenants at once.")
@as_json
def rebuild(name: str | None, slug: str | None, jobs: int, *, everything: bool, json_output: bool) -> None:
    """Derive rows anew from the ledger. Readers notice nothing, and commands go on.

    One that is interrupted leaves every tenant as it was or done; the same command goes on with those that are left.
    """
    wanted = _chosen(name, everything=everything)
    failed: list[dict[str, Any]] = []
    done = 0

    async def one(parts: Core, projection: Projection, left: Sequence[Any], progress: Progress) -> None:
        nonlocal done
        rebuilder = Rebuilder(parts.database)
        task = progress.add_task(projection.name, total=sum(row["events"] for row in left))
        waiting = list(left)

        async def job() -> None:
            nonlocal done
            while waiting:
                row = waiting.pop(0)
                try:
                    rebuilt = await rebuilder.rebuild(
                        projection, row["tenant_id"], lambda events: progress.advance(task, events)
                    )
                    done += rebuilt
                except Poison as poison:
                    failed.append({"tenant_id": row["tenant_id"], "projection": projection.name, "error": str(poison)})

        await asyncio.gather(*(job() for _ in range(jobs)))

    async def work() -> None:
        async with core(settings()) as parts:
            tenant_id = await _tenant(parts, slug)
            rebuilder = Rebuilder(parts.database)
            with _progress() as progress:
                for projection in wanted:
                    if tenant_id is not None:
                        await one(parts, projection, await _one_tenant(parts, tenant_id), progress)
                        continue
                    # Whoever has no checkpoint yet has no rows either: the first pass makes them.
                    await one(parts, projection, await rebuilder.begin(projection.name), progress)
                    if not failed:
                        await rebuilder.end(projection.name)

    run(work())
    if json_output:
        click.echo(msgspec.json.encode({"rebuilt": done, "failed": failed}))
    else:
        click.echo(f"derived anew: {done} of tenants' projections")
        for failure in failed:
            click.echo(f"left as it was: tenant {failure['tenant_id']}: {failure['error']}", err=True)
    if failed:
        raise SystemExit(1)


@projections_group.command(name="verify")
@chosen
@all_of_them
@of_tenant
@as_json
def verify(name: str | None, slug: str | None, *, everything: bool, json_output: bool) -> None:
    """Compare rows with what the ledger gives. Exit code 1 if one differs; both sides of the first are printed."""
    wanted = _chosen(name, everything=everything)

    async def work() -> list[tuple[str, str, Difference | None]]:
        found = []
        async with core(settings()) as parts:
            tenant_id = await _tenant(parts, slug)
            async with parts.database.connection(PATIENCE) as connection:
                heads = await ledger.heads(connection, tenant_id)
            rebuilder = Rebuilder(parts.database)
            with _progress() as progress:
                task = progress.add_task("comparing", total=sum(head["seq"] for head in heads) * len(wanted))
                for head in heads:
                    for projection in wanted:
                        difference = await rebuilder.verify(projection, head["tenant_id"])
                        found.append((head["slug"], projection.name, difference))
                        progress.advance(task, head["seq"])
        return found

    found = run(work())
    rows = [
        {"tenant": tenant, "projection": projection, "difference": None if d is None else d._asdict()}
        for tenant, projection, d in found
    ]
    different = [row for row in rows if row["difference"] is not None]
    if json_output:
        click.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
    else:
        click.echo(f"{len(rows) - len(different)} of {len(rows)} of tenants' projections are what the ledger gives")
        for tenant, projection, d in found:
            if d is not None:
                click.echo(f"{tenant} {projection}, table {d.table}:\n  live:   {d.live}\n  ledger: {d.folded}")
    if different:
        raise SystemExit(1)


def _chosen(name: str | None, *, everything: bool) -> list[Projection]:
    if everything == (name is not None):
        raise click.UsageError("name one projection, or --all")
    return list(_ALL.values()) if name is None else [_ALL[name]]


async def _tenant(parts: Core, slug: str | None) -> int | None:
    if slug is None:
        return None
    async with parts.database.connection(PATIENCE) as connection:
        tenant_id: int = (await tenants.find(connection, slug))["tenant_id"]
    return tenant_id


async def _one_tenant(parts: Core, tenant_id: int) -> list[dict[str, int]]:
    async with parts.database.connection(PATIENCE) as connection:
        events = (await ledger.head(connection, tenant_id)).seq
    return [{"tenant_id": tenant_id, "events": events}]


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield progress

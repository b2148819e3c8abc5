"""`opsentry projections`: how the read models stand, and deriving them anew."""

import random
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from opsentry.bootstrap import Core, configure_logging, core, projections
from opsentry.cli.common import PATIENCE, as_json, run, settings, show
from opsentry.events import audit
from opsentry.identity import tenants
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine import management
from opsentry.projections.engine import rebuild_pool as rebuild_jobs
from opsentry.projections.engine.comparison import Difference
from opsentry.projections.engine.projection import Projection
from opsentry.projections.engine.projector import PoisonEvent
from opsentry.projections.engine.rebuild import Rebuilder

T = TypeVar("T")

_ALL = {projection.name: projection for projection in projections()}
# What was erased while it was compared differs for a moment.
_TRIES = 3

chosen = click.argument("name", type=click.Choice(list(_ALL)), required=False)
all_of_them = click.option("--all", "everything", is_flag=True, help="All projections.")
of_tenant = click.option("--tenant", "slug", metavar="SLUG", help="One tenant; all if left out.")


@click.group(name="projections")
def projections_group() -> None:
    """See how read models stand, compare them with the ledger, derive them anew."""


@projections_group.command(name="list")
@as_json
def list_projections(*, json_output: bool) -> None:
    """List projections: tenants that are done, behind and halted, the lag, and what a rebuild has still to do."""

    async def work(parts: Core, connection: Connection) -> Sequence[Any]:
        return await management.projection_status(connection, parts.projector.projections)

    rows = run(_connected(work))
    columns = ["version", "generation", "tenants", "done", "behind", "halted"]
    if json_output:
        facts = ["paused", "lag_events", "lag_seconds", "to_rebuild", "rebuild_failed", "rebuilt_at"]
        show(rows, ["projection", *columns, *facts], json_output=True)
    else:
        shown = [{**row, "projection": _name(row), "lag": _lag(row), "rebuild": _rebuild(row)} for row in rows]
        show(shown, ["projection", *columns, "lag", "rebuild"], json_output=False)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['projection']} (paused)" if row["paused"] else str(row["projection"])


def _lag(row: Mapping[str, Any]) -> str:
    return f"{row['lag_events']:,} events, {row['lag_seconds']:.1f} s" if row["lag_events"] else "-"


def _rebuild(row: Mapping[str, Any]) -> str:
    failed = f", {row['rebuild_failed']} failed" if row["rebuild_failed"] else ""
    if row["to_rebuild"]:
        return f"{row['to_rebuild']} left{failed}"
    return "-" if row["rebuilt_at"] is None else f"done {row['rebuilt_at']:%Y-%m-%d %H:%M}"


@projections_group.command(name="halted")
@as_json
def list_halted(*, json_output: bool) -> None:
    """List what stopped at an event that it cannot apply, and why."""

    async def work(_: Core, connection: Connection) -> Sequence[Any]:
        return await management.halted(connection)

    show(run(_connected(work)), ["slug", "projection", "at", "position", "error"], json_output=json_output)


@projections_group.command(name="retry")
@chosen
@all_of_them
@of_tenant
@as_json
def retry(name: str | None, slug: str | None, *, everything: bool, json_output: bool) -> None:
    """Let what is halted go on from where it stopped. Exit code 1 if something stops again."""
    names = [projection.name for projection in _chosen(name, everything=everything)]

    async def work() -> tuple[int, int]:
        async with core(settings()) as parts:
            async with parts.database.connection(PATIENCE) as connection:
                tenant_id = await _tenant(connection, slug)
                released = await management.retry_halted(connection, names, tenant_id)
            for released_tenant in sorted({row["tenant_id"] for row in released}):
                await parts.projector.catch_up(released_tenant, 0)
            async with parts.database.connection(PATIENCE) as connection:
                halted = await management.halted(connection)
        still = [row for row in halted if row["projection"] in names and tenant_id in {None, row["tenant_id"]}]
        return len(released), len(still)

    released, still = run(work())
    if json_output:
        click.echo(msgspec.json.encode({"retried": released, "halted": still}))
    else:
        click.echo(f"{released} went on; {still} stopped again" if still else f"{released} went on")
    if still:
        raise SystemExit(1)


@projections_group.command(name="pause")
@chosen
@all_of_them
@as_json
def pause(name: str | None, *, everything: bool, json_output: bool) -> None:
    """Let projections stand still, for all tenants and everywhere: reads show them as they are."""
    _switch(management.pause, "paused", _chosen(name, everything=everything), json_output=json_output)


@projections_group.command(name="resume")
@chosen
@all_of_them
@as_json
def resume(name: str | None, *, everything: bool, json_output: bool) -> None:
    """Let paused projections go on; workers catch them up."""
    _switch(management.resume, "resumed", _chosen(name, everything=everything), json_output=json_output)


def _switch(
    change: Callable[[Connection, Sequence[str]], Awaitable[list[str]]],
    word: str,
    wanted: Sequence[Projection],
    *,
    json_output: bool,
) -> None:
    async def work(parts: Core, connection: Connection) -> list[str]:
        await management.register(connection, parts.projector.projections)
        return await change(connection, [projection.name for projection in wanted])

    changed = sorted(run(_connected(work)))
    if json_output:
        click.echo(msgspec.json.encode({word: changed}))
    else:
        click.echo(f"{word}: {', '.join(changed) or 'none, they were already'}")


@projections_group.command(name="rebuild")
@chosen
@all_of_them
@of_tenant
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Processes at once.")
@as_json
def rebuild(name: str | None, slug: str | None, jobs: int, *, everything: bool, json_output: bool) -> None:
    """Derive rows anew from the ledger. Readers see the old ones until a tenant is done, and commands go on.

    One that is interrupted or killed leaves every tenant as it was or done; the same command goes on with those that
    are left. So do workers, at their leisure.
    """
    wanted = _chosen(name, everything=everything)
    names = [projection.name for projection in wanted]
    found = settings()
    told = {"tenants": 0, "events": 0}

    async def work() -> list[Any]:
        async with core(found) as parts:
            async with parts.database.connection(PATIENCE) as connection:
                tenant_id = await _tenant(connection, slug)
                standing = await management.projection_status(connection, wanted)
            if paused := [row["projection"] for row in standing if row["paused"]]:
                raise click.ClickException(f"{', '.join(paused)}: paused; `opsentry projections resume` lets it go on")
            own = {projection.name: projection.version for projection in wanted}
            other = [row["projection"] for row in standing if row["version"] != own[row["projection"]]]
            if tenant_id is not None and other:
                raise click.ClickException(
                    f"{', '.join(other)}: rows are of another version than this code's; only those of all tenants"
                    " together can be derived anew with it"
                )
            with _progress() as progress:
                task = progress.add_task("folding", total=None)

                def begin(tenants: int, events: int) -> None:
                    told.update(tenants=tenants, events=events)
                    progress.update(task, total=events, description=f"{tenants} tenants")

                await rebuild_jobs.rebuild(
                    found.database_url,
                    wanted,
                    tenant_id=tenant_id,
                    jobs=jobs,
                    prepare=partial(configure_logging, found.log_level),
                    begin=begin,
                    advance=lambda events: progress.advance(task, events),
                )
                # Of a ledger's events, those that no projection reads were not folded.
                progress.update(task, completed=told["events"])
            async with parts.database.connection(PATIENCE) as connection:
                halted = await management.halted(connection)
        return [
            row
            for row in halted
            if row["at"] == "rebuilding" and row["projection"] in names and tenant_id in {None, row["tenant_id"]}
        ]

    try:
        failed = run(work())
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on with the tenants that are left", err=True)
        raise SystemExit(1) from None
    if json_output:
        columns = ("tenant_id", "slug", "projection", "position", "error")
        failures = [{column: row[column] for column in columns} for row in failed]
        click.echo(msgspec.json.encode({**told, "failed": failures}))
    else:
        click.echo(f"derived anew: {', '.join(names)} of {told['tenants']} tenants, from {told['events']} events")
        for row in failed:
            click.echo(
                f"left as it was: {row['projection']} of {row['slug']}, at event {row['position']}: {row['error']}",
                err=True,
            )
    if failed:
        raise SystemExit(1)


@projections_group.command(name="verify")
@chosen
@all_of_them
@of_tenant
@click.option("--sample", type=click.IntRange(1), metavar="N", help="So many tenants, chosen at random.")
@as_json
def verify(name: str | None, slug: str | None, sample: int | None, *, everything: bool, json_output: bool) -> None:
    """Compare rows with what the ledger gives. Exit code 1 if one differs; both sides of the first are printed."""
    wanted = _chosen(name, everything=everything)

    async def one(parts: Core, projection: Projection, tenant_id: int) -> Difference | str | None:
        rebuilder = Rebuilder(parts.database, [projection])
        difference: Difference | None = None
        for _ in range(_TRIES):
            await parts.projector.catch_up(tenant_id, 0)
            try:
                difference = await rebuilder.verify(projection, tenant_id)
            except PoisonEvent as poison:
                return str(poison)
            if difference is None:
                break
        return difference

    async def work() -> list[tuple[str, str, Difference | str | None]]:
        found = []
        async with core(settings()) as parts:
            async with parts.database.connection(PATIENCE) as connection:
                ledger_heads = await audit.read_ledger_heads(connection, await _tenant(connection, slug))
            if sample is not None:
                ledger_heads = random.sample(ledger_heads, min(sample, len(ledger_heads)))
            with _progress() as progress:
                total = sum(head["position"] for head in ledger_heads) * len(wanted)
                task = progress.add_task("comparing", total=total)
                for head in ledger_heads:
                    for projection in wanted:
                        found.append((head["slug"], projection.name, await one(parts, projection, head["tenant_id"])))
                        progress.advance(task, head["position"])
        return found

    found = run(work())
    different = [(tenant, projection, d) for tenant, projection, d in found if d is not None]
    if json_output:
        rows = [
            {
                "tenant": tenant,
                "projection": projection,
                "difference": d._asdict() if isinstance(d, Difference) else None,
                "error": d if isinstance(d, str) else None,
            }
            for tenant, projection, d in found
        ]
        click.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
    else:
        click.echo(f"{len(found) - len(different)} of {len(found)} of tenants' projections are what the ledger gives")
        for tenant, projection, d in different:
            if isinstance(d, Difference):
                sides = (("live", d.live), ("ledger", d.folded))
                lines = [f"  {side + ':':<8}{msgspec.json.encode(row).decode()}" for side, row in sides]
                click.echo("\n".join([f"{tenant} {projection}, table {d.table}:", *lines]))
            else:
                click.echo(f"{tenant} {projection}: {d}")
    if different:
        raise SystemExit(1)


def _chosen(name: str | None, *, everything: bool) -> list[Projection]:
    if everything == (name is not None):
        raise click.UsageError("name one projection, or --all")
    return list(_ALL.values()) if name is None else [_ALL[name]]


async def _connected(work: Callable[[Core, Connection], Awaitable[T]]) -> T:
    async with core(settings()) as parts, parts.database.connection(PATIENCE) as connection:
        return await work(parts, connection)


async def _tenant(connection: Connection, slug: str | None) -> int | None:
    if slug is None:
        return None
    tenant_id: int = (await tenants.find_tenant(connection, slug))["tenant_id"]
    return tenant_id


class _Rate(ProgressColumn):
    """Events a second, over the last moments."""

    def render(self, task: Task) -> Text:
        """Return the column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} events/s")


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield progress

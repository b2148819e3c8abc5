"""`opsentry projections rebuild|verify`: derive rows from the ledgers, and compare them."""

import random
from functools import partial
from typing import Any, NamedTuple

import click
import msgspec

from opsentry.bootstrap import Core, configure_logging, projections
from opsentry.cli.common import for_any_tenant, opened_core, optional_tenant_id, run, settings
from opsentry.cli.output import EventRate, as_json, print_json, progress_bar
from opsentry.events import audit
from opsentry.projections.engine import management, rebuild_pool
from opsentry.projections.engine.applier import PoisonEvent
from opsentry.projections.engine.comparison import Difference
from opsentry.projections.engine.projection import Projection
from opsentry.projections.engine.rebuild import Rebuilder

_PROJECTIONS = {projection.name: projection for projection in projections()}
# A redaction during the comparison makes rows differ for a moment.
_COMPARE_ATTEMPTS = 3

chosen = click.argument("name", type=click.Choice(list(_PROJECTIONS)), required=False)
all_projections = click.option("--all", "everything", is_flag=True, help="All projections.")


class _Compared(NamedTuple):
    """The outcome for one projection of one tenant: a difference, the error of a poison event, or neither."""

    slug: str
    projection: str
    difference: Difference | None
    error: str | None


def selected(name: str | None, *, everything: bool) -> list[Projection]:
    """Return the projection `name`, or all projections.

    Raises:
        click.UsageError: Both or neither are asked for.
    """
    if everything == (name is not None):
        raise click.UsageError("name one projection, or use --all")
    return list(_PROJECTIONS.values()) if name is None else [_PROJECTIONS[name]]


@click.command()
@chosen
@all_projections
@for_any_tenant
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Number of processes.")
@click.option(
    "--nice",
    "niceness",
    type=click.IntRange(0, 19),
    default=10,
    show_default=True,
    help="Niceness of these processes. At 0 they compete with processes that answer requests.",
)
@as_json
def rebuild(
    name: str | None, slug: str | None, jobs: int, niceness: int, *, everything: bool, json_output: bool
) -> None:
    """Rebuild the rows of projections from the ledgers. Reads and commands continue meanwhile.

    Each tenant keeps its old rows until its new ones replace them in one transaction. After an interruption, run the
    command again: it continues with the remaining tenants. Workers do so too, slowly.
    """
    wanted = selected(name, everything=everything)
    names = [projection.name for projection in wanted]
    found = settings()
    totals = {"tenants": 0, "events": 0}

    async def work() -> list[Any]:
        async with opened_core() as parts:
            async with parts.database.connection() as connection:
                tenant_id = await optional_tenant_id(connection, slug)
                status = await management.projection_status(connection, wanted)
            _refuse_paused(status)
            if tenant_id is not None:
                _refuse_other_versions(status, wanted)
            with progress_bar(EventRate()) as progress:
                task = progress.add_task("replaying", total=None)

                def begin(tenants: int, events: int) -> None:
                    totals.update(tenants=tenants, events=events)
                    progress.update(task, total=events, description=f"{tenants} tenants")

                await rebuild_pool.rebuild(
                    found.database_url,
                    wanted,
                    tenant_id=tenant_id,
                    jobs=jobs,
                    niceness=niceness,
                    prepare=partial(configure_logging, found.log_level),
                    on_start=begin,
                    on_progress=lambda events: progress.advance(task, events),
                )
                # The replay skips events that no projection handles.
                progress.update(task, completed=totals["events"])
            async with parts.database.connection() as connection:
                halted = await management.list_halted(connection)
        return [
            row
            for row in halted
            if row["phase"] == "rebuild" and row["projection"] in names and tenant_id in {None, row["tenant_id"]}
        ]

    try:
        failed = run(work())
    except KeyboardInterrupt:
        click.echo("interrupted; run the command again to continue with the remaining tenants", err=True)
        raise SystemExit(1) from None
    if json_output:
        columns = ("tenant_id", "slug", "projection", "position", "error")
        failures = [{column: row[column] for column in columns} for row in failed]
        click.echo(msgspec.json.encode({**totals, "failed": failures}))
    else:
        click.echo(f"rebuilt {', '.join(names)} of {totals['tenants']} tenants from {totals['events']} events")
        for row in failed:
            click.echo(
                f"kept the old rows of {row['projection']} of {row['slug']}: event {row['position']}: {row['error']}",
                err=True,
            )
    if failed:
        raise SystemExit(1)


def _refuse_paused(status: list[Any]) -> None:
    if paused := [row["projection"] for row in status if row["paused"]]:
        raise click.ClickException(
            f"{', '.join(paused)}: paused; nothing was rebuilt. Run `opsentry projections resume` first."
        )


def _refuse_other_versions(status: list[Any], wanted: list[Projection]) -> None:
    versions = {projection.name: projection.version for projection in wanted}
    if other := [row["projection"] for row in status if row["version"] != versions[row["projection"]]]:
        raise click.ClickException(
            f"{', '.join(other)}: the rows have another version than this code; nothing was rebuilt. Run the command"
            " without --tenant."
        )


@click.command()
@chosen
@all_projections
@for_any_tenant
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Compare only N tenants, chosen at random.")
@as_json
def verify(name: str | None, slug: str | None, sample: int | None, *, everything: bool, json_output: bool) -> None:
    """Compare rows with a replay of the ledgers, and print both sides of each first difference.

    Exit code 1 if a row differs.
    """
    wanted = selected(name, everything=everything)

    async def work() -> list[_Compared]:
        compared = []
        async with opened_core() as parts:
            async with parts.database.connection() as connection:
                ledger_heads = await audit.read_ledger_heads(connection, await optional_tenant_id(connection, slug))
            if sample is not None:
                ledger_heads = random.sample(ledger_heads, min(sample, len(ledger_heads)))
            with progress_bar(EventRate()) as progress:
                total = sum(head["position"] for head in ledger_heads) * len(wanted)
                task = progress.add_task("comparing", total=total)
                for head in ledger_heads:
                    for projection in wanted:
                        outcome = await _compare(parts, projection, head["tenant_id"])
                        compared.append(_Compared(head["slug"], projection.name, *outcome))
                        progress.advance(task, head["position"])
        return compared

    compared = run(work())
    if json_output:
        print_json([
            {
                "slug": one.slug,
                "projection": one.projection,
                "difference": None if one.difference is None else one.difference._asdict(),
                "error": one.error,
            }
            for one in compared
        ])  # fmt: skip
    else:
        _show(compared)
    if any(_differs(one) for one in compared):
        raise SystemExit(1)


async def _compare(parts: Core, projection: Projection, tenant_id: int) -> tuple[Difference | None, str | None]:
    rebuilder = Rebuilder(parts.database, [projection])
    difference: Difference | None = None
    for _ in range(_COMPARE_ATTEMPTS):
        await parts.projector.catch_up(tenant_id, 0)
        try:
            difference = await rebuilder.verify(projection, tenant_id)
        except PoisonEvent as poison:
            return None, str(poison)
        if difference is None:
            break
    return difference, None


def _differs(compared: _Compared) -> bool:
    return compared.difference is not None or compared.error is not None


def _show(compared: list[_Compared]) -> None:
    different = [one for one in compared if _differs(one)]
    click.echo(f"{len(compared) - len(different)} of {len(compared)} projections of tenants equal the ledger")
    for one in different:
        if one.difference is None:
            click.echo(f"{one.slug} {one.projection}: {one.error}")
            continue
        click.echo(f"{one.slug} {one.projection}, table {one.difference.table}:")
        for side, row in (("live", one.difference.stored), ("ledger", one.difference.replayed)):
            click.echo(f"  {side + ':':<8}{msgspec.json.encode(row).decode()}")

"""`opsentry projections`: the state of the read models."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import click
import msgspec

from opsentry.bootstrap import Core
from opsentry.cli.common import for_any_tenant, opened_core, optional_tenant_id, run
from opsentry.cli.output import as_json, show
from opsentry.cli.projections_rebuild import all_projections, chosen, rebuild, selected, verify
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine import management
from opsentry.projections.engine.projection import Projection

T = TypeVar("T")


class _Retried(NamedTuple):
    retried: int
    halted: int


@click.group(name="projections")
def projections_group() -> None:
    """Show projections, compare them with the ledgers, and rebuild them."""


projections_group.add_command(rebuild)
projections_group.add_command(verify)


@projections_group.command(name="status")
@as_json
def projection_status(*, json_output: bool) -> None:
    """Show the lag and the rebuild progress of each projection, over all tenants."""

    async def work(parts: Core, connection: Connection) -> Sequence[Any]:
        return await management.projection_status(connection, parts.projector.projections)

    rows = run(_connected(work))
    columns = ["projection", "tenants", "up_to_date", "lagging", "halted", "paused", "lag_events", "to_rebuild"]
    if json_output:
        columns += ["lag_seconds", "version", "generation", "rebuild_failed", "rebuilt_at"]
    show(rows, columns, json_output=json_output)


@projections_group.command(name="halted")
@as_json
def list_halted(*, json_output: bool) -> None:
    """List projections that an event halted, with the error."""

    async def work(_: Core, connection: Connection) -> Sequence[Any]:
        return await management.list_halted(connection)

    show(run(_connected(work)), ["slug", "projection", "phase", "position", "error"], json_output=json_output)


@projections_group.command(name="retry")
@chosen
@all_projections
@for_any_tenant
@as_json
def retry(name: str | None, slug: str | None, *, everything: bool, json_output: bool) -> None:
    """Resume halted projections at the event that halted them.

    Exit code 1 if a projection halts again.
    """
    names = [projection.name for projection in selected(name, everything=everything)]

    async def work() -> _Retried:
        async with opened_core() as parts:
            async with parts.database.connection() as connection:
                tenant_id = await optional_tenant_id(connection, slug)
                released = await management.retry_halted(connection, names, tenant_id)
            for released_tenant in sorted({row["tenant_id"] for row in released}):
                await parts.projector.catch_up(released_tenant, 0)
            async with parts.database.connection() as connection:
                halted = await management.list_halted(connection)
        still = [row for row in halted if row["projection"] in names and tenant_id in {None, row["tenant_id"]}]
        return _Retried(len(released), len(still))

    done = run(work())
    if json_output:
        click.echo(msgspec.json.encode(done._asdict()))
    else:
        click.echo(f"retried {done.retried}; {done.halted} halted again")
    if done.halted:
        raise SystemExit(1)


@projections_group.command(name="pause")
@chosen
@all_projections
@as_json
def pause(name: str | None, *, everything: bool, json_output: bool) -> None:
    """Pause projections for all tenants. Reads show their present rows."""
    _switch(management.pause, "paused", selected(name, everything=everything), json_output=json_output)


@projections_group.command(name="resume")
@chosen
@all_projections
@as_json
def resume(name: str | None, *, everything: bool, json_output: bool) -> None:
    """Resume paused projections. Workers catch them up."""
    _switch(management.resume, "resumed", selected(name, everything=everything), json_output=json_output)


def _switch(
    change: Callable[[Connection, Sequence[str]], Awaitable[list[str]]],
    word: str,
    projections: Sequence[Projection],
    *,
    json_output: bool,
) -> None:
    async def work(parts: Core, connection: Connection) -> list[str]:
        await management.register(connection, parts.projector.projections)
        return await change(connection, [projection.name for projection in projections])

    changed = sorted(run(_connected(work)))
    if json_output:
        click.echo(msgspec.json.encode({word: changed}))
    else:
        click.echo(f"{word}: {', '.join(changed) or f'none, all were {word} already'}")


async def _connected(work: Callable[[Core, Connection], Awaitable[T]]) -> T:
    async with opened_core() as parts, parts.database.connection() as connection:
        return await work(parts, connection)

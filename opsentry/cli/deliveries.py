"""`opsentry outbox`: how sending stands, and what can be done about it."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import click
import msgspec

from opsentry.cli.common import PATIENCE, as_json, opened, run, settings, show
from opsentry.identity import tenants
from opsentry.infrastructure.encryption import generate_key
from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery import history, management

of_tenant = click.option("--tenant", "slug", metavar="SLUG", help="One tenant; all if left out.")
of_subscription = click.option(
    "--subscription", "subscription_id", type=click.IntRange(min=1), help="One subscription."
)
everything = click.option("--all", "everything", is_flag=True, help="All that match, instead of IDs.")


@click.group(name="outbox")
def outbox_group() -> None:
    """See what waits to be sent, try it again, give it up, and hold sending."""


@outbox_group.command(name="status")
@of_tenant
@as_json
def status(slug: str | None, *, json_output: bool) -> None:
    """Say how sending stands, for each tenant that anything waits for."""

    async def work(connection: Connection) -> Sequence[Any]:
        return await management.status(connection, await _tenant(connection, slug))

    rows = run(_transaction(work))
    columns = [
        "slug",
        "due",
        "oldest_due_seconds",
        "waiting",
        "next_attempt_at",
        "untaken",
        "leased",
        "failing",
    ]
    show(rows, [*columns, "probed", "parked", "paused", "settled"], json_output=json_output)


@outbox_group.command(name="list")
@of_tenant
@of_subscription
@click.option("--state", "states", multiple=True, type=click.Choice(history.STATES), help="Only in this state.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="So many at most.")
@as_json
def list_deliveries(
    slug: str | None, subscription_id: int | None, states: Sequence[str], limit: int, *, json_output: bool
) -> None:
    """List deliveries, the newest first, with what came of them."""

    async def work(connection: Connection) -> Sequence[Any]:
        tenant_id = await _tenant(connection, slug)
        return await management.listing(
            connection, tenant_id, subscription_id=subscription_id, states=list(states) or None, limit=limit
        )

    rows = run(_transaction(work))
    columns = ["id", "slug", "subscription_id", "topic", "position", "state", "tried", "due_at", "answer", "error"]
    more = ["channel", "stream_kind", "stream_id", "created_at"] if json_output else []
    show(rows, [*columns, *more], json_output=json_output)


@outbox_group.command(name="retry")
@click.argument("ids", nargs=-1)
@everything
@of_tenant
@of_subscription
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(management.RETRIED),
    default=("parked",),
    show_default=True,
    help="What --all means.",
)
@as_json
def retry(
    ids: Sequence[str],
    slug: str | None,
    subscription_id: int | None,
    states: Sequence[str],
    *,
    everything: bool,
    json_output: bool,
) -> None:
    """Try deliveries again now, with all attempts anew: those with these IDS (msg_…), or --all that match."""
    chosen = _chosen(ids, everything=everything)

    meant = management.RETRIED if chosen else states
    moved = run(_moved(management.retry, slug, management.Chosen(meant, chosen, None, subscription_id)))
    _say(moved, "are tried again", chosen, json_output=json_output)


@outbox_group.command(name="drop")
@click.argument("ids", nargs=-1)
@everything
@of_tenant
@of_subscription
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
def drop(
    ids: Sequence[str],
    slug: str | None,
    subscription_id: int | None,
    *,
    everything: bool,
    yes: bool,
    json_output: bool,
) -> None:
    """Give up deliveries that wait or are parked: those with these IDS (msg_…), or --all that match."""
    chosen = _chosen(ids, everything=everything)
    if everything and not yes:
        click.confirm("Give up all that waits there?", abort=True, err=True)

    moved = run(_moved(management.drop, slug, management.Chosen(management.DROPPED, chosen, None, subscription_id)))
    _say(moved, "were given up", chosen, json_output=json_output)


@outbox_group.command(name="pause")
@of_tenant
@as_json
def pause(slug: str | None, *, json_output: bool) -> None:
    """Send nothing more, to one tenant's subscriptions or to any; what is under way ends. Readiness stays as it is."""
    _switch(management.pause, slug, "paused", "was paused already", json_output=json_output)


@outbox_group.command(name="resume")
@of_tenant
@as_json
def resume(slug: str | None, *, json_output: bool) -> None:
    """Send again what waits."""
    _switch(management.resume, slug, "resumed", "was not paused", json_output=json_output)


@click.command(name="secret-key")
def secret_key() -> None:
    """Print a new key for OPSENTRY_ENCRYPTION_KEYS.

    Opsentry does not store the key. Without it, encrypted secrets cannot be read.
    """
    click.echo(generate_key())


def _switch(
    change: Callable[[Connection, int], Awaitable[bool]],
    slug: str | None,
    done: str,
    already: str,
    *,
    json_output: bool,
) -> None:
    async def work(connection: Connection) -> tuple[bool, list[str]]:
        tenant_id = await _tenant(connection, slug)
        changed = await change(connection, management.ALL_TENANTS if tenant_id is None else tenant_id)
        return changed, await management.paused(connection)

    changed, paused = run(_transaction(work))
    if json_output:
        click.echo(msgspec.json.encode({"changed": changed, "paused": paused}))
        return
    click.echo(f"{slug or 'all tenants'}: {done if changed else already}")
    if paused:
        click.echo(f"paused now: {', '.join(paused)}")


def _chosen(ids: Sequence[str], *, everything: bool) -> list[UUID] | None:
    """Return the ids that are meant, `None` for all that match."""
    if bool(ids) == everything:
        raise click.UsageError("name deliveries by their ids, or say --all")
    found = [history.intent_id(each) for each in ids]
    if bad := [each for each, intent in zip(ids, found, strict=True) if intent is None]:
        raise click.UsageError(f"{', '.join(bad)}: must be msg_ and 32 hex digits")
    return None if everything else [intent for intent in found if intent is not None]


def _say(moved: int, done: str, chosen: Sequence[UUID] | None, *, json_output: bool) -> None:
    """Print how many; end with exit code 1 where not all that were named could be."""
    if json_output:
        click.echo(msgspec.json.encode({"moved": moved}))
    else:
        click.echo(f"{moved} {done}")
    if chosen is not None and moved < len(set(chosen)):
        raise SystemExit(1)


async def _moved(move: Callable[..., Awaitable[int]], slug: str | None, chosen: management.Chosen) -> int:
    async with opened(settings()) as database:
        async with database.connection(PATIENCE) as connection:
            tenant_id = await _tenant(connection, slug)
        return await move(database, chosen._replace(tenant_id=tenant_id), seconds=PATIENCE)


async def _transaction(work: Callable[[Connection], Awaitable[Any]]) -> Any:
    async with opened(settings()) as database, database.transaction(PATIENCE) as connection:
        return await work(connection)


async def _tenant(connection: Connection, slug: str | None) -> int | None:
    return None if slug is None else int((await tenants.find_tenant(connection, slug))["tenant_id"])

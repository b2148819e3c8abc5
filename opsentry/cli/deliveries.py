"""`opsentry deliveries`: the messages to subscriptions, and their outcomes."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import click
import msgspec

from opsentry.cli.common import (
    COMMAND_TIMEOUT_SECONDS,
    for_any_tenant,
    opened,
    optional_tenant_id,
    run,
    settings,
    transaction,
)
from opsentry.cli.output import as_json, show
from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery import history, management
from opsentry.notifications.delivery.states import CANCELLABLE_STATES, RETRYABLE_STATES, STATES

of_subscription = click.option(
    "--subscription", "subscription_id", type=click.IntRange(min=1), help="Id of one subscription; needs --tenant."
)
all_matching = click.option("--all", "everything", is_flag=True, help="All matching deliveries, instead of IDS.")


@click.group(name="deliveries")
def deliveries_group() -> None:
    """List deliveries, retry them and cancel them."""


@deliveries_group.command(name="status")
@for_any_tenant
@as_json
def status(slug: str | None, *, json_output: bool) -> None:
    """Show pending and failed deliveries of each tenant that has any."""

    async def work(connection: Connection) -> Sequence[Any]:
        return await management.sending_status(connection, await optional_tenant_id(connection, slug))

    rows = run(transaction(work))
    columns = ["slug", "due", "oldest_due_seconds", "scheduled", "exhausted", "failing", "paused"]
    if json_output:
        columns += ["next_attempt_at", "outbox_backlog", "outbox_cursor", "leased", "probed"]
    show(rows, columns, json_output=json_output)


@deliveries_group.command(name="list")
@for_any_tenant
@of_subscription
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="Only this state; repeatable.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Maximum number.")
@as_json
def list_deliveries(
    slug: str | None, subscription_id: int | None, states: Sequence[str], limit: int, *, json_output: bool
) -> None:
    """List deliveries with their last outcome, newest first."""
    _check_subscription(slug, subscription_id)

    async def work(connection: Connection) -> Sequence[Any]:
        return await management.list_all_deliveries(
            connection,
            await optional_tenant_id(connection, slug),
            subscription_id=subscription_id,
            states=list(states) or None,
            limit=limit,
        )

    rows = run(transaction(work))
    columns = ["id", "slug", "state", "next_attempt_at", "error"]
    if json_output:
        columns += ["subscription_id", "channel", "topic", "position", "stream_kind", "stream_id", "created_at"]
        columns += ["attempts_total", "response_status"]
    show(rows, columns, json_output=json_output)


@deliveries_group.command(name="retry")
@click.argument("ids", nargs=-1)
@all_matching
@for_any_tenant
@of_subscription
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(RETRYABLE_STATES),
    default=("exhausted",),
    show_default=True,
    help="State that --all matches; repeatable.",
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
    """Send deliveries again now, with a full set of attempts: those with these IDS (msg_…), or --all that match."""
    _check_subscription(slug, subscription_id)
    chosen = _chosen(ids, everything=everything)

    allowed = RETRYABLE_STATES if chosen else states
    moved = run(
        _move(management.retry_deliveries, slug, management.DeliverySelection(allowed, chosen, None, subscription_id))
    )
    _report(moved, "retried", chosen, json_output=json_output)


@deliveries_group.command(name="cancel")
@click.argument("ids", nargs=-1)
@all_matching
@for_any_tenant
@of_subscription
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@as_json
def cancel(
    ids: Sequence[str],
    slug: str | None,
    subscription_id: int | None,
    *,
    everything: bool,
    yes: bool,
    json_output: bool,
) -> None:
    """Cancel pending and exhausted deliveries: those with these IDS (msg_…), or --all that match."""
    _check_subscription(slug, subscription_id)
    chosen = _chosen(ids, everything=everything)
    if everything and not yes:
        click.confirm("Cancel all matching deliveries?", abort=True, err=True)

    moved = run(
        _move(
            management.cancel_deliveries,
            slug,
            management.DeliverySelection(CANCELLABLE_STATES, chosen, None, subscription_id),
        )
    )
    _report(moved, "cancelled", chosen, json_output=json_output)


def _check_subscription(slug: str | None, subscription_id: int | None) -> None:
    if subscription_id is not None and slug is None:
        raise click.UsageError("--subscription needs --tenant: each tenant counts its subscriptions from 1")


def _chosen(ids: Sequence[str], *, everything: bool) -> list[UUID] | None:
    """Return the intents of the message `ids`, or `None` for all that match."""
    if bool(ids) == everything:
        raise click.UsageError("name deliveries by their ids, or use --all")
    found = [history.parse_message_id(each) for each in ids]
    if bad := [each for each, intent in zip(ids, found, strict=True) if intent is None]:
        raise click.UsageError(f"{', '.join(bad)}: must be msg_ and 32 hex digits")
    return None if everything else [intent for intent in found if intent is not None]


def _report(moved: int, done: str, chosen: Sequence[UUID] | None, *, json_output: bool) -> None:
    """Print the number of changed deliveries; exit with 1 if a named one did not change."""
    if json_output:
        click.echo(msgspec.json.encode({done: moved}))
    else:
        click.echo(f"{done} 1 delivery" if moved == 1 else f"{done} {moved} deliveries")
    if chosen is not None and moved < len(set(chosen)):
        raise SystemExit(1)


async def _move(move: Callable[..., Awaitable[int]], slug: str | None, chosen: management.DeliverySelection) -> int:
    async with opened(settings()) as database:
        async with database.connection() as connection:
            tenant_id = await optional_tenant_id(connection, slug)
        return await move(database, chosen._replace(tenant_id=tenant_id), seconds=COMMAND_TIMEOUT_SECONDS)

"""`opsentry sending`: pause and resume deliveries."""

from collections.abc import Awaitable, Callable

import click
import msgspec

from opsentry.cli.common import for_any_tenant, optional_tenant_id, run, transaction
from opsentry.cli.output import as_json
from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery import management


@click.group(name="sending")
def sending_group() -> None:
    """Pause and resume the sending of deliveries."""


@sending_group.command(name="pause")
@for_any_tenant
@as_json
def pause(slug: str | None, *, json_output: bool) -> None:
    """Stop sending for one tenant or for all. Attempts in flight end; readiness does not change."""
    _switch(management.pause_sending, slug, "paused", "was paused already", json_output=json_output)


@sending_group.command(name="resume")
@for_any_tenant
@as_json
def resume(slug: str | None, *, json_output: bool) -> None:
    """Send pending deliveries again."""
    _switch(management.resume_sending, slug, "resumed", "was not paused", json_output=json_output)


def _switch(
    change: Callable[[Connection, int], Awaitable[bool]],
    slug: str | None,
    changed_text: str,
    unchanged_text: str,
    *,
    json_output: bool,
) -> None:
    async def work(connection: Connection) -> tuple[bool, list[str]]:
        tenant_id = await optional_tenant_id(connection, slug)
        changed = await change(connection, management.ALL_TENANTS if tenant_id is None else tenant_id)
        return changed, await management.paused_tenants(connection)

    changed, paused = run(transaction(work))
    if json_output:
        click.echo(msgspec.json.encode({"changed": changed, "paused": paused}))
        return
    click.echo(f"{slug or 'all tenants'}: {changed_text if changed else unchanged_text}")
    if paused:
        click.echo(f"paused now: {', '.join(paused)}")

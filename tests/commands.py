"""Run commands without permissions, notifications or catch-up: what tests of lower layers start from."""

from typing import Any

from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident
from opsentry.events.codec import Actor, Meta
from opsentry.events.command_handler import CommandOptions, CommandResult


async def create(
    parts, decider, tenant_id, command, meta, *, occurred_at=None, reservation=None, key=None
) -> CommandResult[Any]:
    """Create a stream; return the `CommandResult`."""
    options = CommandOptions(meta, occurred_at, key)
    handler = parts.application.command_handler
    created: CommandResult[Any] = await handler.create(decider, tenant_id, command, options, reservation=reservation)
    return created


async def change(
    parts, decider, tenant_id, stream_id, command, meta, *, occurred_at=None, key=None, expected=None
) -> CommandResult[Any]:
    """Change a stream; return the `CommandResult`."""
    options = CommandOptions(meta, occurred_at, key)
    handler = parts.application.command_handler
    changed: CommandResult[Any] = await handler.change(
        decider, tenant_id, stream_id, command, options, expected_versions=expected
    )
    return changed


async def opened(parts, tenant, title="Down", **fields) -> CommandResult[Any]:
    """Declare an incident as an operator; return the `CommandResult`."""
    command = OpenIncident(title=title, **fields)
    return await create(parts, incident.DECIDER, tenant.id, command, Meta(Actor("operator")))

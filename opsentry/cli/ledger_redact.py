"""`opsentry ledger redact`: erase texts of one incident or maintenance window."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import click

from opsentry.cli.common import COMMAND_TIMEOUT_SECONDS, META, for_tenant, run, tenant_core
from opsentry.cli.output import as_json, print_json
from opsentry.domain import incident, maintenance
from opsentry.domain.decider import Decider
from opsentry.domain.incident import RedactIncident
from opsentry.domain.maintenance import RedactMaintenance
from opsentry.domain.redaction import HistoryEntry, RedactionPlan, plan
from opsentry.events import store
from opsentry.events.codec import RecordedEvent

_DECIDERS: Mapping[str, tuple[Decider[Any, Any, Any], Sequence[str], type[Any]]] = {
    incident.KIND: (incident.DECIDER, incident.REDACTABLE_FIELDS, RedactIncident),
    maintenance.KIND: (maintenance.DECIDER, maintenance.REDACTABLE_FIELDS, RedactMaintenance),
}


class _Redacted(NamedTuple):
    redacted: Sequence[int]
    position: int


@click.command()
@click.argument("kind", type=click.Choice(list(_DECIDERS)))
@click.argument("stream_id", metavar="ID", type=click.IntRange(1))
@for_tenant
@click.option("--field", "fields", multiple=True, help="Field to erase with all its earlier values; repeatable.")
@click.option("--event", "events", type=click.IntRange(1), multiple=True, help="Position to redact; repeatable.")
@click.option("--reason", required=True, help="Reason for the redaction. The ledger keeps it.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@as_json
def redact(
    kind: str,
    stream_id: int,
    slug: str,
    fields: tuple[str, ...],
    events: tuple[int, ...],
    reason: str,
    *,
    yes: bool,
    json_output: bool,
) -> None:
    """Erase texts of an incident or a maintenance window for good.

    The events and the hash chain stay intact. The erased texts read [redacted] from then on.
    """
    decider, redactable_fields, command = _DECIDERS[kind]

    def plan_of(history: Sequence[RecordedEvent]) -> RedactionPlan:
        entries = [HistoryEntry(event.version, event.position, event.event) for event in history]
        return plan(entries, redactable_fields, fields, events)

    async def work() -> _Redacted:
        async with tenant_core(slug) as (parts, tenant_id):
            async with parts.database.connection(COMMAND_TIMEOUT_SECONDS) as connection:
                before = await store.read_stream(connection, tenant_id, kind, stream_id)
            if not before:
                raise click.ClickException(f"{slug} has no {kind} {stream_id}")
            versions = plan_of(before).versions
            positions = [event.position for event in before if event.version in versions]
            if positions and not yes:
                click.confirm(
                    f"Erase the texts of {kind} {stream_id} at {', '.join(map(str, positions))} for good?",
                    abort=True,
                    err=True,
                )
            executed = await parts.commands.execute(
                decider, tenant_id, stream_id, lambda history: command(erasure=plan_of(history), reason=reason), META
            )
            await parts.projector.catch_up(tenant_id, executed.position)
            return _Redacted(positions, executed.position)

    done = run(work())
    if json_output:
        print_json(done._asdict())
    elif done.redacted:
        count = "1 event" if len(done.redacted) == 1 else f"{len(done.redacted)} events"
        click.echo(f"redacted {count} of {kind} {stream_id}; recorded up to position {done.position}")
    else:
        click.echo("nothing to redact: the texts were erased before")

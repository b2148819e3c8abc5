"""`opsentry ledger redact`: erase texts of one incident or maintenance window."""

from collections.abc import Sequence
from typing import NamedTuple

import click

from opsentry.application.errors import NotFound
from opsentry.application.redactions import preview_redaction, redact_incident, redact_maintenance
from opsentry.cli.common import application_for, for_tenant, run
from opsentry.cli.output import as_json, print_json
from opsentry.domain import incident, maintenance

_REDACT = {incident.KIND: redact_incident, maintenance.KIND: redact_maintenance}


class _Redacted(NamedTuple):
    redacted: Sequence[int]
    position: int


@click.command()
@click.argument("kind", type=click.Choice(list(_REDACT)))
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

    async def work() -> _Redacted:
        async with application_for(slug) as (app, caller):
            try:
                targets = await preview_redaction(app, caller, kind, stream_id, fields=fields, positions=events)
            except NotFound:
                raise click.ClickException(f"{slug} has no {kind} {stream_id}") from None
            if targets and not yes:
                click.confirm(
                    f"Erase the texts of {kind} {stream_id} at {', '.join(map(str, targets))} for good?",
                    abort=True,
                    err=True,
                )
            resource = await _REDACT[kind](app, caller, stream_id, fields=fields, positions=events, reason=reason)
            return _Redacted(targets, resource.position)

    done = run(work())
    if json_output:
        print_json(done._asdict())
    elif done.redacted:
        count = "1 event" if len(done.redacted) == 1 else f"{len(done.redacted)} events"
        click.echo(f"redacted {count} of {kind} {stream_id}; recorded up to position {done.position}")
    else:
        click.echo("nothing to redact: the texts were erased before")

"""`opsentry history|redact`: what became of one incident, window or service, and erasing what was written there."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opsentry.cli.common import META, as_json, parse_position, run, stream_core, time
from opsentry.domain import incident, maintenance, service
from opsentry.domain.decider import Decider
from opsentry.domain.incident import IncidentUpdated, RedactIncident
from opsentry.domain.maintenance import MaintenanceUpdated, RedactMaintenance
from opsentry.domain.redaction import HistoryEntry, RedactionPlan, plan
from opsentry.events import audit, store
from opsentry.events.audit import Entry
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections import incident_view, services
from opsentry.projections import maintenance as windows

_EVOLVE: Mapping[str, Callable[[Any, RecordedEvent], msgspec.Struct]] = {
    incident.KIND: incident_view.evolve_view,
    maintenance.KIND: windows.evolve_view,
    service.KIND: services.evolve_view,
}
_DECIDERS: Mapping[str, tuple[Decider[Any, Any, Any], Sequence[str], type[Any]]] = {
    incident.KIND: (incident.DECIDER, incident.REDACTABLE_FIELDS, RedactIncident),
    maintenance.KIND: (maintenance.DECIDER, maintenance.REDACTABLE_FIELDS, RedactMaintenance),
}
# What every event changes, or nobody looks for here.
_DULL = {"id", "services", "created_at", "updated_at", "current_status"}
_PAGE = 1000

of_tenant = click.option("--tenant", "slug", metavar="SLUG", help="The tenant's slug; found by the number if left out.")


class Change(NamedTuple):
    """A field before and after."""

    field: str
    before: Any
    after: Any


@click.command()
@click.argument("kind", type=click.Choice(list(_EVOLVE)))
@click.argument("number", type=click.IntRange(1))
@of_tenant
@click.option("--as-of", "as_of", metavar="MOMENT", help="What it was then: a position in the ledger, or a time.")
@click.option("--at", "at", metavar="TIME", help="What it was then by when things happened, as is known now.")
@click.option("--diff", "moments", nargs=2, metavar="MOMENT MOMENT", help="What changed between two moments.")
@as_json
def history(
    kind: str,
    number: int,
    slug: str | None,
    as_of: str | None,
    at: str | None,
    moments: tuple[str, str] | None,
    *,
    json_output: bool,
) -> None:
    """Show what became of an incident, a maintenance window or a service: when, who, what changed.

    A MOMENT is a position in the ledger, or a time such as 2026-06-01T02:00:00Z. Times are those of recording, as a
    read at that moment showed it; only --at goes by when things happened, which differs where history was imported or
    told later.
    """
    if sum(option is not None for option in (as_of, at, moments)) > 1:
        raise click.UsageError("--as-of, --at and --diff exclude each other")
    happened = None if at is None else time(at)

    async def work() -> tuple[list[RecordedEvent], list[Entry], int, int]:
        async with (
            stream_core(kind, number, slug) as (parts, tenant_id),
            parts.database.connection(30) as connection,
        ):
            begin = await parse_position(connection, tenant_id, moments[0]) if moments else 0
            wanted = moments[1] if moments else as_of
            end = 2**63 - 1 if wanted is None else await parse_position(connection, tenant_id, wanted)
            recorded = [e for e in await store.read_stream(connection, tenant_id, kind, number) if e.position <= end]
            return recorded, await _entries(connection, tenant_id, kind, number, end), begin, end

    recorded, entries, begin, end = run(work())
    if happened is not None:
        _show_state(kind, known_at(recorded, happened), at or "", json_output=json_output)
    elif moments is not None:
        _show_difference(kind, recorded, begin, end, json_output=json_output)
    elif as_of is not None:
        _show_state(kind, recorded, as_of, json_output=json_output)
    elif json_output:
        click.echo(msgspec.json.format(msgspec.json.encode(entries)).decode())
    else:
        _show_timeline(kind, recorded, entries)


def known_at(recorded: Sequence[RecordedEvent], moment: datetime) -> list[RecordedEvent]:
    """Return the events of a stream that had happened at `moment`, whenever they were recorded."""
    happened = [event for event in recorded if event.occurred_at <= moment]
    return happened if happened and happened[0].version == 1 else []


async def _entries(connection: Connection, tenant_id: int, kind: str, number: int, end: int) -> list[Entry]:
    found: list[Entry] = []
    after: int | None = 0
    while after is not None:
        page, after = await audit.read_stream_page(connection, tenant_id, kind, number, after=after, limit=_PAGE)
        found += page
    return [entry for entry in found if entry.position <= end]


def _state(kind: str, recorded: Sequence[RecordedEvent]) -> dict[str, Any]:
    view = None
    for event in recorded:
        view = _EVOLVE[kind](view, event)
    return {} if view is None else msgspec.structs.asdict(view)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    return [
        Change(name, before.get(name), value)
        for name, value in after.items()
        if name not in _DULL and value != before.get(name) and (before or value not in (None, ()))
    ]


def _show_timeline(kind: str, recorded: Sequence[RecordedEvent], entries: Sequence[Entry]) -> None:
    table = Table("position", "when", "who", "what", "what changed", show_lines=True)
    view: msgspec.Struct | None = None
    before: dict[str, Any] = {}
    for event, entry in zip(recorded, entries, strict=True):
        view = _EVOLVE[kind](view, event)
        after = msgspec.structs.asdict(view)
        told = [_says(change) for change in _changes(before, after)] + _words(entry, after)
        when = _moment(entry.occurred_at)
        if entry.occurred_at != entry.recorded_at:
            when += f"\nrecorded {_moment(entry.recorded_at)}"
        who = entry.actor.name or entry.actor.kind
        who += f"\n{entry.actor.prefix}" if entry.actor.prefix else ""
        table.add_row(str(entry.position), when, Text(who), entry.type.partition(".")[2], Text("\n".join(told)))
        before = after
    _print(table)


def _words(entry: Entry, state: Mapping[str, Any]) -> list[str]:
    """Return what was said that no field of the state shows."""
    return [str(entry.data[name]) for name in ("message", "reason") if name in entry.data and name not in state]


def _show_state(kind: str, recorded: Sequence[RecordedEvent], moment: str, *, json_output: bool) -> None:
    if not recorded:
        raise click.ClickException(f"there was none at {moment}")
    state = _state(kind, recorded) | {"updates": _updates(recorded)}
    state.pop("services", None)
    if json_output:
        click.echo(msgspec.json.format(msgspec.json.encode(state)).decode())
        return
    table = Table("field", f"at {moment}")
    for name, value in state.items():
        if name != "updates":
            table.add_row(name, Text(_plain(value)))
    for update in state["updates"]:
        table.add_row(f"update {update['id']}", Text(f"{_moment(update['created_at'])} {update['message']}"))
    _print(table)


def _show_difference(kind: str, recorded: Sequence[RecordedEvent], begin: int, end: int, *, json_output: bool) -> None:
    earlier = [event for event in recorded if event.position <= begin]
    changes = _changes(_state(kind, earlier), _state(kind, recorded))
    added = _updates(recorded[len(earlier) :])
    if json_output:
        found = {
            "from": begin,
            "to": end,
            "changed": {change.field: {"before": change.before, "after": change.after} for change in changes},
            "updates": added,
        }
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    table = Table("field", f"at {begin}", f"at {end}")
    for change in changes:
        table.add_row(change.field, Text(_plain(change.before)), Text(_plain(change.after)))
    for update in added:
        table.add_row(f"update {update['id']}", "", Text(f"{_moment(update['created_at'])} {update['message']}"))
    _print(table)


def _updates(recorded: Sequence[RecordedEvent]) -> list[dict[str, Any]]:
    return [
        {"id": e.position, "status": e.event.status, "message": e.event.message, "created_at": e.occurred_at}
        for e in recorded
        if isinstance(e.event, IncidentUpdated | MaintenanceUpdated)
    ]


def _says(change: Change) -> str:
    after = _plain(change.after)
    return (
        f"{change.field}: {after}"
        if change.before in (None, ())
        else f"{change.field}: {_plain(change.before)} → {after}"
    )


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return _moment(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def _moment(moment: datetime) -> str:
    return moment.isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@click.command()
@click.argument("kind", type=click.Choice(list(_DECIDERS)))
@click.argument("number", type=click.IntRange(1))
@of_tenant
@click.option("--field", "fields", multiple=True, help="A field to erase, with everything that it ever held.")
@click.option("--event", "events", type=click.IntRange(1), multiple=True, help="A position whose words to erase.")
@click.option("--reason", required=True, help="Why; it is kept in the ledger.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
def redact(
    kind: str,
    number: int,
    slug: str | None,
    fields: tuple[str, ...],
    events: tuple[int, ...],
    reason: str,
    *,
    yes: bool,
    json_output: bool,
) -> None:
    """Erase what was written about an incident or a maintenance window, for good.

    The events stay, and so does the proof that nothing else was changed; their words read [redacted] from then on.
    """
    decider, own, command = _DECIDERS[kind]

    def erasure(history: Sequence[RecordedEvent]) -> RedactionPlan:
        return plan([HistoryEntry(e.version, e.position, e.event) for e in history], own, fields, events)

    async def work() -> tuple[Collection[int], int]:
        async with stream_core(kind, number, slug) as (parts, tenant_id):
            async with parts.database.connection() as connection:
                before = await store.read_stream(connection, tenant_id, kind, number)
            found = erasure(before)
            positions = [event.position for event in before if event.version in found.versions]
            if found.versions and not yes:
                click.confirm(
                    f"Erase the words of {kind} {number} at {', '.join(map(str, positions))} for good?",
                    abort=True,
                    err=True,
                )
            executed = await parts.commands.execute(
                decider, tenant_id, number, lambda history: command(erasure=erasure(history), reason=reason), META
            )
            await parts.projector.catch_up(tenant_id, executed.position)
            return positions, executed.position

    positions, position = run(work())
    if json_output:
        click.echo(msgspec.json.encode({"erased": positions, "position": position}))
    elif positions:
        many = "1 event" if len(positions) == 1 else f"{len(positions)} events"
        click.echo(f"erased the words of {many} of {kind} {number}; recorded up to position {position}")
    else:
        click.echo("nothing to erase: it was erased before")

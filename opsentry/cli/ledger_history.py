"""`opsentry ledger history`: all changes of one incident, maintenance window or service."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import click
import msgspec
from rich.text import Text

from opsentry.application.errors import NotFound
from opsentry.application.ledger import get_stream_history
from opsentry.cli.common import application_for, find_position, for_tenant, parse_time, run
from opsentry.cli.output import as_json, print_json, print_table, table
from opsentry.domain import incident, maintenance, service
from opsentry.domain.incident import IncidentUpdated
from opsentry.domain.maintenance import MaintenanceUpdated
from opsentry.events.audit import Entry
from opsentry.events.codec import RecordedEvent
from opsentry.projections import incident_view, maintenance_view, services

_EVOLVE: Mapping[str, Callable[[Any, RecordedEvent], msgspec.Struct]] = {
    incident.KIND: incident_view.evolve_view,
    maintenance.KIND: maintenance_view.evolve_view,
    service.KIND: services.evolve_view,
}
# Every event changes these fields, or repeats another one.
_HIDDEN_FIELDS = {"id", "services", "created_at", "updated_at", "current_status"}


class Change(NamedTuple):
    """One field before and after an event."""

    field: str
    before: Any
    after: Any


class _Story(NamedTuple):
    """The events of a stream up to a position, as the domain and as an auditor see them."""

    recorded: Sequence[RecordedEvent]
    entries: Sequence[Entry]
    begin: int
    end: int


@click.command()
@click.argument("kind", type=click.Choice(list(_EVOLVE)))
@click.argument("stream_id", metavar="ID", type=click.IntRange(1))
@for_tenant
@click.option("--as-of", "as_of", metavar="MOMENT", help="Show the state that a reader saw at this moment.")
@click.option("--at", "at", metavar="TIME", help="Show the state at this real-world time, as it is known now.")
@click.option("--diff", "moments", nargs=2, metavar="MOMENT MOMENT", help="Show the changes between two moments.")
@as_json
def history(
    kind: str,
    stream_id: int,
    slug: str,
    as_of: str | None,
    at: str | None,
    moments: tuple[str, str] | None,
    *,
    json_output: bool,
) -> None:
    """Show the history of an incident, a maintenance window or a service: times, actors, changes.

    A MOMENT is a position in the ledger, or a time such as 2026-06-01T02:00:00Z at which events were recorded.
    Only --at goes by the times at which things happened. Both differ for imported or late events.
    """
    if sum(option is not None for option in (as_of, at, moments)) > 1:
        raise click.UsageError("--as-of, --at and --diff exclude each other")
    happened_by = None if at is None else parse_time(at)

    async def work() -> _Story:
        async with application_for(slug) as (app, caller):
            begin = await find_position(app, caller, moments[0]) if moments else 0
            moment = moments[1] if moments else as_of
            end = None if moment is None else await find_position(app, caller, moment)
            try:
                found = await get_stream_history(app, caller, kind, stream_id, until=end)
            except NotFound:
                raise click.ClickException(f"{slug} has no {kind} {stream_id}") from None
            return _Story(found.recorded, found.entries, begin, end or 0)

    story = run(work())
    if happened_by is not None:
        _show_state(kind, known_at(story.recorded, happened_by), at or "", json_output=json_output)
    elif moments is not None:
        _show_difference(kind, story, json_output=json_output)
    elif as_of is not None:
        _show_state(kind, story.recorded, as_of, json_output=json_output)
    elif json_output:
        print_json(story.entries)
    else:
        _show_timeline(kind, story)


def known_at(recorded: Sequence[RecordedEvent], moment: datetime) -> list[RecordedEvent]:
    """Return the events of a stream that had happened at `moment`, even if they were recorded later."""
    happened = [event for event in recorded if event.occurred_at <= moment]
    return happened if happened and happened[0].version == 1 else []


def _state(kind: str, recorded: Sequence[RecordedEvent]) -> dict[str, Any]:
    view = None
    for event in recorded:
        view = _EVOLVE[kind](view, event)
    return {} if view is None else msgspec.structs.asdict(view)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    return [
        Change(name, before.get(name), value)
        for name, value in after.items()
        if name not in _HIDDEN_FIELDS and value != before.get(name) and (before or value not in (None, ()))
    ]


def _show_timeline(kind: str, story: _Story) -> None:
    timeline = table("position", "occurred_at", "actor", "type", "changes")
    view: msgspec.Struct | None = None
    before: dict[str, Any] = {}
    for event, entry in zip(story.recorded, story.entries, strict=True):
        view = _EVOLVE[kind](view, event)
        after = msgspec.structs.asdict(view)
        changes = [_describe(change) for change in _changes(before, after)] + _other_texts(entry, after)
        when = _time(entry.occurred_at)
        if entry.occurred_at != entry.recorded_at:
            when += f"\nrecorded {_time(entry.recorded_at)}"
        actor = entry.actor.name or entry.actor.kind
        actor += f"\n{entry.actor.prefix}" if entry.actor.prefix else ""
        timeline.add_row(
            str(entry.position), when, Text(actor), entry.type.partition(".")[2], Text("\n".join(changes)),
            end_section=True,
        )  # fmt: skip
        before = after
    print_table(timeline)


def _other_texts(entry: Entry, state: Mapping[str, Any]) -> list[str]:
    """Return the texts of an event that no field of the state shows."""
    return [str(entry.data[name]) for name in ("message", "reason") if name in entry.data and name not in state]


def _show_state(kind: str, recorded: Sequence[RecordedEvent], moment: str, *, json_output: bool) -> None:
    if not recorded:
        raise click.ClickException(f"the {kind} did not exist at {moment}")
    state = _state(kind, recorded) | {"updates": _updates(recorded)}
    state.pop("services", None)
    if json_output:
        print_json(state)
        return
    shown = table("field", f"at {moment}")
    for name, value in state.items():
        if name != "updates":
            shown.add_row(name, Text(_value(value)))
    for update in state["updates"]:
        shown.add_row(f"update {update['id']}", Text(f"{_time(update['created_at'])} {update['message']}"))
    print_table(shown)


def _show_difference(kind: str, story: _Story, *, json_output: bool) -> None:
    earlier = [event for event in story.recorded if event.position <= story.begin]
    changes = _changes(_state(kind, earlier), _state(kind, story.recorded))
    added = _updates(story.recorded[len(earlier) :])
    if json_output:
        print_json({
            "from": story.begin,
            "to": story.end,
            "changed": {change.field: {"before": change.before, "after": change.after} for change in changes},
            "updates": added,
        })  # fmt: skip
        return
    shown = table("field", f"at {story.begin}", f"at {story.end}")
    for change in changes:
        shown.add_row(change.field, Text(_value(change.before)), Text(_value(change.after)))
    for update in added:
        shown.add_row(f"update {update['id']}", "", Text(f"{_time(update['created_at'])} {update['message']}"))
    print_table(shown)


def _updates(recorded: Sequence[RecordedEvent]) -> list[dict[str, Any]]:
    return [
        {"id": e.position, "status": e.event.status, "message": e.event.message, "created_at": e.occurred_at}
        for e in recorded
        if isinstance(e.event, IncidentUpdated | MaintenanceUpdated)
    ]


def _describe(change: Change) -> str:
    after = _value(change.after)
    if change.before in (None, ()):
        return f"{change.field}: {after}"
    return f"{change.field}: {_value(change.before)} → {after}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return _time(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def _time(moment: datetime) -> str:
    return moment.isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")

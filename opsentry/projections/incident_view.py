"""An incident as the API answers it: folded from its events, rendered as JSON. Pure; `incidents` keeps it as rows."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, cast

import asyncpg
import msgspec

from opsentry.domain import incident
from opsentry.domain.incident import Incident, IncidentEvent, IncidentResolved, IncidentUpdated
from opsentry.events.codec import RecordedEvent
from opsentry.projections.engine.projection import by_stream, replay_streams
from opsentry.projections.timeline import TimelineEntry, author_name


class IncidentView(msgspec.Struct, kw_only=True):
    """An incident as the API lists it; `services` is filled in when reading."""

    id: int
    title: str
    description: str | None
    status: str
    severity: str
    visibility: str
    services: Sequence[msgspec.Raw] = ()
    service_ids: tuple[int, ...]
    root_cause: str | None
    postmortem: str | None
    occurred_at: datetime
    created_at: datetime
    updated_at: datetime
    resolved_at: datetime | None


class IncidentDetail(IncidentView, kw_only=True):
    """An incident with its timeline, oldest entry first."""

    updates: Sequence[TimelineEntry]


class IncidentFilter(NamedTuple):
    """The incidents that a list shows; a field that is `None` admits all.

    Attributes:
        status: One of `incident.STATUSES`.
        severity: One of `incident.SEVERITIES`.
    """

    status: str | None = None
    severity: str | None = None

    def matches(self, view: IncidentView) -> bool:
        """Return whether the list shows this incident."""
        return self.status in {None, view.status} and self.severity in {None, view.severity}


decode_view = msgspec.json.Decoder(IncidentView).decode


class Shown(msgspec.Struct, gc=False):
    """What an incident's events leave of it to be shown; changed in place by `evolve`.

    `occurred_at` and `resolved_at` are the world's time, `created_at` and `updated_at` the ledger's.
    """

    id: int
    state: Incident
    occurred_at: datetime
    created_at: datetime
    updated_at: datetime
    resolved_at: datetime | None = None

    @classmethod
    def of(cls, view: IncidentView) -> "Shown":
        """Return what `view` shows."""
        state = Incident(**{name: getattr(view, name) for name in _SHARED})
        return cls(view.id, state, view.occurred_at, view.created_at, view.updated_at, view.resolved_at)

    def view(self) -> IncidentView:
        """Return it as the API answers it."""
        state = self.state
        return IncidentView(
            id=self.id,
            title=state.title,
            description=state.description,
            status=state.status,
            severity=state.severity,
            visibility=state.visibility,
            service_ids=state.service_ids,
            root_cause=state.root_cause,
            postmortem=state.postmortem,
            occurred_at=self.occurred_at,
            created_at=self.created_at,
            updated_at=self.updated_at,
            resolved_at=self.resolved_at,
        )


_SHARED = tuple(name for name in Incident.__struct_fields__ if name in IncidentView.__struct_fields__)


def evolve(shown: Shown | None, recorded: RecordedEvent) -> Shown:
    """Fold one event."""
    state = incident.evolve(None if shown is None else shown.state, cast("IncidentEvent", recorded.event))
    if shown is None:
        shown = Shown(recorded.stream_id, state, recorded.occurred_at, recorded.recorded_at, recorded.recorded_at)
    shown.state, shown.updated_at = state, recorded.recorded_at
    if state.status != "resolved":
        shown.resolved_at = None
    elif isinstance(recorded.event, IncidentResolved):
        shown.resolved_at = recorded.occurred_at
    return shown


def evolve_view(view: IncidentView | None, recorded: RecordedEvent) -> IncidentView:
    """Fold one event into the answer."""
    return evolve(None if view is None else Shown.of(view), recorded).view()


def render(history: Sequence[RecordedEvent], refs: Mapping[int, msgspec.Raw], token_names: Mapping[int, str]) -> bytes:
    """Return the incident with its timeline, as its events leave it: the same bytes that a read of the row gives.

    Args:
        history: All its events, in order; at least one.
        refs: How to link services, by id.
        token_names: Names of the tokens that may have written timeline entries, by id.
    """
    ((shown, _),) = replay_streams(by_stream(history), {}, evolve)
    view = shown.view()
    view.services = [refs[service_id] for service_id in view.service_ids if service_id in refs]
    updates = [
        TimelineEntry.of(recorded, recorded.event, author_name(recorded.meta.actor, token_names))
        for recorded in history
        if isinstance(recorded.event, IncidentUpdated)
    ]
    return msgspec.json.encode(IncidentDetail(**msgspec.structs.asdict(view), updates=updates))


def state_as_of(row: asyncpg.Record, incident_id: int, tail: Sequence[RecordedEvent]) -> IncidentView:
    """Return the state in a row of `as_of`; `tail` are the events after `snapshot_version`, up to `version`."""
    stored = {}
    if row["snapshot"] is not None:
        stored = {incident_id: (row["snapshot_version"], Shown.of(decode_view(row["snapshot"])))}
    ((shown, _),) = replay_streams({incident_id: tail}, stored, evolve)
    return shown.view()


def render_as_of(view: IncidentView, updates: bytes) -> bytes:
    """Return the incident that `view` is, its links filled in, with its timeline."""
    return b"".join((msgspec.json.encode(view)[:-1], b',"updates":[', updates, b"]}"))

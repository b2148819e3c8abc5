"""An incident as the API renders it: derived from its events, encoded as JSON. Pure; `incidents` stores it as rows."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, cast

import asyncpg
import msgspec

from opsentry.domain import incident
from opsentry.domain.incident import Incident, IncidentEvent, IncidentResolved
from opsentry.events.codec import RecordedEvent
from opsentry.projections.engine.projection import by_stream, replay_streams
from opsentry.projections.timeline import TimelineEntry, entries_of


class IncidentView(msgspec.Struct, kw_only=True):
    """An incident as the API lists it; a read fills in `services`.

    `occurred_at` and `resolved_at` are real-world time, `created_at` and `updated_at` the ledger's.
    """

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


class ProjectedIncident(msgspec.Struct, gc=False):
    """The aggregate's state with the times that only events carry; `evolve` changes it in place."""

    id: int
    state: Incident
    occurred_at: datetime
    created_at: datetime
    updated_at: datetime
    resolved_at: datetime | None = None

    @classmethod
    def of(cls, view: IncidentView) -> "ProjectedIncident":
        """Return the state that `view` shows."""
        state = Incident(**{name: getattr(view, name) for name in _STATE_FIELDS})
        return cls(view.id, state, view.occurred_at, view.created_at, view.updated_at, view.resolved_at)

    def view(self) -> IncidentView:
        """Return the view of this state."""
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


_STATE_FIELDS = tuple(name for name in Incident.__struct_fields__ if name in IncidentView.__struct_fields__)


def evolve(projected: ProjectedIncident | None, recorded: RecordedEvent) -> ProjectedIncident:
    """Apply one event."""
    state = incident.evolve(None if projected is None else projected.state, cast("IncidentEvent", recorded.event))
    if projected is None:
        projected = ProjectedIncident(
            recorded.stream_id, state, recorded.occurred_at, recorded.recorded_at, recorded.recorded_at
        )
    projected.state, projected.updated_at = state, recorded.recorded_at
    if state.status != "resolved":
        projected.resolved_at = None
    elif isinstance(recorded.event, IncidentResolved):
        projected.resolved_at = recorded.occurred_at
    return projected


def evolve_view(view: IncidentView | None, recorded: RecordedEvent) -> IncidentView:
    """Return the view after one more event."""
    return evolve(None if view is None else ProjectedIncident.of(view), recorded).view()


def render(history: Sequence[RecordedEvent], links: Mapping[int, msgspec.Raw], token_names: Mapping[int, str]) -> bytes:
    """Return the incident with its timeline as JSON: the same bytes that a read of its row gives.

    Args:
        history: All events of the incident, in order; at least one.
        links: The service links by id; services without one are left out.
        token_names: The names of the API tokens that may have written timeline entries, by id.
    """
    ((projected, _),) = replay_streams(by_stream(history), {}, evolve)
    view = projected.view()
    view.services = [links[service_id] for service_id in view.service_ids if service_id in links]
    updates = entries_of(history, token_names)
    return msgspec.json.encode(IncidentDetail(**msgspec.structs.asdict(view), updates=updates))


def view_as_of(row: asyncpg.Record, incident_id: int, tail: Sequence[RecordedEvent]) -> IncidentView:
    """Return the view as of a position.

    Args:
        row: A row of `incident_snapshots.select_incident_as_of`.
        incident_id: The incident.
        tail: The events after the row's `snapshot_version`, up to its `version`.
    """
    stored = {}
    if row["snapshot"] is not None:
        stored = {incident_id: (row["snapshot_version"], ProjectedIncident.of(decode_view(row["snapshot"])))}
    ((projected, _),) = replay_streams({incident_id: tail}, stored, evolve)
    return projected.view()


def render_as_of(view: IncidentView, updates: bytes) -> bytes:
    """Return `view`, whose links are filled in, with a timeline that is rendered already, as JSON."""
    return b"".join((msgspec.json.encode(view)[:-1], b',"updates":[', updates, b"]}"))

"""Derive service impacts from the events of an incident or a maintenance window. Pure; `impact` stores the rows."""

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from opsentry.domain.decider import set_fields
from opsentry.domain.incident import (
    IncidentOpened,
    IncidentReopened,
    IncidentResolved,
    IncidentServicesChanged,
    IncidentSeverityChanged,
)
from opsentry.domain.maintenance import (
    MaintenanceChanged,
    MaintenanceCompleted,
    MaintenanceScheduled,
    MaintenanceStarted,
)
from opsentry.domain.uptime import LEVELS
from opsentry.events.codec import RecordedEvent
from opsentry.projections.engine.projection import Streams

_RELEVANT_EVENTS = frozenset(
    {
        IncidentOpened,
        IncidentResolved,
        IncidentReopened,
        IncidentSeverityChanged,
        IncidentServicesChanged,
        MaintenanceScheduled,
        MaintenanceChanged,
        MaintenanceStarted,
        MaintenanceCompleted,
    }
)


class Effect(NamedTuple):
    """The effect on one service.

    Attributes:
        level: The severity as an index of `incident.SEVERITIES`; 0 for a maintenance window.
        is_excluded: Whether uptime excludes the time.
    """

    level: int
    is_excluded: bool


class ImpactState(msgspec.Struct, kw_only=True, gc=False):
    """The present state of an incident or a maintenance window, as far as services feel it.

    Attributes:
        is_active: Whether the incident is open, or the window active.
        level: The severity as an index of `incident.SEVERITIES`; 0 for a maintenance window.
        is_excluded: Whether uptime excludes the time.
        service_ids: The affected services.
    """

    is_active: bool
    level: int
    is_excluded: bool
    service_ids: tuple[int, ...]

    def effects(self) -> dict[int, Effect]:
        """Return the effect on each service that is affected now, by id."""
        return dict.fromkeys(self.service_ids, Effect(self.level, self.is_excluded)) if self.is_active else {}


def evolve(state: ImpactState | None, recorded: RecordedEvent) -> ImpactState:
    """Apply one event; an event without effect on services returns the same object.

    Raises:
        ValueError: The stream does not start with the event that begins it.
    """
    event = recorded.event
    if state is not None and type(event) not in _RELEVANT_EVENTS:
        return state
    match event:
        case IncidentOpened():
            return ImpactState(
                is_active=True, level=LEVELS[event.severity], is_excluded=False, service_ids=event.service_ids
            )
        case MaintenanceScheduled():
            return ImpactState(
                is_active=False, level=0, is_excluded=event.exclude_from_sla, service_ids=event.service_ids
            )
    if state is None:
        raise ValueError(f"the stream starts with {event.TYPE}")
    replace = msgspec.structs.replace
    match event:
        case IncidentResolved() | MaintenanceCompleted():
            return replace(state, is_active=False)
        case IncidentReopened() | MaintenanceStarted():
            return replace(state, is_active=True)
        case IncidentSeverityChanged():
            return replace(state, level=LEVELS[event.severity])
        case IncidentServicesChanged():
            return replace(state, service_ids=event.service_ids)
        case MaintenanceChanged():
            is_excluded = state.is_excluded if event.exclude_from_sla is UNSET else event.exclude_from_sla
            changed = {name: value for name, value in set_fields(event).items() if name == "service_ids"}
            return replace(state, is_excluded=is_excluded, **changed)
        case _:
            return state


class ServiceImpact(msgspec.Struct):
    """A period in which an incident or a maintenance window affects a service; `ended_at` is `None` while it lasts."""

    stream_id: int
    service_id: int
    started_version: int
    started_at: datetime
    level: int
    is_excluded: bool
    ended_at: datetime | None = None


class EndedImpact(NamedTuple):
    """The end of a service impact that earlier events started."""

    stream_id: int
    service_id: int
    ended_at: datetime


class ChangedState(NamedTuple):
    """The state of a stream, with the version that it shows."""

    stream_id: int
    version: int
    state: ImpactState


class ImpactChanges(NamedTuple):
    """The changes that a batch of events makes."""

    states: list[ChangedState]
    ended: list[EndedImpact]
    started: list[ServiceImpact]


def derive_changes(streams: Streams, stored: Mapping[int, tuple[int, ImpactState]]) -> ImpactChanges:
    """Return the changes that streams of one kind make.

    Args:
        streams: Events by stream id, each stream's in order.
        stored: (version, state) of streams that begin before this batch; events up to that version are skipped.
    """
    changes = ImpactChanges([], [], [])
    for stream_id, stream in streams.items():
        version, state = stored.get(stream_id, (0, None))
        started_here: dict[int, ServiceImpact] = {}
        after: Mapping[int, Effect] = {} if state is None else state.effects()
        for recorded in stream:
            if recorded.version <= version:
                continue
            version, earlier = recorded.version, state
            state = evolve(state, recorded)
            if state is earlier:
                continue
            before, after = after, state.effects()
            moment = recorded.occurred_at
            for service_id in [s for s in before if before[s] != after.get(s)]:
                impact = started_here.pop(service_id, None)
                if impact is None:
                    changes.ended.append(EndedImpact(stream_id, service_id, moment))
                else:
                    impact.ended_at = moment
            for service_id in [s for s in after if after[s] != before.get(s)]:
                impact = ServiceImpact(stream_id, service_id, version, moment, *after[service_id])
                started_here[service_id] = impact
                changes.started.append(impact)
        if state is not None:
            changes.states.append(ChangedState(stream_id, version, state))
    return changes

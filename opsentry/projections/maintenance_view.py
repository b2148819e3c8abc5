"""A maintenance window as the API renders it: derived from its events, encoded as JSON. Pure; see `maintenance`."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, cast

import msgspec

from opsentry.domain import maintenance
from opsentry.domain.maintenance import (
    Maintenance,
    MaintenanceCancelled,
    MaintenanceCompleted,
    MaintenanceEvent,
    MaintenanceReminded,
    MaintenanceStarted,
)
from opsentry.events.codec import RecordedEvent
from opsentry.projections.engine.projection import by_stream, replay_streams
from opsentry.projections.timeline import TimelineEntry, entries_of


class MaintenanceView(msgspec.Struct, kw_only=True):
    """A maintenance window as the API lists it; a read fills in `services`.

    `started_at`, `completed_at` and `cancelled_at` are real-world time, `created_at` and `updated_at` the ledger's.
    """

    id: int
    title: str
    description: str | None
    status: str
    visibility: str
    services: Sequence[msgspec.Raw] = ()
    service_ids: tuple[int, ...]
    scheduled_start: datetime
    scheduled_end: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    cancelled_at: datetime | None = None
    exclude_from_sla: bool
    suppress_alerts: bool
    auto_start: bool
    auto_complete: bool
    created_at: datetime
    updated_at: datetime

    def state(self) -> Maintenance:
        """Return the aggregate's state that this view shows."""
        return Maintenance(
            title=self.title,
            description=self.description,
            status=self.status,
            visibility=self.visibility,
            service_ids=self.service_ids,
            scheduled_start=self.scheduled_start,
            scheduled_end=self.scheduled_end,
            exclude_from_sla=self.exclude_from_sla,
            suppress_alerts=self.suppress_alerts,
            auto_start=self.auto_start,
            auto_complete=self.auto_complete,
        )


class MaintenanceDetail(MaintenanceView, kw_only=True):
    """A maintenance window with its timeline, oldest entry first."""

    updates: Sequence[TimelineEntry]


class MaintenanceFilter(NamedTuple):
    """The maintenance windows that a list shows.

    Attributes:
        status: One of `maintenance.STATUSES`; `None` admits all.
    """

    status: str | None = None

    def matches(self, view: MaintenanceView) -> bool:
        """Return whether the list shows this window."""
        return self.status in {None, view.status}


decode_view = msgspec.json.Decoder(MaintenanceView).decode


class _TransitionTimes(NamedTuple):
    started_at: datetime | None = None
    completed_at: datetime | None = None
    cancelled_at: datetime | None = None


def evolve_view(view: MaintenanceView | None, recorded: RecordedEvent) -> MaintenanceView:
    """Return the view after one more event; a reminder changes nothing of it."""
    event = cast("MaintenanceEvent", recorded.event)
    after = maintenance.evolve(None if view is None else view.state(), event)
    moment = recorded.occurred_at
    before = _TransitionTimes()
    if view is not None:
        before = _TransitionTimes(view.started_at, view.completed_at, view.cancelled_at)
    return MaintenanceView(
        id=recorded.stream_id,
        title=after.title,
        description=after.description,
        status=after.status,
        visibility=after.visibility,
        service_ids=after.service_ids,
        scheduled_start=after.scheduled_start,
        scheduled_end=after.scheduled_end,
        started_at=moment if isinstance(event, MaintenanceStarted) else before.started_at,
        completed_at=moment if isinstance(event, MaintenanceCompleted) else before.completed_at,
        cancelled_at=moment if isinstance(event, MaintenanceCancelled) else before.cancelled_at,
        exclude_from_sla=after.exclude_from_sla,
        suppress_alerts=after.suppress_alerts,
        auto_start=after.auto_start,
        auto_complete=after.auto_complete,
        created_at=recorded.recorded_at if view is None else view.created_at,
        updated_at=view.updated_at if view and isinstance(event, MaintenanceReminded) else recorded.recorded_at,
    )


def render(history: Sequence[RecordedEvent], links: Mapping[int, msgspec.Raw], token_names: Mapping[int, str]) -> bytes:
    """Return the window with its timeline as JSON: the same bytes that a read of its row gives.

    Args:
        history: All events of the window, in order; at least one.
        links: The service links by id; services without one are left out.
        token_names: The names of the API tokens that may have written timeline entries, by id.
    """
    ((view, _),) = replay_streams(by_stream(history), {}, evolve_view)
    view.services = [links[service_id] for service_id in view.service_ids if service_id in links]
    updates = entries_of(history, token_names)
    return msgspec.json.encode(MaintenanceDetail(**msgspec.structs.asdict(view), updates=updates))

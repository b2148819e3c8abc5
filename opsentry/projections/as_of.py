"""Read models as they were at a position of the ledger: the same shapes, the same bytes.

A single resource is read by its stream. A list is replayed from the beginning of the ledger, batch by batch, with one
view in memory for each resource that existed.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, cast

import msgspec

from opsentry.domain import incident, maintenance, service
from opsentry.domain.decider import Decider, Event
from opsentry.domain.service import ServiceRetired
from opsentry.domain.uptime import service_status
from opsentry.events import store
from opsentry.events.codec import RecordedEvent
from opsentry.identity import api_tokens
from opsentry.infrastructure.postgres import Connection, Database
from opsentry.projections import impact_state, incident_snapshots, incident_view, maintenance_view, services
from opsentry.projections.engine.projector import Projector
from opsentry.projections.impact_state import ImpactState
from opsentry.projections.incident_view import IncidentFilter, IncidentView, ProjectedIncident
from opsentry.projections.maintenance_view import MaintenanceFilter, MaintenanceView
from opsentry.projections.page_request import ALL_ITEMS, PageRequest
from opsentry.projections.services import ServiceFilter, ServiceLinks, ServiceView
from opsentry.projections.timeline import etag, fill_placeholders

REPLAY_BATCH_EVENTS = 1000
# A replay keeps this process busy, so only a few run at a time and the others wait.
MAX_CONCURRENT_REPLAYS = 2


class Linked(Protocol):
    """A state that links services."""

    @property
    def service_ids(self) -> tuple[int, ...]:
        """The ids of the services."""


L = TypeVar("L", bound=Linked)
C = TypeVar("C")
E = TypeVar("E", bound=Event)

Render = Callable[[Sequence[RecordedEvent], Mapping[int, msgspec.Raw], Mapping[int, str]], bytes]
"""Renders a resource from its events, service links and token names."""


class RenderedResource(NamedTuple):
    """A resource as JSON, and the value of its entity tag without the quotes; `None` where it has none."""

    body: bytes
    etag: str | None


class RenderedPage(NamedTuple):
    """A page of a list as it was at `position`.

    Attributes:
        position: The position of the last event that the page shows.
        total: The number of items in the whole list.
        items: The items of the page: the inside of a JSON array.
    """

    position: int
    total: int
    items: bytes


class AsOfQueries:
    """Answers queries with the past state of the read models."""

    def __init__(self, database: Database, projector: Projector) -> None:
        self._database = database
        self._projector = projector
        self._replays = asyncio.Semaphore(MAX_CONCURRENT_REPLAYS)

    async def get_incident(self, tenant_id: int, incident_id: int, position: int) -> RenderedResource | None:
        """Return an incident as a read at `position` rendered it; `None` if it did not exist.

        The nearest snapshot and the stored timeline keep this fast for an incident with very many events.

        Raises:
            PositionNotReached: The projection `incidents` does not show `position` yet.
            DatabaseUnavailable: The database was lost.
        """
        row = await self._projector.read(
            tenant_id,
            lambda connection: incident_snapshots.select_incident_as_of(connection, tenant_id, incident_id, position),
            at_least=position,
        )
        if row["version"] == 0:
            return None
        snapshot_version = row["snapshot_version"] or 0
        async with self._database.connection() as connection:
            tail = await store.read_stream(
                connection, tenant_id, incident.KIND, incident_id, after=snapshot_version, until=row["version"]
            )
            view = incident_view.view_as_of(row, incident_id, tail)
            updates, token_ids = await incident_snapshots.select_timeline(
                connection, tenant_id, incident_id, row["version"]
            )
            names = await api_tokens.find_api_token_names(connection, tenant_id, token_ids) if token_ids else {}
            links, versions = await _read_service_links(connection, tenant_id, view.service_ids, position)
        view.services = [links[service_id] for service_id in view.service_ids if service_id in links]
        body = incident_view.render_as_of(view, fill_placeholders(updates, token_ids, names))
        return RenderedResource(body, etag(row["version"], versions))

    async def get_maintenance(self, tenant_id: int, maintenance_id: int, position: int) -> RenderedResource | None:
        """Return a maintenance window as a read at `position` rendered it; `None` if it did not exist.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        return await self._replay_resource(
            maintenance.DECIDER, maintenance_view.render, tenant_id, maintenance_id, position
        )

    async def get_recorded_incident(self, tenant_id: int, incident_id: int, position: int) -> RenderedResource | None:
        """Return an incident from the ledger alone, for when the read model does not show it yet.

        This replays the whole stream up to `position`; the result is `None` if the incident did not exist.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        return await self._replay_resource(incident.DECIDER, incident_view.render, tenant_id, incident_id, position)

    async def get_service(self, tenant_id: int, service_id: int, position: int) -> RenderedResource | None:
        """Return a service with the status that it had at `position`; `None` if it did not exist or was retired.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        for view in await self._replay_services(tenant_id, position):
            if view.id == service_id:
                return RenderedResource(msgspec.json.encode(view), None)
        return None

    async def get_service_links(self, tenant_id: int, service_ids: Iterable[int], position: int) -> ServiceLinks:
        """Return the links that these services had at `position`.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        async with self._database.connection() as connection:
            return await _read_service_links(connection, tenant_id, service_ids, position)

    async def list_incidents(
        self, tenant_id: int, position: int, filter_: IncidentFilter, page: PageRequest
    ) -> RenderedPage:
        """Return a page of the incidents that matched at `position`, newest first.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        return await self._list_incidents(tenant_id, position, filter_.matches, page)

    async def list_active_incidents(self, tenant_id: int, position: int) -> RenderedPage:
        """Return all incidents that were not resolved at `position`, newest first.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        return await self._list_incidents(tenant_id, position, lambda view: view.status != "resolved", ALL_ITEMS)

    async def list_maintenance(
        self, tenant_id: int, position: int, filter_: MaintenanceFilter, page: PageRequest
    ) -> RenderedPage:
        """Return a page of the maintenance windows that matched at `position`, the last announced first.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        views: dict[int, MaintenanceView] = {}
        announced: dict[int, RecordedEvent] = {}
        linked: dict[int, ServiceView] = {}
        async for event in self._replay_events(tenant_id, position, (maintenance.KIND, service.KIND)):
            if event.kind == service.KIND:
                linked[event.stream_id] = services.evolve_view(linked.get(event.stream_id), event)
            else:
                announced.setdefault(event.stream_id, event)
                views[event.stream_id] = maintenance_view.evolve_view(views.get(event.stream_id), event)
        matching = [view for view in views.values() if filter_.matches(view)]
        matching.sort(key=lambda view: (announced[view.id].occurred_at, view.id), reverse=True)
        return _render_page(position, matching, page, linked)

    async def list_services(
        self, tenant_id: int, position: int, filter_: ServiceFilter, page: PageRequest
    ) -> RenderedPage:
        """Return a page of the services that matched at `position`, by name, with the status that they had.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        matching = [view for view in await self._replay_services(tenant_id, position) if filter_.matches(view)]
        matching.sort(key=lambda view: (view.name, view.id))
        return _render_page(position, matching, page, {})

    async def _list_incidents(
        self, tenant_id: int, position: int, matches: Callable[[IncidentView], bool], page: PageRequest
    ) -> RenderedPage:
        projected: dict[int, ProjectedIncident] = {}
        linked: dict[int, ServiceView] = {}
        async for event in self._replay_events(tenant_id, position, (incident.KIND, service.KIND)):
            if event.kind == service.KIND:
                linked[event.stream_id] = services.evolve_view(linked.get(event.stream_id), event)
            else:
                projected[event.stream_id] = incident_view.evolve(projected.get(event.stream_id), event)
        matching = [view for view in (each.view() for each in projected.values()) if matches(view)]
        matching.sort(key=lambda view: (view.occurred_at, view.id), reverse=True)
        return _render_page(position, matching, page, linked)

    async def _replay_services(self, tenant_id: int, position: int) -> list[ServiceView]:
        """Return the services that were not retired at `position`, each with its `current_status`."""
        views: dict[int, ServiceView] = {}
        states: dict[tuple[str, int], ImpactState] = {}
        async for event in self._replay_events(tenant_id, position, (service.KIND, incident.KIND, maintenance.KIND)):
            if event.kind != service.KIND:
                key = (event.kind, event.stream_id)
                states[key] = impact_state.evolve(states.get(key), event)
            elif isinstance(event.event, ServiceRetired):
                views.pop(event.stream_id, None)
            else:
                views[event.stream_id] = services.evolve_view(views.get(event.stream_id), event)
        levels: dict[int, list[int]] = defaultdict(list)
        maintained: set[int] = set()
        for (kind, _), state in states.items():
            for service_id, effect in state.effects().items():
                if kind == incident.KIND:
                    levels[service_id].append(effect.level)
                else:
                    maintained.add(service_id)
        for view in views.values():
            view.current_status = service_status(levels[view.id], maintenance=view.id in maintained)
        return list(views.values())

    async def _replay_resource(
        self, decider: Decider[L, C, E], render: Render, tenant_id: int, stream_id: int, position: int
    ) -> RenderedResource | None:
        async with self._database.connection() as connection:
            history = await store.read_streams(connection, tenant_id, decider.kind, [stream_id], position)
            if not history:
                return None
            state = decider.fold(cast("E", recorded.event) for recorded in history)
            service_ids = () if state is None else state.service_ids
            links, versions = await _read_service_links(connection, tenant_id, service_ids, position)
            token_ids = {e.meta.actor.id for e in history if e.meta.actor.kind == "token" and e.meta.actor.id}
            names = await api_tokens.find_api_token_names(connection, tenant_id, token_ids) if token_ids else {}
        return RenderedResource(render(history, links, names), etag(history[-1].version, versions))

    async def _replay_events(self, tenant_id: int, position: int, kinds: Sequence[str]) -> AsyncIterator[RecordedEvent]:
        """Yield the tenant's events of these stream kinds up to `position`, in order."""
        async with self._replays:
            for after in range(0, position, REPLAY_BATCH_EVENTS):
                # A connection is held for one batch only, so a long replay does not take it from other queries.
                async with self._database.connection() as connection:
                    until = min(after + REPLAY_BATCH_EVENTS, position)
                    events = await store.read_between(connection, tenant_id, after, until, kinds)
                for event in events:
                    yield event


async def _read_service_links(
    connection: Connection, tenant_id: int, service_ids: Iterable[int], position: int
) -> ServiceLinks:
    if not (ids := list(service_ids)):
        return {}, ()
    return services.links_as_of(await store.read_streams(connection, tenant_id, service.KIND, ids, position))


def _render_page(
    position: int,
    matching: Sequence[IncidentView] | Sequence[MaintenanceView] | Sequence[ServiceView],
    page: PageRequest,
    linked: Mapping[int, ServiceView],
) -> RenderedPage:
    """Return the page of `matching`, in which links to the `linked` services are filled in."""
    views: Sequence[IncidentView | MaintenanceView | ServiceView] = page.of(matching)
    for view in views:
        if not isinstance(view, ServiceView):
            view.services = [services.service_link(linked[i]) for i in view.service_ids if i in linked]
    items = b",".join(msgspec.json.encode(view) for view in views)
    return RenderedPage(position, len(matching), items)

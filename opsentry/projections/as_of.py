"""Read models as they were at a position of the ledger: the same shapes, the same bytes.

Single things are looked up by their stream. Lists are folded from the ledger's beginning, some events at a time, with
one row in memory for each thing there was.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypedDict, TypeVar, cast

import msgspec

from opsentry.domain import incident, maintenance, service
from opsentry.domain.decider import Decider, Event
from opsentry.domain.service import ServiceRetired
from opsentry.domain.uptime import service_status
from opsentry.events import store
from opsentry.events.codec import RecordedEvent
from opsentry.identity import api_tokens
from opsentry.infrastructure.postgres import Connection, Database
from opsentry.projections import impact, incident_view, incidents, services
from opsentry.projections import maintenance as windows
from opsentry.projections.engine.projector import Projector
from opsentry.projections.impact import Source
from opsentry.projections.incident_view import IncidentView, Shown
from opsentry.projections.maintenance import MaintenanceView
from opsentry.projections.services import ServiceLinks, ServiceView
from opsentry.projections.timeline import etag, name_authors

_BATCH = 1000
# Folding a ledger is work for this process: so many at once, the others wait.
_AT_ONCE = 2


class Linked(Protocol):
    """A state that links services."""

    @property
    def service_ids(self) -> tuple[int, ...]:
        """The ids of the services."""


L = TypeVar("L", bound=Linked)
C = TypeVar("C")
E = TypeVar("E", bound=Event)

Render = Callable[[Sequence[RecordedEvent], Mapping[int, msgspec.Raw], Mapping[int, str]], bytes]
"""Makes a thing's answer of its events, service links and token names."""


class One(NamedTuple):
    """A single thing's answer, and the inside of its entity tag."""

    body: bytes
    etag: str | None


class Page(TypedDict):
    """A page of a list, with what the list queries of the read models answer."""

    head_position: int
    trusted_position: int
    total: int
    items: bytes


class AsOfQueries:
    """Looks back."""

    def __init__(self, database: Database, projector: Projector) -> None:
        self._database = database
        self._projector = projector
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def incident(self, tenant_id: int, incident_id: int, position: int) -> One | None:
        """Return the incident as a read at `position` answered it; `None` if there was none.

        Raises:
            PositionNotReached: Its timeline is not projected up to there.
            DatabaseUnavailable: The database was lost.
        """
        row = await self._projector.read(
            tenant_id,
            lambda connection: incidents.select_incident_as_of(connection, tenant_id, incident_id, position),
            at_least=position,
        )
        if row["version"] == 0:
            return None
        kept = row["snapshot_version"] or 0
        async with self._database.connection() as connection:
            tail = await store.read_stream(
                connection, tenant_id, incident.KIND, incident_id, after=kept, until=row["version"]
            )
            view = incident_view.state_as_of(row, incident_id, tail)
            updates, token_ids = await incidents.select_timeline(connection, tenant_id, incident_id, row["version"])
            names = await api_tokens.find_api_token_names(connection, tenant_id, token_ids) if token_ids else {}
            refs, versions = await _links(connection, tenant_id, view.service_ids, position)
        view.services = [refs[service_id] for service_id in view.service_ids if service_id in refs]
        body = incident_view.render_as_of(view, name_authors(updates, token_ids, names))
        return One(body, etag(row["version"], versions))

    async def maintenance(self, tenant_id: int, maintenance_id: int, position: int) -> One | None:
        """Return the window as a read at `position` answered it; `None` if there was none.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        return await self._recorded(maintenance.DECIDER, windows.render, tenant_id, maintenance_id, position)

    async def recorded_incident(self, tenant_id: int, incident_id: int, position: int) -> One | None:
        """Return the incident as a read at `position` answers it, from the ledger alone; `None` if there was none.

        For one that read models do not show yet: it folds the whole stream.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        return await self._recorded(incident.DECIDER, incident_view.render, tenant_id, incident_id, position)

    async def _recorded(
        self, decider: Decider[L, C, E], render: Render, tenant_id: int, stream_id: int, position: int
    ) -> One | None:
        async with self._database.connection() as connection:
            history = await store.read_streams(connection, tenant_id, decider.kind, [stream_id], position)
            if not history:
                return None
            state = decider.fold(cast("E", recorded.event) for recorded in history)
            refs, versions = await _links(connection, tenant_id, () if state is None else state.service_ids, position)
            token_ids = {e.meta.actor.id for e in history if e.meta.actor.kind == "token" and e.meta.actor.id}
            names = await api_tokens.find_api_token_names(connection, tenant_id, token_ids) if token_ids else {}
        return One(render(history, refs, names), etag(history[-1].version, versions))

    async def links(self, tenant_id: int, service_ids: Iterable[int], position: int) -> ServiceLinks:
        """Return how services were linked at `position`.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        async with self._database.connection() as connection:
            return await _links(connection, tenant_id, service_ids, position)

    async def incidents(
        self, tenant_id: int, position: int, wanted: Callable[[IncidentView], bool], limit: int | None, offset: int
    ) -> Page:
        """Return a page of the incidents that were `wanted` at `position`, newest first."""
        shown: dict[int, Shown] = {}
        links: dict[int, ServiceView] = {}
        async for event in self._events(tenant_id, position, (incident.KIND, service.KIND)):
            if event.kind == service.KIND:
                links[event.stream_id] = services.evolve_view(links.get(event.stream_id), event)
            else:
                shown[event.stream_id] = incident_view.evolve(shown.get(event.stream_id), event)
        found = [view for view in (each.view() for each in shown.values()) if wanted(view)]
        found.sort(key=lambda view: (view.occurred_at, view.id), reverse=True)
        return _page(position, found, limit, offset, links)

    async def windows(
        self, tenant_id: int, position: int, wanted: Callable[[MaintenanceView], bool], limit: int, offset: int
    ) -> Page:
        """Return a page of the windows that were `wanted` at `position`, the last announced first."""
        views: dict[int, MaintenanceView] = {}
        announced: dict[int, RecordedEvent] = {}
        links: dict[int, ServiceView] = {}
        async for event in self._events(tenant_id, position, (maintenance.KIND, service.KIND)):
            if event.kind == service.KIND:
                links[event.stream_id] = services.evolve_view(links.get(event.stream_id), event)
            else:
                announced.setdefault(event.stream_id, event)
                views[event.stream_id] = windows.evolve_view(views.get(event.stream_id), event)
        found = [view for view in views.values() if wanted(view)]
        found.sort(key=lambda view: (announced[view.id].occurred_at, view.id), reverse=True)
        return _page(position, found, limit, offset, links)

    async def services(
        self, tenant_id: int, position: int, wanted: Callable[[ServiceView], bool], limit: int | None, offset: int
    ) -> Page:
        """Return a page of the services that were `wanted` at `position`, by name, with the status they had."""
        views: dict[int, ServiceView] = {}
        sources: dict[tuple[str, int], Source | None] = {}
        async for event in self._events(tenant_id, position, (service.KIND, incident.KIND, maintenance.KIND)):
            if event.kind != service.KIND:
                key = (event.kind, event.stream_id)
                sources[key] = impact.evolve(sources.get(key), event)
            elif isinstance(event.event, ServiceRetired):
                views.pop(event.stream_id, None)
            else:
                views[event.stream_id] = services.evolve_view(views.get(event.stream_id), event)
        levels: dict[int, list[int]] = defaultdict(list)
        maintained: set[int] = set()
        for (kind, _), source in sources.items():
            for service_id, (level, _) in ({} if source is None else source.touches()).items():
                if kind == incident.KIND:
                    levels[service_id].append(level)
                else:
                    maintained.add(service_id)
        for view in views.values():
            view.current_status = service_status(levels[view.id], maintenance=view.id in maintained)
        found = [view for view in views.values() if wanted(view)]
        found.sort(key=lambda view: (view.name, view.id))
        return _page(position, found, limit, offset, {})

    async def _events(self, tenant_id: int, position: int, kinds: Sequence[str]) -> AsyncIterator[RecordedEvent]:
        async with self._at_once:
            for after in range(0, position, _BATCH):
                async with self._database.connection() as connection:
                    until = min(after + _BATCH, position)
                    events = await store.read_between(connection, tenant_id, after, until, kinds)
                for event in events:
                    yield event


async def _links(connection: Connection, tenant_id: int, service_ids: Iterable[int], position: int) -> ServiceLinks:
    if not (ids := list(service_ids)):
        return {}, ()
    return services.links_as_of(await store.read_streams(connection, tenant_id, service.KIND, ids, position))


def _page(
    position: int,
    found: Sequence[IncidentView] | Sequence[MaintenanceView] | Sequence[ServiceView],
    limit: int | None,
    offset: int,
    links: Mapping[int, ServiceView],
) -> Page:
    shown = found[offset:] if limit is None else found[offset : offset + limit]
    for view in shown:
        if not isinstance(view, ServiceView):
            view.services = [services.service_link(links[i]) for i in view.service_ids if i in links]
    items = b",".join(msgspec.json.encode(view) for view in shown)
    return Page(head_position=position, trusted_position=position, total=len(found), items=items)

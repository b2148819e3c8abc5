"""The projection `services`: services as `/services` serves them, and the links that other responses show."""

from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias, cast

import asyncpg
import msgspec

from opsentry.domain import service
from opsentry.domain.service import Service, ServiceEvent
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection, Record, fetch_one
from opsentry.infrastructure.single_flight import BatchLoader
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import (
    Replay,
    Streams,
    Table,
    WriterRows,
    by_stream,
    continued,
    replay_streams,
)
from opsentry.projections.engine.projector import Projector
from opsentry.projections.page_request import PageRequest

# Selects the stored rows of these services.
_LOAD = "SELECT service_id, version, retired, body FROM services WHERE tenant_id = $1 AND service_id = ANY($2)"

# The response about service `s` with its status `t`: its body with `current_status`.
_RESPONSE = (
    """replace(s.body, '"current_status":null', '"current_status":"' || coalesce(t.status, 'operational') || '"')"""
)

# Selects a page of services by name. $2: a status, $3: a visibility, $4: a pattern; NULL for any.
_SELECT_PAGE = f"""
WITH found AS (
    SELECT s.name, s.service_id, {_RESPONSE} AS response
    FROM services s LEFT JOIN service_status t USING (tenant_id, service_id)
    WHERE s.tenant_id = $1 AND NOT s.retired
      AND ($2::text IS NULL OR coalesce(t.status, 'operational') = $2)
      AND ($3::text IS NULL OR s.visibility = $3)
      AND ($4::text IS NULL OR s.name ILIKE $4 OR s.slug ILIKE $4)
), page AS (SELECT * FROM found ORDER BY name COLLATE "C", service_id LIMIT $5 OFFSET $6)
SELECT fresh.*, (SELECT count(*) FROM found) AS total,
    convert_to((SELECT string_agg(response, ',' ORDER BY name COLLATE "C", service_id) FROM page), 'UTF8') AS items
FROM {freshness("services", "impact")}
"""

# Selects the service $2.
_SELECT_ONE = f"""
SELECT fresh.*, s.version || coalesce('-' || nullif(t.status, 'operational'), '') AS etag,
    convert_to({_RESPONSE}, 'UTF8') AS body
FROM {freshness("services", "impact")}
LEFT JOIN services s ON s.tenant_id = $1 AND s.service_id = $2 AND NOT s.retired
LEFT JOIN service_status t ON t.tenant_id = s.tenant_id AND t.service_id = s.service_id
"""

# Selects the links of the services $2. Retired ones are included: resources that link them already keep the link.
_SELECT_LINKS = f"""
SELECT fresh.*, found.ids, found.links, found.retired, found.versions
FROM {freshness("services")} CROSS JOIN (
    SELECT array_agg(service_id) AS ids, array_agg(link) AS links, array_agg(version) AS versions,
        array_agg(service_id) FILTER (WHERE retired) AS retired
    FROM services WHERE tenant_id = $1 AND service_id = ANY($2)) AS found
"""


class ServiceView(msgspec.Struct, kw_only=True):
    """A service as the API renders it; a read fills in `current_status`. `created_at` is real-world time."""

    id: int
    slug: str
    name: str
    current_status: str | None = None
    visibility: str
    tags: tuple[str, ...]
    description: str | None
    created_at: datetime


class ServiceFilter(NamedTuple):
    """The services that a list shows; a field that is `None` admits all.

    Attributes:
        status: One of `service.STATUSES`.
        visibility: One of `VISIBILITIES`.
        search: A part of the name or of the slug, in any case.
    """

    status: str | None = None
    visibility: str | None = None
    search: str | None = None

    def matches(self, view: ServiceView) -> bool:
        """Return whether the list shows this service; its `current_status` must be set."""
        search = (self.search or "").lower()
        return (
            self.status in {None, view.current_status}
            and self.visibility in {None, view.visibility}
            and (search in view.name.lower() or search in view.slug)
        )

    def pattern(self) -> str | None:
        """Return `search` as a pattern for ILIKE."""
        if self.search is None:
            return None
        escaped = self.search.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
        return f"%{escaped}%"


_decode_view = msgspec.json.Decoder(ServiceView).decode


ServiceLinks: TypeAlias = tuple[Mapping[int, msgspec.Raw], Sequence[int]]
"""Service links as JSON by id, and the versions of these services."""


class ServiceLink(msgspec.Struct):
    """A service as other responses link it."""

    id: int
    slug: str
    name: str


def evolve_view(view: ServiceView | None, recorded: RecordedEvent) -> ServiceView:
    """Return the view after one more event."""
    state = None
    if view is not None:
        state = Service(
            slug=view.slug,
            name=view.name,
            description=view.description,
            visibility=view.visibility,
            tags=view.tags,
        )
    after = service.evolve(state, cast("ServiceEvent", recorded.event))
    return ServiceView(
        id=recorded.stream_id,
        slug=after.slug,
        name=after.name,
        visibility=after.visibility,
        tags=after.tags,
        description=after.description,
        created_at=recorded.occurred_at if view is None else view.created_at,
    )


SERVICES = Table(
    "services",
    ("service_id", "version", "slug", "name", "visibility", "retired", "created_at", "body", "link"),
    keys=1,
    of_streams={service.KIND: "service_id BETWEEN $2 AND $3"},
)


class Services:
    """The projection `services`."""

    name = "services"
    version = 1
    writer = "write_services"
    kinds = (service.KIND,)
    tables = (SERVICES,)

    async def prepare(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> WriterRows:
        """Return a row for each service."""
        streams = by_stream(events)
        stored, retired = {}, set()
        if ids := continued(streams):
            rows = await connection.fetch(_LOAD, tenant_id, ids)
            stored = {row["service_id"]: (row["version"], _decode_view(row["body"])) for row in rows}
            retired = {row["service_id"] for row in rows if row["retired"]}
        return [_rows(streams, stored, retired)]

    def replayer(self) -> Replay:
        """Return a function that computes the rows of whole streams."""
        return lambda _kind, streams: {SERVICES.name: _rows(streams, {}, set())}


def _rows(
    streams: Streams, stored: Mapping[int, tuple[int, ServiceView]], retired: Container[int]
) -> list[tuple[Any, ...]]:
    return [
        (
            view.id,
            version,
            view.slug,
            view.name,
            view.visibility,
            view.id in retired or any(isinstance(e.event, service.ServiceRetired) for e in streams[view.id]),
            view.created_at,
            msgspec.json.encode(view).decode(),
            bytes(service_link(view)).decode(),
        )
        for view, version in replay_streams(streams, stored, evolve_view)
    ]


async def select_services(
    connection: Connection, tenant_id: int, filter_: ServiceFilter, page: PageRequest
) -> asyncpg.Record:
    """Return `total` and `items` (the inside of a JSON array) of the tenant's services, by name."""
    return await fetch_one(
        connection, _SELECT_PAGE, tenant_id, filter_.status, filter_.visibility, filter_.pattern(), *page
    )


async def select_service(connection: Connection, tenant_id: int, service_id: int) -> asyncpg.Record:
    """Return `body` and `etag` of a service; NULL if it does not exist or is retired."""
    return await fetch_one(connection, _SELECT_ONE, tenant_id, service_id)


async def select_service_links(connection: Connection, tenant_id: int, service_ids: Iterable[int]) -> asyncpg.Record:
    """Return the `ids`, `links` and `versions` of these services, and the ids of the `retired` ones; NULL if none is.

    A row for `links_from_row`.
    """
    return await fetch_one(connection, _SELECT_LINKS, tenant_id, list(service_ids))


def service_link(view: ServiceView) -> msgspec.Raw:
    """Return the link to a service as JSON."""
    return msgspec.Raw(msgspec.json.encode(ServiceLink(view.id, view.slug, view.name)))


def links_from_row(row: Record, service_ids: Iterable[int]) -> ServiceLinks:
    """Return the links to `service_ids` in a row of `select_service_links`, which may have others too."""
    links = dict(zip(row["ids"] or (), row["links"] or (), strict=True))
    versions = dict(zip(row["ids"] or (), row["versions"] or (), strict=True))
    known = [service_id for service_id in service_ids if service_id in links]
    return {i: msgspec.Raw(links[i].encode()) for i in known}, [versions[i] for i in known]


def links_as_of(events: Iterable[RecordedEvent]) -> ServiceLinks:
    """Return the links to services after `events`, which are whole streams up to a position."""
    views = replay_streams(by_stream(events), {}, evolve_view)
    return {view.id: service_link(view) for view, _ in views}, [version for _, version in views]


class ServiceLinkLoader:
    """Loads service links for concurrent requests: those of one tenant share a query that starts after all of them."""

    def __init__(self, projector: Projector) -> None:
        self._projector = projector
        self._batches: BatchLoader[int, int, asyncpg.Record] = BatchLoader(self._read)

    async def read(self, tenant_id: int, service_ids: Iterable[int]) -> asyncpg.Record:
        """Return a row of `select_service_links` with at least these services, as of the call or later.

        Raises:
            DatabaseUnavailable: The database was lost.
        """
        return await self._batches.get(tenant_id, service_ids)

    async def _read(self, tenant_id: int, service_ids: set[int]) -> asyncpg.Record:
        return await self._projector.read(
            tenant_id, lambda connection: select_service_links(connection, tenant_id, service_ids)
        )

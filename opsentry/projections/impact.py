"""The periods in which an incident or a window touched a service: serves status and uptime.

Periods of different sources may overlap; that is resolved when reading, so each source's rows depend on its own
events alone.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import asyncpg
import msgspec
from msgspec import UNSET

from opsentry.domain import incident, maintenance
from opsentry.domain.decider import set_fields
from opsentry.domain.incident import (
    IncidentOpened,
    IncidentReopened,
    IncidentResolved,
    IncidentServicesChanged,
    IncidentSeverityChanged,
    IncidentVisibilityChanged,
)
from opsentry.domain.maintenance import (
    MaintenanceChanged,
    MaintenanceCompleted,
    MaintenanceScheduled,
    MaintenanceStarted,
)
from opsentry.domain.uptime import LEVELS, Period
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import Replay, Rows, Streams, Table, by_stream, continued
from opsentry.projections.timeline import id_array

# The sources that this batch goes on from, each by the index; see the same in incidents.
_LOAD = """
SELECT s.* FROM unnest($3::bigint[]) AS wanted (id) CROSS JOIN LATERAL (
    SELECT * FROM impact_sources WHERE tenant_id = $1 AND kind = $2 AND source_id = wanted.id LIMIT 1) AS s
"""

_STORE = """
INSERT INTO impact_sources
    (tenant_id, kind, source_id, version, live, level, excluded, visibility, service_ids)
SELECT $1, $2, id, version, live, level, excluded, visibility, service_ids::bigint[]
FROM unnest($3::bigint[], $4::int[], $5::bool[], $6::smallint[], $7::bool[], $8::text[], $9::text[])
    AS row (id, version, live, level, excluded, visibility, service_ids)
ON CONFLICT (tenant_id, kind, source_id) DO UPDATE SET
    version = excluded.version, live = excluded.live, level = excluded.level, excluded = excluded.excluded,
    visibility = excluded.visibility, service_ids = excluded.service_ids
WHERE impact_sources.version < excluded.version
"""

# Ends the periods that still last.
_END = """
UPDATE impact_periods p SET to_at = row.to_at
FROM unnest($3::bigint[], $4::bigint[], $5::timestamptz[]) AS row (source_id, service_id, to_at)
WHERE p.tenant_id = $1 AND p.kind = $2 AND p.source_id = row.source_id AND p.service_id = row.service_id
  AND p.to_at = 'infinity'
"""

_BEGIN = """
INSERT INTO impact_periods
    (tenant_id, kind, source_id, service_id, from_version, from_at, to_at, level, excluded)
SELECT $1, $2, source_id, service_id, from_version, from_at, to_at, level, excluded
FROM unnest($3::bigint[], $4::bigint[], $5::int[], $6::timestamptz[], $7::timestamptz[], $8::smallint[], $9::bool[])
    AS row (source_id, service_id, from_version, from_at, to_at, level, excluded)
ON CONFLICT DO NOTHING
"""

# A period that lasts, or lasted for more than a week, as the indexes tell these few from the rest.
_LONG = "to_at AT TIME ZONE 'UTC' > from_at AT TIME ZONE 'UTC' + interval '168 hours'"


def _periods_query(chosen: str) -> str:
    """Return the query of what touched the `chosen` services between $2 and $3, NULL for $4 days before $3 and for now.

    An end is NULL where a period still lasts. Each service's periods are found by indexes, at most $5 of all, and
    however far back: of all but the long ones, those that reach into a window began at most a week before it. Days and
    weeks are in hours, while those of the server's time zone, '1 day', need not be of 24.
    """
    touching = """
        SELECT service_id, from_at, to_at, level, excluded, kind, source_id, from_version FROM impact_periods
        WHERE tenant_id = $1 AND service_id = c.service_id AND to_at > begin AND from_at < stop"""
    return f"""
        WITH bounds AS MATERIALIZED (
            SELECT coalesce($2, coalesce($3, now()) - $4 * interval '24 hours') AS begin, coalesce($3, now()) AS stop),
        chosen AS (
            SELECT service_id, since, ref FROM services WHERE tenant_id = $1 AND NOT retired {chosen}),
        found AS (
            SELECT p.*, row_number() OVER (
                ORDER BY p.service_id, p.from_at, p.kind, p.source_id, p.from_version) AS place
            FROM (SELECT any_of.* FROM bounds, chosen c CROSS JOIN LATERAL (
                {touching} AND from_at > begin - interval '168 hours' AND NOT ({_LONG})
                UNION ALL {touching} AND {_LONG}) AS any_of
                LIMIT $5) AS p)
        SELECT fresh.*, now() AS now,
            (SELECT array_agg(service_id ORDER BY service_id) FROM chosen) AS service_ids,
            (SELECT array_agg(since ORDER BY service_id) FROM chosen) AS sinces,
            (SELECT array_agg(ref ORDER BY service_id) FROM chosen) AS refs,
            (SELECT array_agg(service_id ORDER BY place) FROM found) AS touched,
            (SELECT array_agg(from_at ORDER BY place) FROM found) AS starts,
            (SELECT array_agg(nullif(to_at, 'infinity') ORDER BY place) FROM found) AS ends,
            (SELECT array_agg(level ORDER BY place) FROM found) AS levels,
            (SELECT array_agg(excluded ORDER BY place) FROM found) AS excluded,
            (SELECT array_agg(kind ORDER BY place) FROM found) AS kinds,
            (SELECT array_agg(source_id ORDER BY place) FROM found) AS source_ids
        FROM {freshness("services", "impact")}
    """


_OF_ONE = _periods_query("AND service_id = $6")
_OF_ALL = _periods_query("")


class Source(msgspec.Struct, kw_only=True, gc=False):
    """What an incident or a window does to services now."""

    live: bool
    level: int
    excluded: bool
    visibility: str
    service_ids: tuple[int, ...]

    def touches(self) -> dict[int, tuple[int, bool]]:
        """Return level and exclusion for each service that is touched at this moment."""
        return dict.fromkeys(self.service_ids, (self.level, self.excluded)) if self.live else {}


_MOVES = frozenset(
    {
        IncidentOpened,
        IncidentResolved,
        IncidentReopened,
        IncidentSeverityChanged,
        IncidentServicesChanged,
        IncidentVisibilityChanged,
        MaintenanceScheduled,
        MaintenanceChanged,
        MaintenanceStarted,
        MaintenanceCompleted,
    }
)


def evolve(source: Source | None, recorded: RecordedEvent) -> Source:
    """Fold one event of an incident or a window; one that changes nothing here gives the same object."""
    event = recorded.event
    if source is not None and type(event) not in _MOVES:
        return source
    match event:
        case IncidentOpened():
            return Source(
                live=True,
                level=LEVELS[event.severity],
                excluded=False,
                visibility=event.visibility,
                service_ids=event.service_ids,
            )
        case MaintenanceScheduled():
            return Source(
                live=False,
                level=0,
                excluded=event.exclude_from_sla,
                visibility=event.visibility,
                service_ids=event.service_ids,
            )
    if source is None:
        raise ValueError(f"{event.TYPE} without a beginning")
    change = msgspec.structs.replace
    match event:
        case IncidentResolved() | MaintenanceCompleted():
            return change(source, live=False)
        case IncidentReopened() | MaintenanceStarted():
            return change(source, live=True)
        case IncidentSeverityChanged():
            return change(source, level=LEVELS[event.severity])
        case IncidentServicesChanged():
            return change(source, service_ids=event.service_ids)
        case IncidentVisibilityChanged():
            return change(source, visibility=event.visibility)
        case MaintenanceChanged():
            excluded = source.excluded if event.exclude_from_sla is UNSET else event.exclude_from_sla
            facts = {name: value for name, value in set_fields(event).items() if name in Source.__struct_fields__}
            return change(source, excluded=excluded, **facts)
        case _:
            return source


class _Begun(msgspec.Struct):
    source_id: int
    service_id: int
    version: int
    start: datetime
    level: int
    excluded: bool
    end: datetime | None = None


class _Changes(NamedTuple):
    """What a batch does: sources as they then are, periods that lasted and end, periods that begin."""

    sources: list[tuple[int, int, Source]]
    ended: list[tuple[int, int, datetime]]
    begun: list[_Begun]


_KINDS = (maintenance.KIND, incident.KIND)
_IDS = {kind: f"kind = '{kind}' AND source_id BETWEEN $2 AND $3" for kind in _KINDS}
SOURCES = Table(
    "impact_sources",
    ("kind", "source_id", "version", "live", "level", "excluded", "visibility", "service_ids"),
    keys=2,
    of_streams=_IDS,
)
PERIODS = Table(
    "impact_periods",
    ("kind", "source_id", "service_id", "from_version", "from_at", "to_at", "level", "excluded"),
    keys=4,
    of_streams=_IDS,
)
# The driver's way to write `infinity`: it lasts.
_LASTS = datetime.max.replace(tzinfo=UTC)


class Impact:
    """The projection `impact`."""

    name = "impact"
    version = 1
    kinds = _KINDS
    tables = (SOURCES, PERIODS)

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """End and begin periods for each source touched."""
        for kind in self.kinds:
            if of_kind := [event for event in events if event.kind == kind]:
                await self._apply(connection, tenant_id, kind, of_kind)

    async def _apply(self, connection: Connection, tenant_id: int, kind: str, events: Sequence[RecordedEvent]) -> None:
        streams = by_stream(events)
        stored = {}
        if ids := continued(streams):
            rows = await connection.fetch(_LOAD, tenant_id, kind, ids)
            stored = {row["source_id"]: (row["version"], _source(row)) for row in rows}
        changes = _changes(streams, stored)
        columns = list(zip(*map(_source_row, changes.sources), strict=True))
        columns[6] = tuple(map(id_array, columns[6]))
        await connection.execute(_STORE, tenant_id, kind, *columns)
        if changes.ended:
            await connection.execute(_END, tenant_id, kind, *zip(*changes.ended, strict=True))
        if changes.begun:
            await connection.execute(_BEGIN, tenant_id, kind, *zip(*map(_period_row, changes.begun), strict=True))

    def replayer(self) -> Replay:
        """Return a function that gives the rows of whole streams."""

        def replay(kind: str, streams: Streams) -> Rows:
            changes = _changes(streams, {})
            return {
                SOURCES.name: [(kind, *_source_row(source)) for source in changes.sources],
                PERIODS.name: [(kind, *_period_row(period)) for period in changes.begun],
            }

        return replay


def _changes(streams: Streams, stored: Mapping[int, tuple[int, Source]]) -> _Changes:
    """Fold streams into what they do; of those that are `stored`, what their rows show already is passed over."""
    changes = _Changes([], [], [])
    for source_id, stream in streams.items():
        version, source = stored.get(source_id, (0, None))
        open_here: dict[int, _Begun] = {}
        after: Mapping[int, tuple[int, bool]] = {} if source is None else source.touches()
        for recorded in stream:
            if recorded.version <= version:
                continue
            version, earlier = recorded.version, source
            source = evolve(source, recorded)
            if source is earlier:
                continue
            before, after = after, source.touches()
            moment = recorded.occurred_at
            for service_id in [s for s in before if before[s] != after.get(s)]:
                period = open_here.pop(service_id, None)
                if period is None:
                    changes.ended.append((source_id, service_id, moment))
                else:
                    period.end = moment
            for service_id in [s for s in after if after[s] != before.get(s)]:
                period = _Begun(source_id, service_id, version, moment, *after[service_id])
                open_here[service_id] = period
                changes.begun.append(period)
        if source is not None:
            changes.sources.append((source_id, version, source))
    return changes


def _source_row(changed: tuple[int, int, Source]) -> tuple[Any, ...]:
    source_id, version, source = changed
    return (source_id, version, source.live, source.level, source.excluded, source.visibility, source.service_ids)


def _period_row(period: _Begun) -> tuple[Any, ...]:
    return (
        period.source_id,
        period.service_id,
        period.version,
        period.start,
        _LASTS if period.end is None else period.end,
        period.level,
        period.excluded,
    )


def _source(row: asyncpg.Record) -> Source:
    return Source(
        live=row["live"],
        level=row["level"],
        excluded=row["excluded"],
        visibility=row["visibility"],
        service_ids=tuple(row["service_ids"]),
    )


async def select_service_impacts(
    connection: Connection,
    tenant_id: int,
    service_id: int | None,
    start: datetime | None,
    end: datetime | None,
    days: int,
    limit: int,
) -> asyncpg.Record:
    """Return what touched a service, or all of the tenant's, in a window, for `touched`; and `now`.

    Args:
        connection: The database.
        tenant_id: The tenant.
        service_id: The service; all if `None`.
        start: Where the window begins; so many `days` of 24 hours before its end if `None`.
        end: Where it ends; now if `None`.
        days: See `start`.
        limit: How many periods there may be at most; which ones, where there are more, is left to chance.
    """
    if service_id is None:
        return await connection.fetchrow(_OF_ALL, tenant_id, start, end, days, limit)
    return await connection.fetchrow(_OF_ONE, tenant_id, start, end, days, limit, service_id)


class Touched(msgspec.Struct, frozen=True):
    """A service, since when it is under watch, its link as JSON, and what touched it."""

    service_id: int
    since: datetime
    ref: msgspec.Raw
    periods: list[Period]


def touched(row: asyncpg.Record) -> list[Touched]:
    """Return the services in a row of `between`; a period that still lasts ends at the row's `now`."""
    if row["service_ids"] is None:
        return []
    services = {
        service_id: Touched(service_id, since, msgspec.Raw(ref.encode()), [])
        for service_id, since, ref in zip(row["service_ids"], row["sinces"], row["refs"], strict=True)
    }
    if row["touched"] is not None:
        names = ("touched", "starts", "ends", "levels", "excluded", "kinds", "source_ids")
        for service_id, start, end, *rest in zip(*(row[name] for name in names), strict=True):
            services[service_id].periods.append(Period(start, end or row["now"], *rest))
    return list(services.values())

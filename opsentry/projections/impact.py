"""The projection `impact`: the periods in which an incident or a maintenance window affects a service.

Status and uptime are computed from these. Periods of different streams may overlap; a read resolves that. So each
stream's rows depend on its own events alone.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec

from opsentry.domain import incident, maintenance
from opsentry.domain.uptime import Period
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection, fetch_one
from opsentry.projections.engine.freshness import freshness
from opsentry.projections.engine.projection import Replay, Rows, Streams, Table, WriterRows, by_stream, continued
from opsentry.projections.impact_state import ChangedState, ImpactState, ServiceImpact, derive_changes

# Selects the states of the streams $3 of kind $2. LIMIT makes it one index lookup for each; see `incidents`.
_LOAD_STATES = """
SELECT s.* FROM unnest($3::bigint[]) AS wanted (id) CROSS JOIN LATERAL (
    SELECT stream_id, version, is_active, level, is_excluded, service_ids FROM impact_states
    WHERE tenant_id = $1 AND stream_kind = $2 AND stream_id = wanted.id LIMIT 1) AS s
"""

# The condition of the index on impacts that last more than a week or are ongoing. Time zone UTC makes it immutable.
_IS_LONG = "ended_at AT TIME ZONE 'UTC' > started_at AT TIME ZONE 'UTC' + interval '168 hours'"


def _impacts_query(chosen: str) -> str:
    """Return SQL that selects the impacts on the `chosen` services between $2 and $3, at most $5 of them.

    $2 defaults to $4 days before $3, and $3 to now. An end is NULL while the impact lasts.

    Indexes find each service's impacts, however old the window is: an impact of at most a week that reaches into the
    window starts at most a week before it, and longer ones are few. Lengths are in hours, because the server's time
    zone has days that are not of 24 hours.
    """
    overlapping = """
        SELECT service_id, started_at, ended_at, level, is_excluded, stream_kind, stream_id, started_version
        FROM service_impacts
        WHERE tenant_id = $1 AND service_id = c.service_id AND ended_at > window_start AND started_at < window_end"""
    return f"""
        WITH bounds AS MATERIALIZED (
            SELECT coalesce($2, coalesce($3, now()) - $4 * interval '24 hours') AS window_start,
                coalesce($3, now()) AS window_end),
        chosen AS (
            SELECT service_id, created_at, link FROM services WHERE tenant_id = $1 AND NOT retired {chosen}),
        found AS (
            SELECT i.*, row_number() OVER (
                ORDER BY i.service_id, i.started_at, i.stream_kind, i.stream_id, i.started_version) AS ordinal
            FROM (SELECT any_length.* FROM bounds, chosen c CROSS JOIN LATERAL (
                {overlapping} AND started_at > window_start - interval '168 hours' AND NOT ({_IS_LONG})
                UNION ALL {overlapping} AND {_IS_LONG}) AS any_length
                LIMIT $5) AS i)
        SELECT fresh.*, now() AS now,
            (SELECT array_agg(service_id ORDER BY service_id) FROM chosen) AS service_ids,
            (SELECT array_agg(created_at ORDER BY service_id) FROM chosen) AS created_ats,
            (SELECT array_agg(link ORDER BY service_id) FROM chosen) AS links,
            (SELECT array_agg(service_id ORDER BY ordinal) FROM found) AS impacted_ids,
            (SELECT array_agg(started_at ORDER BY ordinal) FROM found) AS started_ats,
            (SELECT array_agg(nullif(ended_at, 'infinity') ORDER BY ordinal) FROM found) AS ended_ats,
            (SELECT array_agg(level ORDER BY ordinal) FROM found) AS levels,
            (SELECT array_agg(is_excluded ORDER BY ordinal) FROM found) AS are_excluded,
            (SELECT array_agg(stream_kind ORDER BY ordinal) FROM found) AS stream_kinds,
            (SELECT array_agg(stream_id ORDER BY ordinal) FROM found) AS stream_ids
        FROM {freshness("services", "impact")}
    """


# Selects the impacts on the service $6.
_SELECT_OF_SERVICE = _impacts_query("AND service_id = $6")
# Selects the impacts on all services.
_SELECT_OF_ALL = _impacts_query("")

_KINDS = (maintenance.KIND, incident.KIND)
_OF_STREAMS = {kind: f"stream_kind = '{kind}' AND stream_id BETWEEN $2 AND $3" for kind in _KINDS}
STATES = Table(
    "impact_states",
    ("stream_kind", "stream_id", "version", "is_active", "level", "is_excluded", "service_ids"),
    keys=2,
    of_streams=_OF_STREAMS,
)
IMPACTS = Table(
    "service_impacts",
    ("stream_kind", "stream_id", "service_id", "started_version", "started_at", "ended_at", "level", "is_excluded"),
    keys=4,
    of_streams=_OF_STREAMS,
)
# The driver writes this datetime as `infinity`: the impact is ongoing.
_ONGOING = datetime.max.replace(tzinfo=UTC)


class Impact:
    """The projection `impact`."""

    name = "impact"
    version = 1
    writer = "write_impact"
    kinds = _KINDS
    tables = (STATES, IMPACTS)

    async def prepare(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> WriterRows:
        """Return the state of each stream, and the service impacts that end and start."""
        states: list[tuple[Any, ...]] = []
        ended: list[tuple[Any, ...]] = []
        started: list[tuple[Any, ...]] = []
        for kind in self.kinds:
            streams = by_stream(event for event in events if event.kind == kind)
            stored = {}
            if ids := continued(streams):
                rows = await connection.fetch(_LOAD_STATES, tenant_id, kind, ids)
                stored = {row["stream_id"]: (row["version"], _state(row)) for row in rows}
            changes = derive_changes(streams, stored)
            states += [(kind, *_state_row(changed)) for changed in changes.states]
            ended += [(kind, *end) for end in changes.ended]
            started += [(kind, *_impact_row(impact)) for impact in changes.started]
        return states, ended, started

    def replayer(self) -> Replay:
        """Return a function that computes the rows of whole streams."""

        def replay(kind: str, streams: Streams) -> Rows:
            changes = derive_changes(streams, {})
            return {
                STATES.name: [(kind, *_state_row(changed)) for changed in changes.states],
                IMPACTS.name: [(kind, *_impact_row(impact)) for impact in changes.started],
            }

        return replay


def _state_row(changed: ChangedState) -> tuple[Any, ...]:
    state = changed.state
    return (changed.stream_id, changed.version, state.is_active, state.level, state.is_excluded, state.service_ids)


def _impact_row(impact: ServiceImpact) -> tuple[Any, ...]:
    return (
        impact.stream_id,
        impact.service_id,
        impact.started_version,
        impact.started_at,
        _ONGOING if impact.ended_at is None else impact.ended_at,
        impact.level,
        impact.is_excluded,
    )


def _state(row: asyncpg.Record) -> ImpactState:
    return ImpactState(
        is_active=row["is_active"],
        level=row["level"],
        is_excluded=row["is_excluded"],
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
    """Return the impacts on one service, or on all of the tenant's, in a window of time.

    Args:
        connection: The database.
        tenant_id: The tenant.
        service_id: The service; all if `None`.
        start: The start of the window; `days` of 24 hours before its end if `None`.
        end: The end of the window; now if `None`.
        days: See `start`.
        limit: The number of impacts at most; which ones a longer list loses is not defined.

    Returns:
        A row for `impacted_services` and `count_impacts`, with the database's clock as `now`.
    """
    if service_id is None:
        return await fetch_one(connection, _SELECT_OF_ALL, tenant_id, start, end, days, limit)
    return await fetch_one(connection, _SELECT_OF_SERVICE, tenant_id, start, end, days, limit, service_id)


class ImpactedService(msgspec.Struct, frozen=True):
    """A service with the periods of its impacts.

    Attributes:
        service_id: The service.
        created_at: When the service came into being; uptime counts from there.
        link: The service link as JSON.
        periods: The impacts, the first started first.
    """

    service_id: int
    created_at: datetime
    link: msgspec.Raw
    periods: list[Period]


def count_impacts(row: asyncpg.Record) -> int:
    """Return the number of impacts in a row of `select_service_impacts`."""
    return len(row["impacted_ids"] or ())


def impacted_services(row: asyncpg.Record) -> list[ImpactedService]:
    """Return the services in a row of `select_service_impacts`; an ongoing impact ends at the row's `now`."""
    if row["service_ids"] is None:
        return []
    services = {
        service_id: ImpactedService(service_id, created_at, msgspec.Raw(link.encode()), [])
        for service_id, created_at, link in zip(row["service_ids"], row["created_ats"], row["links"], strict=True)
    }
    if row["impacted_ids"] is not None:
        names = ("impacted_ids", "started_ats", "ended_ats", "levels", "are_excluded", "stream_kinds", "stream_ids")
        for service_id, start, end, *rest in zip(*(row[name] for name in names), strict=True):
            services[service_id].periods.append(Period(start, end or row["now"], *rest))
    return list(services.values())

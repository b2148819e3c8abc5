"""Use cases of uptime: trailing windows, one window with its explanation, days, the whole tenant."""

from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.errors import NotFound
from opsentry.application.pipeline import CLOCK_SKEW
from opsentry.application.queries import lag_events, read_row
from opsentry.domain.decider import InvalidField
from opsentry.domain.incident import KIND, SEVERITIES
from opsentry.domain.uptime import PeriodShare, UptimeResult, compute_daily_uptime, compute_uptime, percentage
from opsentry.infrastructure.postgres import Record
from opsentry.projections import impact
from opsentry.projections.impact import ImpactedService
from opsentry.projections.services import ServiceLink

_DAY = timedelta(days=1)
# All trailing windows end at one moment, the database's now.
DAY_24H, DAYS_7, DAYS_30 = _DAY, 7 * _DAY, 30 * _DAY
DEFAULT_WINDOW_DAYS = 30
MAX_DAYS = 366
# One query holds this many periods in memory; a caller with more asks for a shorter window.
MAX_PERIODS = 20_000


class TrailingUptime(msgspec.Struct):
    """Percentages of the last 24 hours, 7 days and 30 days."""

    uptime_24h: float
    uptime_7d: float
    uptime_30d: float


class ServiceTrailingUptime(TrailingUptime):
    """The same of one service."""

    service_id: int


class Subject(msgspec.Struct):
    """The incident or maintenance window that affected a service."""

    kind: str
    id: int


class ExplainedPeriod(msgspec.Struct, rename={"from_": "from"}):
    """The part of one incident or window in an uptime. `to` is null while it lasts; `level` is null for a window."""

    source: Subject
    from_: datetime
    to: datetime | None
    level: str | None
    excluded: bool
    weight: float
    seconds: float
    excluded_seconds: float
    effective_seconds: float
    downtime_seconds: float


class UptimeTotals(msgspec.Struct, kw_only=True):
    """A percentage with its parts. `uptime` is null where nothing was observed."""

    uptime: float | None
    observed_seconds: float
    downtime_seconds: float


class ServiceUptime(UptimeTotals, kw_only=True, rename={"from_": "from"}):
    """The uptime of a service in one window; the last four are there with `explain`."""

    service_id: int
    from_: datetime
    to: datetime
    excluded_seconds: float | UnsetType = UNSET
    service_since: datetime | UnsetType = UNSET
    position: int | UnsetType = UNSET
    periods: Sequence[ExplainedPeriod] | UnsetType = UNSET


class DayUptime(UptimeTotals, kw_only=True):
    """The uptime of one day in UTC, with the worst severity of its incidents."""

    date: date
    worst: str | None


class DailyUptime(msgspec.Struct):
    """The uptime of days, the oldest first; today lasts until now."""

    service_id: int
    days: Sequence[DayUptime]


class LinkedTrailingUptime(TrailingUptime, kw_only=True):
    """A service of the tenant, in trailing windows."""

    service: ServiceLink | msgspec.Raw


class LinkedUptime(UptimeTotals, kw_only=True):
    """A service of the tenant, in one window."""

    service: ServiceLink | msgspec.Raw


class TenantTrailingUptime(TrailingUptime, kw_only=True):
    """All services together, each weighted by its observed time, and each by itself."""

    services: Sequence[LinkedTrailingUptime]


class TenantUptime(UptimeTotals, kw_only=True, rename={"from_": "from"}):
    """The same in one window."""

    from_: datetime
    to: datetime
    services: Sequence[LinkedUptime]


class UptimeAnswer(NamedTuple):
    """An uptime with the ledger position that it shows."""

    value: msgspec.Struct
    position: int
    lag_events: int


async def get_service_uptime(
    app: Application,
    caller: Caller,
    service_id: int,
    start: datetime | None,
    end: datetime | None,
    *,
    is_explained: bool = False,
) -> UptimeAnswer:
    """Return the uptime of a service: of trailing windows, or of the window from `start` to `end`.

    Raises:
        MissingPermission: The caller may not read.
        NotFound: The tenant has no such service.
        InvalidField: The window is empty, lies in the future or has too many periods.
        PositionNotReached, DatabaseUnavailable: The read model cannot be read.
    """
    _check_window(start, end)
    touched, row = await _read(app, caller, service_id, start, end)
    if not touched:
        raise NotFound
    service, now = touched[0], row["now"]
    if start is None and end is None and not is_explained:
        return _answer(ServiceTrailingUptime(*_trailing([service], now), service_id=service_id), row)
    begin, stop = _bounds(start, end, now)
    result = compute_uptime(service.periods, max(service.created_at, begin), stop)
    found = ServiceUptime(service_id=service_id, from_=begin, to=stop, **_totals(result))
    if is_explained:
        found.excluded_seconds = result.excluded / 1e6
        found.service_since = service.created_at
        found.position = row["projected_position"] or 0
        found.periods = [_explained(share, now) for share in result.shares]
    return _answer(found, row)


async def get_tenant_uptime(
    app: Application, caller: Caller, start: datetime | None, end: datetime | None
) -> UptimeAnswer:
    """Return the uptime of each service and of all together; raises as `get_service_uptime`."""
    _check_window(start, end)
    touched, row = await _read(app, caller, None, start, end)
    now = row["now"]
    if start is None and end is None:
        services = [LinkedTrailingUptime(*_trailing([each], now), service=each.link) for each in touched]
        return _answer(TenantTrailingUptime(*_trailing(touched, now), services=services), row)
    begin, stop = _bounds(start, end, now)
    results = [(each, compute_uptime(each.periods, max(each.created_at, begin), stop)) for each in touched]
    linked = [LinkedUptime(service=each.link, **_totals(result)) for each, result in results]
    together = _sum(result for _, result in results)
    return _answer(TenantUptime(from_=begin, to=stop, services=linked, **_totals(together)), row)


async def get_daily_uptime(app: Application, caller: Caller, service_id: int, days: int) -> UptimeAnswer:
    """Return the uptime of a service on each of the last `days` days; raises as `get_service_uptime`."""
    touched, row = await _read(app, caller, service_id, None, None, days)
    if not touched:
        raise NotFound
    service, now = touched[0], row["now"]
    # Each day computes every period that touches it.
    _check_periods("days", sum(min(days, (p.end - p.start) // _DAY + 1) for p in service.periods))
    found = compute_daily_uptime(service.periods, service.created_at, now, days)
    return _answer(
        DailyUptime(
            service_id, [DayUptime(date=day, worst=_worst(result), **_totals(result)) for day, result in found]
        ),
        row,
    )


async def _read(
    app: Application,
    caller: Caller,
    service_id: int | None,
    start: datetime | None,
    end: datetime | None,
    days: int | None = None,
) -> tuple[Sequence[ImpactedService], Record]:
    """Return the impacts on one service or all, and the row that they came in."""
    caller.require("read:status")
    row = await read_row(
        app,
        caller,
        lambda connection: impact.select_service_impacts(
            connection, caller.tenant_id, service_id, start, end, days or DEFAULT_WINDOW_DAYS, MAX_PERIODS + 1
        ),
    )
    _check_periods("days" if days else "from", impact.count_impacts(row))
    return impact.impacted_services(row), row


def _check_periods(field: str, periods: int) -> None:
    if periods > MAX_PERIODS:
        raise InvalidField(field, f"takes in more than {MAX_PERIODS} periods, ask for a shorter time")


def _check_window(start: datetime | None, end: datetime | None) -> None:
    if start is not None and end is not None and start >= end:
        raise InvalidField("to", "must be after from")


def _bounds(start: datetime | None, end: datetime | None, now: datetime) -> tuple[datetime, datetime]:
    """Return the window that is computed. It ends now at the latest; clocks may differ a little."""
    stop = now if end is None else end
    if stop > now + CLOCK_SKEW:
        raise InvalidField("to", "must not be in the future")
    stop = min(stop, now)
    try:
        begin = stop - DEFAULT_WINDOW_DAYS * _DAY if start is None else start
    except OverflowError:
        raise InvalidField("to", "is out of range") from None
    if begin >= stop:
        raise InvalidField("from", "must be before to, and not in the future")
    return begin, stop


def _trailing(touched: Sequence[ImpactedService], now: datetime) -> tuple[float, float, float]:
    def percent(length: timedelta) -> float:
        return _sum(compute_uptime(each.periods, max(each.created_at, now - length), now) for each in touched).uptime

    return percent(DAY_24H), percent(DAYS_7), percent(DAYS_30)


def _sum(results: Iterable[UptimeResult]) -> UptimeResult:
    """Return the mean of services, weighted by observed time, as one result."""
    found = list(results)
    return UptimeResult(
        sum(r.observed for r in found), sum(r.downtime for r in found), sum(r.excluded for r in found), ()
    )


def _totals(result: UptimeResult) -> dict[str, Any]:
    return {
        "uptime": percentage(result.observed, result.downtime) if result.observed else None,
        "observed_seconds": result.observed / 1e6,
        "downtime_seconds": result.downtime / 1e7,
    }


def _explained(share: PeriodShare, now: datetime) -> ExplainedPeriod:
    period = share.period
    return ExplainedPeriod(
        source=Subject(period.kind, period.source_id),
        from_=period.start,
        # Null while it lasts, so that the answer for a past window stays the same.
        to=period.end if period.end < now else None,
        level=SEVERITIES[period.level] if period.kind == KIND else None,
        excluded=period.is_excluded,
        weight=share.weight,
        seconds=share.inside / 1e6,
        excluded_seconds=0.0 if period.is_excluded else share.excluded / 1e6,
        effective_seconds=share.effective / 1e6,
        downtime_seconds=share.downtime / 1e7,
    )


def _worst(result: UptimeResult) -> str | None:
    levels = [share.period.level for share in result.shares if share.period.kind == KIND]
    return SEVERITIES[max(levels)] if levels else None


def _answer(value: msgspec.Struct, row: Record) -> UptimeAnswer:
    return UptimeAnswer(value, row["projected_position"] or 0, lag_events(row))

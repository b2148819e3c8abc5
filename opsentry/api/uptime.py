"""`/uptime` and `/services/:id/uptime…`: percentages, and what they are made of."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import msgspec
from aiohttp import web

from opsentry.api.commands import CLOCK_SKEW
from opsentry.api.context import RequestContext
from opsentry.api.errors import BadRequest, NotFound
from opsentry.api.responses import add_digest, object_response, with_position
from opsentry.domain.incident import KIND, SEVERITIES
from opsentry.domain.uptime import PeriodShare, UptimeResult, compute_daily_uptime, compute_uptime, percentage
from opsentry.projections import impact
from opsentry.projections.impact import Touched

# Windows that all end at one moment, the database's now.
TRAILING = {"uptime_24h": timedelta(days=1), "uptime_7d": timedelta(days=7), "uptime_30d": timedelta(days=30)}
LONGEST = max(TRAILING.values()).days
MAX_DAYS = 366

# As many periods are held in memory and reckoned at once, in a fraction of a second; whoever has more asks for less.
MAX_PERIODS = 20_000

_DAY = timedelta(days=1)


async def one(call: RequestContext) -> web.Response:
    """`GET /services/:id/uptime`: of trailing windows, or of the one that is asked for."""
    service_id = call.id()
    call.refuse("as_of")
    start, end = _window(call)
    explain = call.flag("explain")
    touched, row = await _touched(call, service_id, start, end)
    if not touched:
        raise NotFound
    service, now = touched[0], row["now"]
    answer: dict[str, Any] = {"service_id": service_id}
    if start is None and end is None and not explain:
        answer |= _trailing([service], now)
    else:
        begin, stop = _bounds(start, end, now)
        found = compute_uptime(service.periods, max(service.since, begin), stop)
        answer |= {"from": begin, "to": stop, **_totals(found)}
        if explain:
            answer |= {
                "excluded_seconds": found.excluded_time / 1e6,
                "service_since": service.since,
                "position": row["projected_position"],
                "periods": [_explained(share, now) for share in found.shares],
            }
    return _answer(answer, row)


async def everything(call: RequestContext) -> web.Response:
    """`GET /uptime`: of each service, and of all together, each weighing as long as it was observed."""
    call.refuse("as_of", "explain")
    start, end = _window(call)
    touched, row = await _touched(call, None, start, end)
    if start is None and end is None:
        services = [{"service": service.ref, **_trailing([service], row["now"])} for service in touched]
        return _answer({**_trailing(touched, row["now"]), "services": services}, row)
    begin, stop = _bounds(start, end, row["now"])
    found = [(service, compute_uptime(service.periods, max(service.since, begin), stop)) for service in touched]
    services = [{"service": service.ref, **_totals(result)} for service, result in found]
    together = _sum(result for _, result in found)
    return _answer({"from": begin, "to": stop, **_totals(together), "services": services}, row)


async def daily(call: RequestContext) -> web.Response:
    """`GET /services/:id/uptime/daily`: of each day in UTC, the oldest first, today as far as it has come last."""
    service_id = call.id()
    call.refuse("as_of", "from", "to", "explain")
    days = call.number("days", 90, lowest=1)
    if days > MAX_DAYS:
        raise BadRequest(f"days: must be at most {MAX_DAYS}")
    touched, row = await _touched(call, service_id, None, None, days)
    if not touched:
        raise NotFound
    service, now = touched[0], row["now"]
    # A period is reckoned on each day that it touches.
    _check("days", sum(min(days, (p.end - p.start) // _DAY + 1) for p in service.periods))
    bars = [
        # Before the service there was nothing to observe: no bar, not a green one.
        {"date": day, **_totals(found), "worst": _worst(found)}
        for day, found in compute_daily_uptime(service.periods, service.since, now, days)
    ]
    return _answer({"service_id": service_id, "days": bars}, row)


async def _touched(
    call: RequestContext, service_id: int | None, start: datetime | None, end: datetime | None, days: int | None = None
) -> tuple[Sequence[Touched], asyncpg.Record]:
    """Return what touched one service or all, and the row that tells it; see `impact.select_service_impacts`.

    Raises:
        BadRequest: It is more than can be reckoned at once.
    """
    row = await call.read(
        lambda connection: impact.select_service_impacts(
            connection, call.tenant_id, service_id, start, end, days or LONGEST, MAX_PERIODS + 1
        )
    )
    _check("days" if days else "from", len(row["touched"] or ()))
    return impact.touched(row), row


def _check(field: str, periods: int) -> None:
    if periods > MAX_PERIODS:
        raise BadRequest(f"{field}: takes in more than {MAX_PERIODS} periods, ask for a shorter time")


def _window(call: RequestContext) -> tuple[datetime | None, datetime | None]:
    start, end = call.moment("from"), call.moment("to")
    if start is not None and end is not None and start >= end:
        raise BadRequest("to: must be after from")
    return start, end


def _bounds(start: datetime | None, end: datetime | None, now: datetime) -> tuple[datetime, datetime]:
    """Return the window that is reckoned; what has not happened yet cannot be, but clocks may differ a little.

    Raises:
        BadRequest: It ends in the future, or begins at its end, or before the calendar does.
    """
    stop = now if end is None else end
    if stop > now + CLOCK_SKEW:
        raise BadRequest("to: must not be in the future")
    stop = min(stop, now)
    try:
        begin = stop - LONGEST * _DAY if start is None else start
    except OverflowError:
        raise BadRequest("to: is out of range") from None
    if begin >= stop:
        raise BadRequest("from: must be before to, and not in the future")
    return begin, stop


def _trailing(touched: Sequence[Touched], now: datetime) -> dict[str, float]:
    return {
        name: _sum(compute_uptime(s.periods, max(s.since, now - length), now) for s in touched).uptime
        for name, length in TRAILING.items()
    }


def _sum(results: Iterable[UptimeResult]) -> UptimeResult:
    """Return the mean of services, weighted by the time that each was observed, as one result."""
    found = list(results)
    return UptimeResult(
        sum(r.observed for r in found), sum(r.downtime for r in found), sum(r.excluded_time for r in found), ()
    )


def _totals(found: UptimeResult) -> dict[str, Any]:
    """Return the percentage with the denominator and what was lost of it, in seconds."""
    return {
        "uptime": percentage(found.observed, found.downtime) if found.observed else None,
        "observed_seconds": found.observed / 1e6,
        "downtime_seconds": found.downtime / 1e7,
    }


def _explained(share: PeriodShare, now: datetime) -> dict[str, Any]:
    period = share.period
    return {
        "source": {"kind": period.kind, "id": period.source_id},
        "from": period.start,
        # Open where it still lasts, so that the answer for a window of the past stays the same.
        "to": period.end if period.end < now else None,
        "level": SEVERITIES[period.level] if period.kind == KIND else None,
        "excluded": period.excluded,
        "weight": share.weight,
        "seconds": share.inside / 1e6,
        "excluded_seconds": 0.0 if period.excluded else share.excluded_time / 1e6,
        "effective_seconds": share.effective / 1e6,
        "downtime_seconds": share.downtime / 1e7,
    }


def _worst(found: UptimeResult) -> str | None:
    levels = [share.period.level for share in found.shares if share.period.kind == KIND]
    return SEVERITIES[max(levels)] if levels else None


def _answer(answer: dict[str, Any], row: asyncpg.Record) -> web.Response:
    return add_digest(with_position(object_response(msgspec.json.encode(answer)), row))

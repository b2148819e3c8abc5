"""`/uptime` and `/services/:id/uptime…`: percentages, and what they are made of."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
from aiohttp import web

from opsentry.api.answers import add_digest, object_response, with_position
from opsentry.api.errors import BadRequest, NotFound
from opsentry.api.http import Call
from opsentry.domain.incident import SEVERITIES
from opsentry.domain.status import Period, Reckoning, percentage, reckon
from opsentry.projections import impact
from opsentry.projections.impact import Touched

# Windows that all end at one moment, the database's now.
TRAILING = {"uptime_24h": timedelta(days=1), "uptime_7d": timedelta(days=7), "uptime_30d": timedelta(days=30)}
LONGEST = max(TRAILING.values()).days
MAX_DAYS = 366

_DAY = timedelta(days=1)


async def one(call: Call) -> web.Response:
    """`GET /services/:id/uptime`: of trailing windows, or of the one that is asked for."""
    service_id = call.id()
    call.no_as_of()
    start, end = _window(call)
    explain = call.flag("explain")
    row = await call.read(
        lambda connection: impact.between(connection, call.tenant_id, service_id, start, end, LONGEST)
    )
    touched = impact.touched(row)
    if not touched:
        raise NotFound
    service = touched[0]
    answer: dict[str, Any] = {"service_id": service_id}
    if start is None and end is None and not explain:
        answer |= _trailing([service], row["now"])
    else:
        begin, stop = _bounds(start, end, row["now"])
        found = reckon(service.periods, max(service.since, begin), stop)
        answer |= {"from": begin, "to": stop, **_totals(found)}
        if explain:
            answer |= {"service_since": service.since, "position": row["shown"], "periods": _explained(found)}
    return _answer(answer, row)


async def everything(call: Call) -> web.Response:
    """`GET /uptime`: of each service, and of all together, each weighing as long as it was observed."""
    call.no_as_of()
    start, end = _window(call)
    row = await call.read(lambda connection: impact.between(connection, call.tenant_id, None, start, end, LONGEST))
    touched = impact.touched(row)
    if start is None and end is None:
        services = [{"service": service.ref, **_trailing([service], row["now"])} for service in touched]
        return _answer({**_trailing(touched, row["now"]), "services": services}, row)
    begin, stop = _bounds(start, end, row["now"])
    found = [(service, reckon(service.periods, max(service.since, begin), stop)) for service in touched]
    services = [{"service": service.ref, **_totals(reckoning)} for service, reckoning in found]
    together = _sum(reckoning for _, reckoning in found)
    return _answer({"from": begin, "to": stop, **_totals(together), "services": services}, row)


async def daily(call: Call) -> web.Response:
    """`GET /services/:id/uptime/daily`: of each day in UTC, the oldest first, today as far as it has come last."""
    service_id = call.id()
    call.no_as_of()
    days = call.number("days", 90, lowest=1)
    if days > MAX_DAYS:
        raise BadRequest(f"days: must be at most {MAX_DAYS}")
    row = await call.read(lambda connection: impact.between(connection, call.tenant_id, service_id, None, None, days))
    touched = impact.touched(row)
    if not touched:
        raise NotFound
    service, now = touched[0], row["now"].astimezone(UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    first = midnight - (days - 1) * _DAY
    by_day: list[list[Period]] = [[] for _ in range(days)]
    for period in service.periods:
        begin = max(0, (period.start - first) // _DAY)
        for number in range(begin, min(days - 1, (period.end - first) // _DAY) + 1):
            by_day[number].append(period)
    bars = []
    for number, periods in enumerate(by_day):
        begin = first + number * _DAY
        found = reckon(periods, max(service.since, begin), min(begin + _DAY, now))
        # Before the service there was nothing to observe: no bar, not a green one.
        bars.append({"date": begin.date(), **_totals(found), "worst": _worst(found)})
    return _answer({"service_id": service_id, "days": bars}, row)


def _window(call: Call) -> tuple[datetime | None, datetime | None]:
    start, end = call.moment("from"), call.moment("to")
    if start is not None and end is not None and start >= end:
        raise BadRequest("to: must be after from")
    return start, end


def _bounds(start: datetime | None, end: datetime | None, now: datetime) -> tuple[datetime, datetime]:
    """Return the window that is reckoned; what has not happened yet cannot be.

    Raises:
        BadRequest: It ends in the future, or begins at its end.
    """
    stop = now if end is None else end
    if stop > now:
        raise BadRequest("to: must not be in the future")
    begin = min(stop, now) - LONGEST * _DAY if start is None else start
    if begin >= stop:
        raise BadRequest("from: must be before to, and not in the future")
    return begin, stop


def _trailing(touched: Sequence[Touched], now: datetime) -> dict[str, float]:
    return {
        name: _sum(reckon(s.periods, max(s.since, now - length), now) for s in touched).uptime
        for name, length in TRAILING.items()
    }


def _sum(reckonings: Iterable[Reckoning]) -> Reckoning:
    """Return the mean of services, weighted by the time that each was observed, as one reckoning."""
    found = list(reckonings)
    return Reckoning(sum(r.observed for r in found), sum(r.lost for r in found), ())


def _totals(found: Reckoning) -> dict[str, Any]:
    """Return the percentage with the denominator and what was lost of it, in seconds."""
    return {
        "uptime": percentage(found.observed, found.lost) if found.observed else None,
        "observed_seconds": found.observed / 1e6,
        "downtime_seconds": found.lost / 1e7,
    }


def _explained(found: Reckoning) -> list[dict[str, Any]]:
    return [
        {
            "source": {"kind": share.period.kind, "id": share.period.source_id},
            "from": share.period.start,
            "to": share.period.end,
            "level": None if share.period.excluded else SEVERITIES[share.period.level],
            "excluded": share.period.excluded,
            "weight": share.weight,
            "seconds": share.inside / 1e6,
            "cut_seconds": 0.0 if share.period.excluded else share.cut / 1e6,
            "counted_seconds": share.counted / 1e6,
            "downtime_seconds": share.lost / 1e7,
        }
        for share in found.shares
    ]


def _worst(found: Reckoning) -> str | None:
    levels = [share.period.level for share in found.shares if share.period.kind == "incident" and share.inside]
    return SEVERITIES[max(levels)] if levels else None


def _answer(answer: dict[str, Any], row: asyncpg.Record) -> web.Response:
    return add_digest(with_position(object_response(msgspec.json.encode(answer)), row))

"""Derive a service's status from severities, and its uptime from the periods in which something affected it."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from heapq import heappop, heappush
from typing import NamedTuple

from opsentry.domain import incident
from opsentry.domain.incident import SEVERITIES
from opsentry.domain.service import ServiceStatus

LEVELS: Mapping[str, int] = {severity: level for level, severity in enumerate(SEVERITIES)}

# Tenths of downtime per level: a major outage counts in full, a partial outage three tenths, milder levels nothing. A
# critical incident shows and counts as a major outage.
_WEIGHT_TENTHS = {LEVELS["partial_outage"]: 3, LEVELS["major_outage"]: 10, LEVELS["critical"]: 10}

_DAY = timedelta(days=1)
_MICROSECOND = timedelta(microseconds=1)

# The status that an open incident of each level gives a service. The view `service_status` holds the same rule in SQL.
_STATUS_OF_LEVEL: tuple[ServiceStatus, ...] = (
    "operational",
    "degraded_performance",
    "partial_outage",
    "major_outage",
    "major_outage",
)


def service_status(levels: Iterable[int], *, maintenance: bool) -> ServiceStatus:
    """Return a service's status, which its worst open incident determines.

    Args:
        levels: The severities of the open incidents that affect the service, as indices of `SEVERITIES`.
        maintenance: Whether an active window affects the service. It shows only if the status is `operational`.
    """
    status = _STATUS_OF_LEVEL[max(levels, default=0)]
    return "under_maintenance" if maintenance and status == "operational" else status


class Period(NamedTuple):
    """Describe the time `[start, end)` in which an incident or maintenance window affected a service.

    Attributes:
        start: The first moment.
        end: The first moment after it.
        level: The severity, as an index of `SEVERITIES`.
        is_excluded: Whether it is a maintenance window that uptime excludes.
        kind: The stream kind of the incident or window.
        source_id: Its id.
    """

    start: datetime
    end: datetime
    level: int
    is_excluded: bool
    kind: str = incident.KIND
    source_id: int = 0


class PeriodShare(NamedTuple):
    """Describe a period's share of a window. Lengths are whole microseconds.

    Attributes:
        period: The whole period, including its parts outside the window.
        inside: Its length within the window.
        excluded: The part of `inside` that excluded periods cover.
        effective: The part of the rest in which this period counts. Of simultaneous periods the most severe one
            counts; of equally severe ones the first.
    """

    period: Period
    inside: int
    excluded: int
    effective: int

    @property
    def weight(self) -> float:
        """The fraction of the effective time that is downtime, 0.0 to 1.0."""
        return 0.0 if self.period.is_excluded else _WEIGHT_TENTHS.get(self.period.level, 0) / 10

    @property
    def downtime(self) -> int:
        """Downtime in tenths of microseconds."""
        return 0 if self.period.is_excluded else self.effective * _WEIGHT_TENTHS.get(self.period.level, 0)


class UptimeResult(NamedTuple):
    """Describe the uptime of a window.

    Attributes:
        observed: The window without excluded time, in microseconds.
        downtime: Weighted downtime within the observed time, in tenths of microseconds.
        excluded: The time that excluded periods cover, in microseconds. Overlaps count once.
        shares: The share of each period, by start. Their `downtime` adds up to the window's.
    """

    observed: int
    downtime: int
    excluded: int
    shares: Sequence[PeriodShare]

    @property
    def uptime(self) -> float:
        """The uptime in percent; see `uptime`."""
        return percentage(self.observed, self.downtime)


def percentage(observed: int, downtime: int) -> float:
    """Return `100 * (1 - downtime / observed)` floored to two decimals; 100.0 if nothing was observed.

    Args:
        observed: Microseconds.
        downtime: Tenths of microseconds.
    """
    if observed == 0:
        return 100.0
    return (10_000 * (10 * observed - downtime) // (10 * observed)) / 100


def uptime(periods: Iterable[Period], start: datetime, end: datetime) -> float:
    """Return the percentage of `[start, end)` that was uptime, floored to two decimals.

    Let O be the observed time, which is the window without excluded periods, and w the weight of the worst period at
    each moment of O. Then uptime is `100 * (1 - sum(w dt) / O)`. The weights are Statuspage's ("Display historical
    uptime of components"): a major outage counts in full, a partial outage 30 %, degraded performance and maintenance
    nothing. Overlaps count once. Whole microseconds make it exact: 100.0 means no downtime at all. Without observed
    time the result is 100.0.

    Args:
        periods: Periods of one service, in any order. Parts outside the window are ignored.
        start: Start of the window, or of the service if that is later.
        end: End of the window.

    Returns:
        0.0 to 100.0.
    """
    return compute_uptime(periods, start, end).uptime


def compute_uptime(periods: Iterable[Period], start: datetime, end: datetime) -> UptimeResult:
    """Return the parts that `uptime` is computed from.

    One sweep visits each start and end; a heap has the most severe current period on top. So thousands of simultaneous
    periods take no longer than thousands of consecutive ones.
    """
    if start >= end:
        return UptimeResult(0, 0, 0, ())
    inside = sorted(
        (p for p in periods if p.start < end and p.end > start and p.start < p.end),
        key=lambda p: (p.start, p.kind, p.source_id),
    )
    begins = [max(0, (p.start - start) // _MICROSECOND) for p in inside]
    stops = [(min(p.end, end) - start) // _MICROSECOND for p in inside]
    # A turn is a period's index at its start, and that index minus the count (below 0) at its end.
    count = len(inside)
    turns = sorted([*zip(begins, range(count), strict=True), *zip(stops, range(-count, 0), strict=True)])
    observed = downtime = excluded = excluding = at = 0
    excluded_shares, effective = [0] * count, [0] * count
    # (-level, index) of current periods. One that has ended is removed when it reaches the top.
    worst: list[tuple[int, int]] = []
    for moment, turn in (*turns, ((end - start) // _MICROSECOND, None)):
        length, at = moment - at, moment
        if excluding:
            excluded += length
        elif length:
            observed += length
            while worst and stops[worst[0][1]] < moment:
                heappop(worst)
            if worst:
                effective[worst[0][1]] += length
                downtime += length * _WEIGHT_TENTHS.get(-worst[0][0], 0)
        if turn is None:
            break
        period = inside[turn]
        if turn >= 0:
            excluding += period.is_excluded
            excluded_shares[turn] -= excluded
            if not period.is_excluded:
                heappush(worst, (-period.level, turn))
        else:
            excluding -= period.is_excluded
            excluded_shares[turn] += excluded
    shares = [
        PeriodShare(p, stop - begin, *rest)
        for p, begin, stop, *rest in zip(inside, begins, stops, excluded_shares, effective, strict=True)
    ]
    return UptimeResult(observed, downtime, excluded, shares)


def compute_daily_uptime(
    periods: Iterable[Period], since: datetime, now: datetime, days: int
) -> list[tuple[date, UptimeResult]]:
    """Return the result of each of the last `days` days in UTC, oldest first. The last day ends at `now`.

    Args:
        periods: As for `uptime`.
        since: Start of the service. Time before it is not observed.
        now: The present time.
        days: The number of days, including today.
    """
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    first = midnight - (days - 1) * _DAY
    touching: list[list[Period]] = [[] for _ in range(days)]
    for period in periods:
        for number in range(max(0, (period.start - first) // _DAY), min(days - 1, (period.end - first) // _DAY) + 1):
            touching[number].append(period)
    begins = [first + number * _DAY for number in range(days)]
    return [
        (begin.date(), compute_uptime(some, max(since, begin), min(begin + _DAY, now)))
        for begin, some in zip(begins, touching, strict=True)
    ]

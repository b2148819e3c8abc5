"""How severities become a service's status, and periods of trouble become an uptime percentage."""

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from heapq import heappop, heappush
from typing import NamedTuple

from opsentry.domain import incident
from opsentry.domain.incident import SEVERITIES

LEVELS = {severity: level for level, severity in enumerate(SEVERITIES)}

# Tenths of downtime for each level: a major outage counts in full, a partial one three tenths, the rest nothing.
# A critical incident is shown as a major outage and weighs like one.
_WEIGHTS = {LEVELS["partial_outage"]: 3, LEVELS["major_outage"]: 10, LEVELS["critical"]: 10}

_DAY = timedelta(days=1)
_MICROSECOND = timedelta(microseconds=1)

_STATUSES = ("operational", "degraded_performance", "partial_outage", "major_outage", "major_outage")


def service_status(levels: Iterable[int], *, maintenance: bool) -> str:
    """Return a service's status: what the worst of its open incidents makes of it.

    Args:
        levels: Indices of the severities of the open incidents that touch it.
        maintenance: Whether a window that touches it is active; shown where nothing is worse than operational.
    """
    status = _STATUSES[max(levels, default=0)]
    return "under_maintenance" if maintenance and status == "operational" else status


class Period(NamedTuple):
    """A half-open stretch of time, `[start, end)`, in which something touched a service.

    `level` is the index of a severity. `excluded` marks a maintenance window that is excluded_time out of the result.
    `kind` and `source_id` name the incident or window.
    """

    start: datetime
    end: datetime
    level: int
    excluded: bool
    kind: str = incident.KIND
    source_id: int = 0


class PeriodShare(NamedTuple):
    """What came of a period within a window; lengths are whole microseconds.

    Attributes:
        period: As it lasted, also outside of the window.
        inside: How long it lasted within the window.
        excluded_time: How much of that excluded windows took away.
        effective: How much of the rest it was the one that counts: of those at once the most severe, of equals
        the first.
    """

    period: Period
    inside: int
    excluded_time: int
    effective: int

    @property
    def weight(self) -> float:
        """Which part of the effective time is downtime."""
        return 0.0 if self.period.excluded else _WEIGHTS.get(self.period.level, 0) / 10

    @property
    def downtime(self) -> int:
        """Tenths of microseconds of downtime."""
        return 0 if self.period.excluded else self.effective * _WEIGHTS.get(self.period.level, 0)


class UptimeResult(NamedTuple):
    """What a window comes to.

    Attributes:
        observed: Microseconds of the window, less what is excluded_time.
        downtime: Tenths of microseconds of downtime in what was observed.
        excluded_time: Microseconds that excluded periods take out of the window, where they overlap once.
        shares: The part of each period, by their starts; their `downtime` adds up to that of the whole.
    """

    observed: int
    downtime: int
    excluded_time: int
    shares: Sequence[PeriodShare]

    @property
    def uptime(self) -> float:
        """See `uptime`."""
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

    With observed time O (the window less excluded periods) and, at each moment of O, the weight w of the worst
    period covering it: `100 * (1 - sum(w dt) / O)`. The weights are those that Statuspage publishes in its help page
    'Display historical uptime of components': major outages in full, partial outages at 30 %, degraded performance and
    maintenance not at all. Overlaps count once. It is computed in whole microseconds, so that 100.0 means that there
    was no downtime at all. No observed time at all gives 100.0.

    Args:
        periods: Periods of one service, in any order; parts outside of the window are ignored.
        start: Where the window begins, or the service if that is later.
        end: Where the window ends.

    Returns:
        0.0 to 100.0.
    """
    return compute_uptime(periods, start, end).uptime


def compute_uptime(periods: Iterable[Period], start: datetime, end: datetime) -> UptimeResult:
    """Return what `uptime` is made of.

    One sweep over the moments at which periods begin and end, the most severe of those under way on top of a heap:
    thousands that last at once take no longer than thousands that follow each other.
    """
    if start >= end:
        return UptimeResult(0, 0, 0, ())
    inside = sorted(
        (p for p in periods if p.start < end and p.end > start and p.start < p.end),
        key=lambda p: (p.start, p.kind, p.source_id),
    )
    begins = [max(0, (p.start - start) // _MICROSECOND) for p in inside]
    stops = [(min(p.end, end) - start) // _MICROSECOND for p in inside]
    # Periods by their number where they begin, and by the same one effective from the end, below 0, where they end.
    count = len(inside)
    turns = sorted([*zip(begins, range(count), strict=True), *zip(stops, range(-count, 0), strict=True)])
    observed = downtime = excluded_time = excluding = at = 0
    cuts, effective = [0] * count, [0] * count
    # (-level, number) of what is under way; what has ended goes when it comes to the top.
    worst: list[tuple[int, int]] = []
    for moment, turn in (*turns, ((end - start) // _MICROSECOND, None)):
        length, at = moment - at, moment
        if excluding:
            excluded_time += length
        elif length:
            observed += length
            while worst and stops[worst[0][1]] < moment:
                heappop(worst)
            if worst:
                effective[worst[0][1]] += length
                downtime += length * _WEIGHTS.get(-worst[0][0], 0)
        if turn is None:
            break
        period = inside[turn]
        if turn >= 0:
            excluding += period.excluded
            cuts[turn] -= excluded_time
            if not period.excluded:
                heappush(worst, (-period.level, turn))
        else:
            excluding -= period.excluded
            cuts[turn] += excluded_time
    shares = [
        PeriodShare(p, stop - begin, *rest)
        for p, begin, stop, *rest in zip(inside, begins, stops, cuts, effective, strict=True)
    ]
    return UptimeResult(observed, downtime, excluded_time, shares)


def compute_daily_uptime(
    periods: Iterable[Period], since: datetime, now: datetime, days: int
) -> list[tuple[date, UptimeResult]]:
    """Return the result of each of the last `days` days in UTC, the oldest first; the last one ends `now`.

    Args:
        periods: As for `uptime`.
        since: When the service began: what lies before it is not observed.
        now: The moment.
        days: How many, today included.
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

"""How severities become a service's status, and periods of trouble become an uptime percentage."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

from opsentry.domain.incident import SEVERITIES

LEVELS = {severity: level for level, severity in enumerate(SEVERITIES)}

# Tenths of downtime for each level: a major outage counts in full, a partial one three tenths, the rest nothing.
# A critical incident is shown as a major outage and weighs like one.
_WEIGHTS = {LEVELS["partial_outage"]: 3, LEVELS["major_outage"]: 10, LEVELS["critical"]: 10}


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

    `level` is the index of a severity. `excluded` marks a maintenance window that is cut out of the reckoning.
    """

    start: datetime
    end: datetime
    level: int
    excluded: bool


def uptime(periods: Iterable[Period], start: datetime, end: datetime) -> float:
    """Return the percentage of `[start, end)` that was uptime, floored to two decimals.

    With observed time O (the window less excluded periods) and, at each moment of O, the weight w of the worst
    period covering it: `100 * (1 - sum(w dt) / O)`. The weights are those of Statuspage's published definition
    (major outages in full, partial outages at 30 %). Overlaps count once. It is computed in whole microseconds, so
    that 100.0 means that there was no downtime at all. No observed time at all gives 100.0.

    Args:
        periods: Periods of one service, in any order; parts outside of the window are ignored.
        start: Where the window begins, or the service if that is later.
        end: Where the window ends.

    Returns:
        0.0 to 100.0.
    """
    observed, lost = _measure(periods, start, end)
    if observed == 0:
        return 100.0
    return (10_000 * (10 * observed - lost) // (10 * observed)) / 100


def _measure(periods: Iterable[Period], start: datetime, end: datetime) -> tuple[int, int]:
    """Return (observed microseconds, lost tenths of microseconds)."""
    inside = [
        Period(max(p.start, start), min(p.end, end), p.level, p.excluded)
        for p in periods
        if p.start < end and p.end > start and p.start < p.end
    ]
    cuts = sorted({start, end, *(p.start for p in inside), *(p.end for p in inside)}) if start < end else []
    observed = lost = 0
    for left, right, active in _slices(cuts, inside):
        if any(p.excluded for p in active):
            continue
        length = (right - left) // timedelta(microseconds=1)
        observed += length
        lost += length * max((_WEIGHTS.get(p.level, 0) for p in active), default=0)
    return observed, lost


def _slices(
    cuts: Sequence[datetime], periods: Iterable[Period]
) -> Iterable[tuple[datetime, datetime, Sequence[Period]]]:
    """Yield (left, right, periods covering it) between neighbouring cuts, in time order."""
    waiting = sorted(periods, key=lambda p: p.start, reverse=True)
    active: list[Period] = []
    for left, right in pairwise(cuts):
        active = [p for p in active if p.end > left]
        while waiting and waiting[-1].start <= left:
            active.append(waiting.pop())
        yield left, right, active

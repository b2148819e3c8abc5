"""How severities become a service's status, and periods of trouble become an uptime percentage."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

from opsentry.domain import incident
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
    `kind` and `source_id` name the incident or window.
    """

    start: datetime
    end: datetime
    level: int
    excluded: bool
    kind: str = incident.KIND
    source_id: int = 0


class Share(NamedTuple):
    """What came of a period within a window; lengths are whole microseconds.

    Attributes:
        period: As it lasted, also outside of the window.
        inside: How long it lasted within the window.
        cut: How much of that excluded windows took away.
        counted: How much of the rest it was the one that counts: of those at once the heaviest, of equals the first.
    """

    period: Period
    inside: int
    cut: int
    counted: int

    @property
    def weight(self) -> float:
        """Which part of the counted time is downtime."""
        return 0.0 if self.period.excluded else _WEIGHTS.get(self.period.level, 0) / 10

    @property
    def lost(self) -> int:
        """Tenths of microseconds of downtime."""
        return 0 if self.period.excluded else self.counted * _WEIGHTS.get(self.period.level, 0)


class Reckoning(NamedTuple):
    """What a window comes to: observed microseconds, lost tenths of microseconds, and the part of each period in it."""

    observed: int
    lost: int
    shares: Sequence[Share]

    @property
    def uptime(self) -> float:
        """See `uptime`."""
        return percentage(self.observed, self.lost)


def percentage(observed: int, lost: int) -> float:
    """Return `100 * (1 - lost / observed)` floored to two decimals; 100.0 if nothing was observed.

    Args:
        observed: Microseconds.
        lost: Tenths of microseconds.
    """
    if observed == 0:
        return 100.0
    return (10_000 * (10 * observed - lost) // (10 * observed)) / 100


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
    return reckon(periods, start, end).uptime


def reckon(periods: Iterable[Period], start: datetime, end: datetime) -> Reckoning:
    """Return what `uptime` is made of; the `lost` of the shares, which come by their starts, add up to the whole's."""
    inside = sorted(
        (p for p in periods if p.start < end and p.end > start and p.start < p.end),
        key=lambda p: (p.start, p.kind, p.source_id),
    )
    clipped = [p._replace(start=max(p.start, start), end=min(p.end, end)) for p in inside]
    cuts = sorted({start, end, *(p.start for p in clipped), *(p.end for p in clipped)}) if start < end else []
    observed = lost = 0
    cut, counted = [0] * len(inside), [0] * len(inside)
    for left, right, active in _slices(cuts, clipped):
        length = (right - left) // timedelta(microseconds=1)
        if any(clipped[i].excluded for i in active):
            for i in active:
                cut[i] += length
            continue
        observed += length
        if active:
            worst = max(active, key=lambda i: (_WEIGHTS.get(clipped[i].level, 0), clipped[i].level, -i))
            counted[worst] += length
            lost += length * _WEIGHTS.get(clipped[worst].level, 0)
    shares = [
        Share(p, (c.end - c.start) // timedelta(microseconds=1), cut[i], counted[i])
        for i, (p, c) in enumerate(zip(inside, clipped, strict=True))
    ]
    return Reckoning(observed, lost, shares)


def _slices(cuts: Sequence[datetime], periods: Sequence[Period]) -> Iterable[tuple[datetime, datetime, Sequence[int]]]:
    """Yield (left, right, indices of periods covering it) between neighbouring cuts, in time order."""
    waiting = sorted(range(len(periods)), key=lambda i: periods[i].start, reverse=True)
    active: list[int] = []
    for left, right in pairwise(cuts):
        active = [i for i in active if periods[i].end > left]
        while waiting and periods[waiting[-1]].start <= left:
            active.append(waiting.pop())
        yield left, right, active

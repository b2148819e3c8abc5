from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsentry.domain.uptime import LEVELS, Period, compute_daily_uptime, compute_uptime, uptime

ZERO = datetime(2026, 1, 1, tzinfo=UTC)
WINDOW = 300
TENTHS = {0: 0, 1: 0, 2: 3, 3: 10, 4: 10}


def at(second: float) -> datetime:
    return ZERO + timedelta(seconds=second)


def period(start: float, end: float, severity: str = "major_outage", *, excluded: bool = False) -> Period:
    return Period(at(start), at(end), LEVELS[severity], excluded)


@pytest.mark.parametrize(
    ("periods", "expected"),
    [
        ([], 100.0),
        ([period(0, 100)], 0.0),
        ([period(10, 20)], 90.0),
        ([period(10, 20, "critical")], 90.0),
        ([period(10, 20, "partial_outage")], 97.0),
        ([period(10, 20, "degraded"), period(30, 40, "informational")], 100.0),
        ([period(10, 20), period(15, 25)], 85.0),  # an overlap counts once
        ([period(10, 30, "partial_outage"), period(10, 20)], 87.0),  # at the worst
        ([period(-50, 10), period(90, 500)], 80.0),  # only what lies inside
        ([period(10, 20), period(10, 20, "informational", excluded=True)], 100.0),  # cut from both sides
        ([period(0, 20), period(0, 50, "informational", excluded=True), period(60, 70)], 80.0),
        ([period(0, 100, "informational", excluded=True)], 100.0),  # nothing observed
        ([period(20, 20)], 100.0),
    ],
)
def test_uptime_of_a_hundred_seconds(periods, expected):
    assert uptime(periods, at(0), at(100)) == expected


def test_a_hundred_percent_means_no_downtime_at_all():
    blip = Period(at(5), at(5) + timedelta(microseconds=1), LEVELS["partial_outage"], is_excluded=False)
    assert uptime([blip], at(0), at(30 * 86_400)) == 99.99


def test_an_empty_window_has_no_downtime():
    assert uptime([period(0, 100)], at(50), at(50)) == 100.0


def naive(periods: list[Period]) -> float:
    """Compute the same second by second."""
    observed = lost = 0
    for second in range(WINDOW):
        covering = [p for p in periods if p.start <= at(second) < p.end]
        if any(p.is_excluded for p in covering):
            continue
        observed += 1
        lost += max((TENTHS[p.level] for p in covering), default=0)
    return 100.0 if not observed else (10_000 * (10 * observed - lost) // (10 * observed)) / 100


@st.composite
def some_period(draw: st.DrawFn) -> Period:
    start = draw(st.integers(-60, WINDOW + 60))
    end = start + draw(st.integers(0, 200))
    return Period(at(start), at(end), draw(st.integers(0, 4)), draw(st.booleans()))


@given(st.lists(some_period(), max_size=12))
def test_uptime_equals_a_second_by_second_count(periods):
    assert uptime(periods, at(0), at(WINDOW)) == naive(periods)


@given(st.lists(some_period(), max_size=12))
def test_shares_add_up_and_equal_a_second_by_second_count(periods):
    found = compute_uptime(periods, at(0), at(WINDOW))
    assert sum(share.downtime for share in found.shares) == found.downtime
    assert found.observed + found.excluded == WINDOW * 1_000_000
    assert found.uptime == uptime(periods, at(0), at(WINDOW))
    assert [share.period.start for share in found.shares] == sorted(share.period.start for share in found.shares)
    named = [p._replace(source_id=number) for number, p in enumerate(periods)]
    for share in compute_uptime(named, at(0), at(WINDOW)).shares:
        seconds = [s for s in range(WINDOW) if share.period.start <= at(s) < share.period.end]
        cut = [s for s in seconds if any(p.is_excluded and p.start <= at(s) < p.end for p in named)]
        assert (share.inside, share.excluded) == (len(seconds) * 1_000_000, len(cut) * 1_000_000)
        assert share.effective <= share.inside - share.excluded
        heaviest = [
            s
            for s in sorted(set(seconds) - set(cut))
            if TENTHS[share.period.level] > max(
                (TENTHS[p.level] for p in named if p != share.period and p.start <= at(s) < p.end), default=-1
            )
        ]  # fmt: skip
        assert share.effective >= len(heaviest) * 1_000_000
        assert share.downtime == share.effective * TENTHS[share.period.level] * (not share.period.is_excluded)


def test_the_heavier_of_two_overlapping_periods_counts_or_else_the_first():
    light, heavy = period(0, 60, "partial_outage"), period(20, 40)
    again = period(30, 80)
    shares = {
        share.period: share.effective // 1_000_000
        for share in compute_uptime([again, light, heavy], at(0), at(100)).shares
    }
    assert shares == {light: 20, heavy: 20, again: 40}


def test_the_more_severe_of_two_equally_heavy_periods_counts():
    shares = compute_uptime([period(0, 10), period(0, 10, "critical"), period(0, 10, "degraded")], at(0), at(10)).shares
    assert [share.effective // 1_000_000 for share in shares] == [0, 10, 0]


@pytest.mark.parametrize("window", [(50, 50), (60, 50), (50, 20)])
def test_a_window_that_ends_before_it_begins_is_empty(window):
    assert compute_uptime([period(0, 100)], *map(at, window)) == (0, 0, 0, ())


def test_simultaneous_periods_take_no_longer_than_consecutive_ones():
    many = [period(second, 20_000, "partial_outage")._replace(source_id=second) for second in range(10_000)]
    found = compute_uptime(many, at(0), at(20_000))
    assert (found.uptime, [share.effective for share in found.shares[:2]]) == (70.0, [20_000 * 1_000_000, 0])


HOUR = timedelta(hours=1)
NOON = datetime(2024, 3, 2, 12, 30, tzinfo=UTC)


def test_daily_uptime_includes_the_leap_day():
    down = Period(
        datetime(2024, 2, 29, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC), LEVELS["critical"], is_excluded=False
    )
    bars = compute_daily_uptime([down], datetime(2020, 1, 1, tzinfo=UTC), NOON, 5)
    assert [(day.isoformat(), found.observed // 3_600_000_000, found.uptime) for day, found in bars] == [
        ("2024-02-27", 24, 100.0),
        ("2024-02-28", 24, 100.0),
        ("2024-02-29", 24, 0.0),
        ("2024-03-01", 24, 100.0),
        ("2024-03-02", 12, 100.0),
    ]
    days = [day.isoformat() for day, _ in compute_daily_uptime([], NOON, datetime(2023, 3, 1, tzinfo=UTC), 3)]
    assert days == ["2023-02-27", "2023-02-28", "2023-03-01"]


@pytest.mark.parametrize(("month", "day"), [(3, 30), (10, 26)])
def test_daily_uptime_uses_days_in_utc_in_any_time_zone(month, day):
    change = datetime(2025, month, day, 1, tzinfo=UTC)  # of Berlin's clocks
    now = (change + timedelta(days=2)).astimezone(timezone(2 * HOUR))
    bars = compute_daily_uptime([], change - timedelta(days=9), now, 4)
    assert [found.observed // 3_600_000_000 for _, found in bars] == [24, 24, 24, 1]
    assert bars[1][0] == change.date()


@given(
    st.lists(st.tuples(st.integers(-30, 150), st.integers(0, 90), st.integers(0, 4), st.booleans()), max_size=8),
    st.integers(-30, 150),
    st.integers(0, 23),
)
def test_daily_uptime_equals_an_hour_by_hour_count(drawn, since, hour):
    begin = datetime(2024, 2, 27, tzinfo=UTC)
    made = [Period(begin + s * HOUR, begin + (s + n) * HOUR, level, excluded) for s, n, level, excluded in drawn]
    now = begin + timedelta(days=4, hours=hour)
    bars = compute_daily_uptime(made, begin + since * HOUR, now, 5)
    assert [day.day for day, _ in bars] == [27, 28, 29, 1, 2]
    for day, found in bars:
        observed = lost = 0
        for number in range(24):
            moment = datetime(day.year, day.month, day.day, number, tzinfo=UTC)
            over = [p for p in made if p.start <= moment < p.end]
            if begin + since * HOUR <= moment < now and not any(p.is_excluded for p in over):
                observed += 1
                lost += max((TENTHS[p.level] for p in over), default=0)
        assert (found.observed, found.downtime) == (observed * 3_600_000_000, lost * 3_600_000_000)

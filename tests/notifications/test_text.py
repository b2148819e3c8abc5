import pytest

from opsentry.domain import incident, maintenance
from opsentry.notifications.messages import text
from tests.notifications import messages


def test_every_status_and_severity_has_a_label():
    assert set(text.STATUS_LABELS) == {*incident.STATUSES, *maintenance.STATUSES}
    assert tuple(text.SEVERITY_LABELS) == incident.SEVERITIES


def test_severity_choices_cover_all_severities_in_order():
    assert text.severity_choices() == [
        ("informational", "All incidents"),
        ("degraded", "Degraded performance or worse"),
        ("partial_outage", "Partial outage or worse"),
        ("major_outage", "Major outage or worse"),
        ("critical", "Critical only"),
    ]


@pytest.mark.parametrize("timestamp", ["2026-03-01T12:30:59.999999Z", "2026-03-01T14:30:00+02:00"])
def test_times_are_in_utc_to_the_minute(timestamp):
    assert text.utc(timestamp) == "2026-03-01 12:30 UTC"


@pytest.mark.parametrize(
    ("status", "severity", "expected"),
    [
        ("investigating", "critical", "bad"),
        ("monitoring", "degraded", "warning"),
        ("resolved", "critical", "good"),
    ],
)
def test_only_good_news_has_the_good_tone(status, severity, expected):
    sent = messages.message(messages.incident(status=status, severity=severity))
    assert text.tone(sent) == expected

from typing import Any

import msgspec
import pytest

from opsentry.domain import incident as domain
from opsentry.domain.incident import IncidentOpened, IncidentReopened, IncidentResolved, IncidentStatusChanged
from opsentry.importing.statuspage import IncidentRecord
from opsentry.importing.translation import incident_events
from tests.importing.pages import NOON, at, incident, recorded, timeline, update


def record(*updates, **fields):
    return msgspec.convert(incident("i1", *updates, **fields), IncidentRecord)


def state_after(events) -> Any:
    return domain.DECIDER.fold(event for event, _ in events)


def added_by(first, second):
    """Return the events that a second import adds to those of the first."""
    history = recorded(incident_events(first, ()), domain.KIND)
    return timeline(incident_events(second, (), history))


def test_updates_become_events_with_their_own_times():
    events = incident_events(
        record(
            update("a", "investigating", 1, "A"),
            update("b", "identified", 2, "B"),
            update("c", "monitoring", 3, "C"),
            update("d", "resolved", 4, "D"),
        ),
        (7,),
    )
    assert timeline(events) == [
        ("incident.opened", 0),
        ("incident.updated A", 1),
        ("incident.status_changed identified", 2),
        ("incident.updated B", 2),
        ("incident.status_changed monitoring", 3),
        ("incident.updated C", 3),
        ("incident.resolved", 4),
        ("incident.updated D", 4),
    ]
    opened = events[0][0]
    assert isinstance(opened, IncidentOpened)
    assert (opened.title, opened.service_ids, opened.visibility, opened.source) == ("Incident i1", (7,), "public", "i1")


def test_an_incident_opens_at_its_earliest_time_in_the_file():
    assert timeline(incident_events(record(started_at=at(-5)), ()))[0] == ("incident.opened", -5)
    assert timeline(incident_events(record(started_at=at(5)), ()))[0] == ("incident.opened", 0)
    assert timeline(incident_events(record(update("a", "investigating", -9)), ()))[0] == ("incident.opened", -9)


def test_the_displayed_time_wins_over_the_time_of_creation():
    shown = update("a", "investigating", 30, "A") | {"display_at": at(3)}
    assert timeline(incident_events(record(shown), ()))[1] == ("incident.updated A", 3)


def test_updates_are_sorted_by_time():
    events = incident_events(
        record(update("b", "investigating", 5, "later"), update("a", "investigating", 2, "sooner")), ()
    )
    assert [name for name, _ in timeline(events)] == [
        "incident.opened",
        "incident.updated sooner",
        "incident.updated later",
    ]


def test_updates_of_equal_time_keep_the_order_of_writing():
    events = incident_events(
        record(
            update("a", "investigating", 3, "first"),
            update("b", "investigating", 3, "second"),
            update("c", "resolved", 3, "third"),
        ),
        (),
    )
    assert [name for name, _ in timeline(events)] == [
        "incident.opened",
        "incident.updated first",
        "incident.updated second",
        "incident.resolved",
        "incident.updated third",
    ]


@pytest.mark.parametrize(
    ("impact", "severity"),
    [
        ("none", "informational"),
        ("minor", "degraded"),
        ("major", "partial_outage"),
        ("critical", "major_outage"),
        ("maintenance", "informational"),
    ],
)
def test_impact_becomes_severity(impact, severity):
    ((opened, _),) = incident_events(record(impact=impact), ())
    assert isinstance(opened, IncidentOpened)
    assert opened.severity == severity


def test_a_postmortem_keeps_the_incident_resolved():
    events = incident_events(
        record(update("a", "resolved", 1, "over"), update("b", "postmortem", 99, "why"), resolved_at=at(1)), ()
    )
    assert timeline(events) == [
        ("incident.opened", 0),
        ("incident.resolved", 1),
        ("incident.updated over", 1),
        ("incident.updated why", 99),
    ]


@pytest.mark.parametrize("status", ["identified", "monitoring"])
def test_an_update_after_the_resolution_reopens_first(status):
    events = incident_events(record(update("a", "resolved", 1, "over"), update("b", status, 2, "not over")), ())
    assert timeline(events)[3:] == [
        ("incident.reopened", 2),
        (f"incident.status_changed {status}", 2),
        ("incident.updated not over", 2),
    ]


def test_investigating_after_the_resolution_is_only_a_reopening():
    events = incident_events(record(update("a", "resolved", 1, "over"), update("b", "investigating", 2, "again")), ())
    assert timeline(events)[3:] == [("incident.reopened", 2), ("incident.updated again", 2)]


def test_a_resolution_without_an_update_happens_at_resolved_at():
    events = incident_events(record(update("a", "monitoring", 3, "M"), status="resolved", resolved_at=at(8)), ())
    assert timeline(events)[-1] == ("incident.resolved", 8)


def test_a_reopened_incident_stays_open_despite_resolved_at():
    events = incident_events(
        record(update("a", "resolved", 3, "over"), update("b", "monitoring", 5, "not over"), resolved_at=at(3)), ()
    )
    assert state_after(events).status == "monitoring"


def test_every_status_is_reached_by_allowed_transitions():
    statuses = ("investigating", "identified", "monitoring", "resolved", "postmortem")
    for first in statuses:
        for second in statuses:
            events = incident_events(record(update("a", first, 1), update("b", second, 2)), ())
            for number, (event, _) in enumerate(events):
                state = state_after(events[:number])
                if isinstance(event, IncidentReopened):
                    assert state.status == "resolved"
                if isinstance(event, IncidentResolved):
                    assert state.status != "resolved"
                if isinstance(event, IncidentStatusChanged):
                    assert state.status not in {"resolved", event.status}
            assert state_after(events).status == ("resolved" if second == "postmortem" else second)


def test_an_update_without_text_only_changes_the_status():
    events = incident_events(record(update("a", "identified", 1, ""), update("b", "monitoring", 2, None)), ())
    assert timeline(events) == [
        ("incident.opened", 0),
        ("incident.status_changed identified", 1),
        ("incident.status_changed monitoring", 2),
    ]


def test_the_same_record_adds_no_event():
    records = [
        record(),
        record(update("a", "investigating", 1), update("b", "resolved", 2)),
        record(update("a", "identified", 1, ""), update("b", "resolved", 2, "over")),
        record(update("a", "identified", 1, "A"), update("b", "resolved", 1, " ")),
        record(update("a", "investigating", 1, " "), update("b", "resolved", 2, "over")),
        record(update("a", "monitoring", 1, "M"), status="resolved", resolved_at=at(4)),
        record(update("a", "resolved", 1, "over"), update("b", "monitoring", 2, ""), update("c", "resolved", 3, "")),
    ]
    for one in records:
        assert added_by(one, one) == []


def test_a_later_record_adds_only_new_updates():
    first = record(update("a", "investigating", 1, "A"), update("b", "identified", 2, ""))
    second = record(
        update("a", "investigating", 1, "A"),
        update("b", "identified", 2, ""),
        update("c", "monitoring", 3, ""),
        update("d", "resolved", 4, "over"),
    )
    assert added_by(first, second) == [
        ("incident.status_changed monitoring", 3),
        ("incident.resolved", 4),
        ("incident.updated over", 4),
    ]


def test_an_inserted_update_keeps_the_incident_resolved():
    first = record(update("a", "investigating", 1, "A"), update("c", "resolved", 4, "over"))
    second = record(
        update("a", "investigating", 1, "A"), update("b", "monitoring", 2, "B"), update("c", "resolved", 4, "over")
    )
    added = added_by(first, second)
    assert ("incident.updated B", 2) in added
    assert added[-1][0] == "incident.resolved"


def test_a_reopening_by_people_is_kept():
    one = record(update("a", "resolved", 1, "over"), resolved_at=at(2))
    history = recorded(incident_events(one, ()), domain.KIND)
    history += recorded([(IncidentReopened(), NOON)], domain.KIND, by="token")
    assert incident_events(one, (), history) == []

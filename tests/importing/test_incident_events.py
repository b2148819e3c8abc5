from typing import Any

import msgspec
import pytest

from opsentry.domain import incident as domain
from opsentry.domain.incident import IncidentOpened, IncidentReopened, IncidentResolved, IncidentStatusChanged
from opsentry.importing.statuspage import IncidentRecord
from opsentry.importing.translation import incident_events
from tests.importing.pages import NOON, at, incident, recorded, told, update


def record(*updates, **fields):
    return msgspec.convert(incident("i1", *updates, **fields), IncidentRecord)


def fold(events) -> Any:
    return domain.DECIDER.fold(event for event, _ in events)


def again(first, second):
    """What a second file adds to what the first one brought."""
    history = recorded(incident_events(first, ()), domain.KIND)
    return told(incident_events(second, (), history))


def test_entries_become_events_with_their_own_times():
    events = incident_events(
        record(
            update("a", "investigating", 1, "A"),
            update("b", "identified", 2, "B"),
            update("c", "monitoring", 3, "C"),
            update("d", "resolved", 4, "D"),
        ),
        (7,),
    )
    assert told(events) == [
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


def test_an_incident_begins_at_the_earliest_time_that_the_file_knows():
    assert told(incident_events(record(started_at=at(-5)), ()))[0] == ("incident.opened", -5)
    assert told(incident_events(record(started_at=at(5)), ()))[0] == ("incident.opened", 0)
    assert told(incident_events(record(update("a", "investigating", -9)), ()))[0] == ("incident.opened", -9)


def test_the_time_that_readers_saw_counts_where_there_is_one():
    shown = update("a", "investigating", 30, "A") | {"display_at": at(3)}
    assert told(incident_events(record(shown), ()))[1] == ("incident.updated A", 3)


def test_entries_are_put_in_order_of_time_whatever_the_file_says():
    events = incident_events(
        record(update("b", "investigating", 5, "later"), update("a", "investigating", 2, "sooner")), ()
    )
    assert [name for name, _ in told(events)] == [
        "incident.opened",
        "incident.updated sooner",
        "incident.updated later",
    ]


def test_entries_of_one_moment_keep_the_order_in_which_they_were_written():
    events = incident_events(
        record(
            update("a", "investigating", 3, "first"),
            update("b", "investigating", 3, "second"),
            update("c", "resolved", 3, "third"),
        ),
        (),
    )
    assert [name for name, _ in told(events)] == [
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


def test_a_postmortem_leaves_it_resolved():
    events = incident_events(
        record(update("a", "resolved", 1, "over"), update("b", "postmortem", 99, "why"), resolved_at=at(1)), ()
    )
    assert told(events) == [
        ("incident.opened", 0),
        ("incident.resolved", 1),
        ("incident.updated over", 1),
        ("incident.updated why", 99),
    ]


@pytest.mark.parametrize("status", ["identified", "monitoring"])
def test_what_goes_on_after_it_was_resolved_is_a_reopening_first(status):
    events = incident_events(record(update("a", "resolved", 1, "over"), update("b", status, 2, "not over")), ())
    assert told(events)[3:] == [
        ("incident.reopened", 2),
        (f"incident.status_changed {status}", 2),
        ("incident.updated not over", 2),
    ]


def test_investigating_after_it_was_resolved_is_a_reopening_and_nothing_else():
    events = incident_events(record(update("a", "resolved", 1, "over"), update("b", "investigating", 2, "again")), ())
    assert told(events)[3:] == [("incident.reopened", 2), ("incident.updated again", 2)]


def test_an_incident_that_is_resolved_without_saying_so_is_resolved_when_the_file_says():
    events = incident_events(record(update("a", "monitoring", 3, "M"), status="resolved", resolved_at=at(8)), ())
    assert told(events)[-1] == ("incident.resolved", 8)


def test_one_that_was_reopened_stays_open_although_it_was_resolved_once():
    events = incident_events(
        record(update("a", "resolved", 3, "over"), update("b", "monitoring", 5, "not over"), resolved_at=at(3)), ()
    )
    assert fold(events).status == "monitoring"


def test_every_state_of_a_file_is_reached_by_moves_that_the_domain_allows():
    statuses = ("investigating", "identified", "monitoring", "resolved", "postmortem")
    for first in statuses:
        for second in statuses:
            events = incident_events(record(update("a", first, 1), update("b", second, 2)), ())
            for number, (event, _) in enumerate(events):
                state = fold(events[:number])
                if isinstance(event, IncidentReopened):
                    assert state.status == "resolved"
                if isinstance(event, IncidentResolved):
                    assert state.status != "resolved"
                if isinstance(event, IncidentStatusChanged):
                    assert state.status not in {"resolved", event.status}
            assert fold(events).status == ("resolved" if second == "postmortem" else second)


def test_what_has_no_text_moves_it_and_says_nothing():
    events = incident_events(record(update("a", "identified", 1, ""), update("b", "monitoring", 2, None)), ())
    assert told(events) == [
        ("incident.opened", 0),
        ("incident.status_changed identified", 1),
        ("incident.status_changed monitoring", 2),
    ]


def test_the_same_record_adds_nothing():
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
        assert again(one, one) == []


def test_a_later_record_adds_the_new_entries_only():
    first = record(update("a", "investigating", 1, "A"), update("b", "identified", 2, ""))
    second = record(
        update("a", "investigating", 1, "A"),
        update("b", "identified", 2, ""),
        update("c", "monitoring", 3, ""),
        update("d", "resolved", 4, "over"),
    )
    assert again(first, second) == [
        ("incident.status_changed monitoring", 3),
        ("incident.resolved", 4),
        ("incident.updated over", 4),
    ]


def test_an_entry_that_was_put_in_between_later_leaves_it_resolved():
    first = record(update("a", "investigating", 1, "A"), update("c", "resolved", 4, "over"))
    second = record(
        update("a", "investigating", 1, "A"), update("b", "monitoring", 2, "B"), update("c", "resolved", 4, "over")
    )
    added = again(first, second)
    assert ("incident.updated B", 2) in added
    assert added[-1][0] == "incident.resolved"


def test_what_people_did_to_it_since_is_left_alone():
    one = record(update("a", "resolved", 1, "over"), resolved_at=at(2))
    history = recorded(incident_events(one, ()), domain.KIND)
    history += recorded([(IncidentReopened(), NOON)], domain.KIND, by="token")
    assert incident_events(one, (), history) == []

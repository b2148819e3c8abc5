import msgspec

from opsentry.domain import maintenance as domain
from opsentry.domain.maintenance import MaintenanceCancelled, MaintenanceScheduled
from opsentry.importing.statuspage import MaintenanceRecord
from opsentry.importing.translation import maintenance_events
from tests.importing.pages import NOON, at, recorded, timeline, update, window


def record(*updates, **fields):
    return msgspec.convert(window("m1", *updates, **fields), MaintenanceRecord)


def test_updates_become_events_with_their_own_times():
    events = maintenance_events(
        record(
            update("a", "scheduled", 1, "A"),
            update("b", "in_progress", 62, "B"),
            update("c", "verifying", 100, "C"),
            update("d", "completed", 118, "D"),
        ),
        (4, 5),
    )
    assert timeline(events) == [
        ("maintenance.scheduled", 0),
        ("maintenance.updated A", 1),
        ("maintenance.started", 62),
        ("maintenance.updated B", 62),
        ("maintenance.updated C", 100),
        ("maintenance.completed", 118),
        ("maintenance.updated D", 118),
    ]
    scheduled = events[0][0]
    assert isinstance(scheduled, MaintenanceScheduled)
    assert (scheduled.title, scheduled.service_ids, scheduled.source) == ("Window m1", (4, 5), "m1")
    assert (scheduled.scheduled_end - scheduled.scheduled_start).total_seconds() == 3600


def test_times_with_an_offset_are_converted_to_utc():
    events = maintenance_events(record(scheduled_for="2024-05-01T15:00:00+02:00"), ())
    scheduled = events[0][0]
    assert isinstance(scheduled, MaintenanceScheduled)
    assert scheduled.scheduled_start.isoformat() == "2024-05-01T13:00:00+00:00"


def test_a_completed_window_was_started_first():
    events = maintenance_events(record(update("a", "completed", 110, "done")), ())
    assert [name for name, _ in timeline(events)][1:3] == ["maintenance.started", "maintenance.completed"]


def test_a_completed_window_without_updates_happened_as_planned():
    assert timeline(maintenance_events(record(status="completed"), ())) == [
        ("maintenance.scheduled", 0),
        ("maintenance.started", 60),
        ("maintenance.completed", 120),
    ]


def test_an_upcoming_window_stays_scheduled():
    assert timeline(maintenance_events(record(update("a", "scheduled", 1, "soon")), ()))[1:] == [
        ("maintenance.updated soon", 1)
    ]


def test_updates_of_equal_time_keep_the_order_of_writing():
    updates = [update(name, "in_progress", 70, name) for name in ("first", "second", "third")]
    names = [name for name, _ in timeline(maintenance_events(record(*updates), ()))]
    assert names[2:] == ["maintenance.updated first", "maintenance.updated second", "maintenance.updated third"]


def test_the_same_record_adds_no_event():
    for one in (
        record(),
        record(status="completed"),
        record(update("a", "in_progress", 60, ""), update("b", "completed", 110, None)),
        record(update("a", "in_progress", 60, "A"), update("b", "completed", 110, "B")),
    ):
        history = recorded(maintenance_events(one, ()), domain.KIND)
        assert maintenance_events(one, (), history) == []


def test_a_later_record_adds_only_new_updates():
    history = recorded(maintenance_events(record(update("a", "scheduled", 1, "A")), ()), domain.KIND)
    later = record(update("a", "scheduled", 1, "A"), update("b", "in_progress", 61, "B"))
    assert timeline(maintenance_events(later, (), history)) == [
        ("maintenance.started", 61),
        ("maintenance.updated B", 61),
    ]


def test_a_window_cancelled_by_people_stays_cancelled():
    history = recorded(maintenance_events(record(), ()), domain.KIND)
    history += recorded([(MaintenanceCancelled(), NOON)], domain.KIND, by="token")
    later = record(update("b", "completed", 118, ""), resolved_at=at(118))
    assert maintenance_events(later, (), history) == []

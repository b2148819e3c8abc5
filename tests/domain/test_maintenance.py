from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from opsentry.domain.decider import IllegalTransition, InvalidField
from opsentry.domain.maintenance import (
    DECIDER,
    STATUSES,
    CancelMaintenance,
    ChangeMaintenance,
    CompleteMaintenance,
    MaintenanceCancelled,
    MaintenanceChanged,
    MaintenanceCompleted,
    MaintenanceEdited,
    MaintenanceReminded,
    MaintenanceRescheduled,
    MaintenanceScheduled,
    MaintenanceStarted,
    RemindMaintenance,
    ScheduleMaintenance,
    StartMaintenance,
)
from tests.domain.spec import given

START = datetime(2026, 6, 1, 2, tzinfo=UTC)
END = START + timedelta(hours=2)
SCHEDULED = MaintenanceScheduled(title="Drill", scheduled_start=START, scheduled_end=END, visibility="public")
HISTORIES = {
    "scheduled": (SCHEDULED,),
    "active": (SCHEDULED, MaintenanceStarted()),
    "completed": (SCHEDULED, MaintenanceStarted(), MaintenanceCompleted()),
    "cancelled": (SCHEDULED, MaintenanceCancelled()),
}
ALLOWED = {
    ("scheduled", StartMaintenance): MaintenanceStarted(),
    ("active", CompleteMaintenance): MaintenanceCompleted(),
    ("scheduled", CancelMaintenance): MaintenanceCancelled(),
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("action", [StartMaintenance, CompleteMaintenance, CancelMaintenance])
def test_every_action_from_every_status(status, action):
    attempt = given(DECIDER, *HISTORIES[status]).when(action())
    if (status, action) in ALLOWED:
        attempt.then(ALLOWED[status, action])
    else:
        attempt.refused(IllegalTransition, f"this one is {status}")


@pytest.mark.parametrize(
    "action", [StartMaintenance, CompleteMaintenance, CancelMaintenance, ChangeMaintenance, RemindMaintenance]
)
def test_commands_to_a_missing_window_are_refused(action):
    given(DECIDER).when(action()).refused(IllegalTransition, "does not exist")


def test_scheduling_keeps_every_field():
    command = ScheduleMaintenance(
        title="Drill",
        description="Read-only",
        scheduled_start=START,
        scheduled_end=END,
        visibility="internal",
        service_ids=(2, 1, 2),
        exclude_from_sla=True,
        suppress_alerts=True,
        auto_start=False,
        auto_complete=False,
    )
    given(DECIDER).when(command).then(
        MaintenanceScheduled(
            title="Drill",
            description="Read-only",
            scheduled_start=START,
            scheduled_end=END,
            visibility="internal",
            service_ids=(1, 2),
            exclude_from_sla=True,
            suppress_alerts=True,
            auto_start=False,
            auto_complete=False,
        )
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduled_end": START}, "scheduled_end: must be after scheduled_start"),
        ({"scheduled_end": START - timedelta(seconds=1)}, "scheduled_end: must be after scheduled_start"),
        ({"title": ""}, "title: must not be blank"),
        ({"description": "\x00"}, "description: must not contain"),
        ({"visibility": "x"}, "visibility: must be one of public, internal"),
    ],
)
def test_scheduling_with_an_invalid_field_names_the_field(change, message):
    good = ScheduleMaintenance(title="Drill", scheduled_start=START, scheduled_end=END)
    given(DECIDER).when(msgspec.structs.replace(good, **change)).refused(InvalidField, message)


@pytest.mark.parametrize(
    ("status", "auto", "due"),
    [
        ("scheduled", True, START),
        ("active", True, END),
        ("completed", True, None),
        ("cancelled", True, None),
        ("scheduled", False, None),
        ("active", False, None),
    ],
)
def test_due_at_is_the_next_automatic_transition(status, auto, due):
    scheduled = msgspec.structs.replace(SCHEDULED, auto_start=auto, auto_complete=auto)
    state = DECIDER.fold([scheduled, *HISTORIES[status][1:]])
    assert state is not None
    assert (state.status, state.due_at) == (status, due)


LATER = END + timedelta(hours=1)
CHANGES = {
    "title": MaintenanceEdited(title="Move"),
    "description": MaintenanceEdited(description="Words"),
    "scheduled_start": MaintenanceRescheduled(scheduled_start=START - timedelta(hours=1), scheduled_end=END),
    "scheduled_end": MaintenanceRescheduled(scheduled_start=START, scheduled_end=LATER),
    "visibility": MaintenanceChanged(visibility="internal"),
    "service_ids": MaintenanceChanged(service_ids=(1, 2)),
    "exclude_from_sla": MaintenanceChanged(exclude_from_sla=True),
    "suppress_alerts": MaintenanceChanged(suppress_alerts=True),
    "auto_start": MaintenanceChanged(auto_start=False),
    "auto_complete": MaintenanceChanged(auto_complete=False),
}
REDACTABLE_FIELDS = {"title", "description"}
MAY_CHANGE = {
    "scheduled": set(CHANGES),
    "active": {*REDACTABLE_FIELDS, "scheduled_end", "auto_complete"},
    "completed": REDACTABLE_FIELDS,
    "cancelled": REDACTABLE_FIELDS,
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("field", CHANGES)
def test_every_change_in_every_status(status, field):
    event = CHANGES[field]
    attempt = given(DECIDER, *HISTORIES[status]).when(ChangeMaintenance(**{field: getattr(event, field)}))
    if field in MAY_CHANGE[status]:
        attempt.then(event)
    else:
        attempt.refused(IllegalTransition, f"of a window that is {status}, {field} can no longer be changed")


@pytest.mark.parametrize("status", STATUSES)
def test_a_change_to_the_current_values_has_no_event(status):
    same = {name: getattr(SCHEDULED, name) for name in CHANGES}
    given(DECIDER, *HISTORIES[status]).when(ChangeMaintenance(**same)).then()
    given(DECIDER, *HISTORIES[status]).when(ChangeMaintenance()).then()


def test_texts_settings_and_times_change_in_separate_events():
    command = ChangeMaintenance(title="Move", service_ids=(2, 1, 2), auto_start=False, scheduled_end=LATER)
    given(DECIDER, SCHEDULED).when(command).then(
        MaintenanceEdited(title="Move"),
        MaintenanceChanged(service_ids=(1, 2), auto_start=False),
        MaintenanceRescheduled(scheduled_start=START, scheduled_end=LATER),
    )


def test_the_end_must_stay_after_the_start():
    for change in (
        ChangeMaintenance(scheduled_start=END),
        ChangeMaintenance(scheduled_end=START),
        ChangeMaintenance(scheduled_start=LATER),
    ):
        given(DECIDER, SCHEDULED).when(change).refused(InvalidField, "scheduled_end: must be after scheduled_start")
    both = MaintenanceRescheduled(scheduled_start=LATER, scheduled_end=LATER + timedelta(seconds=1))
    given(DECIDER, SCHEDULED).when(
        ChangeMaintenance(scheduled_start=both.scheduled_start, scheduled_end=both.scheduled_end)
    ).then(both)


def test_text_of_a_window_with_impossible_imported_times_can_be_changed():
    odd = msgspec.structs.replace(SCHEDULED, scheduled_end=START)
    given(DECIDER, odd).when(ChangeMaintenance(title="Move")).then(MaintenanceEdited(title="Move"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": ""}, "title: must not be blank"),
        ({"description": "\x00"}, "description: must not contain"),
        ({"visibility": "x"}, "visibility: must be one of public, internal"),
    ],
)
@pytest.mark.parametrize("status", STATUSES)
def test_changing_to_an_invalid_field_names_the_field(status, change, message):
    given(DECIDER, *HISTORIES[status]).when(ChangeMaintenance(**change)).refused(InvalidField, message)


def test_a_prolonged_window_is_completed_later():
    extended = MaintenanceRescheduled(scheduled_start=START, scheduled_end=LATER)
    state = DECIDER.fold([*HISTORIES["active"], extended])
    assert state is not None
    assert state.due_at == LATER
    state = DECIDER.fold([*HISTORIES["active"], MaintenanceChanged(auto_complete=False)])
    assert state is not None
    assert state.due_at is None


@pytest.mark.parametrize("status", STATUSES)
def test_only_a_scheduled_window_has_a_reminder(status):
    reminded = [MaintenanceReminded()] if status == "scheduled" else []
    given(DECIDER, *HISTORIES[status]).when(RemindMaintenance()).then(*reminded)


def test_a_window_has_one_reminder_per_start():
    given(DECIDER, SCHEDULED, MaintenanceReminded()).when(RemindMaintenance()).then()
    since = (MaintenanceEdited(title="T"), MaintenanceChanged(auto_start=False))
    given(DECIDER, SCHEDULED, MaintenanceReminded(), *since).when(RemindMaintenance()).then()
    moved = MaintenanceRescheduled(scheduled_start=START, scheduled_end=LATER)
    given(DECIDER, SCHEDULED, MaintenanceReminded(), moved).when(RemindMaintenance()).then(MaintenanceReminded())

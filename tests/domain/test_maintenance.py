from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from opsentry.domain.decider import InvalidField, TransitionRefused
from opsentry.domain.maintenance import (
    DECIDER,
    STATUSES,
    CancelMaintenance,
    CompleteMaintenance,
    MaintenanceCancelled,
    MaintenanceCompleted,
    MaintenanceScheduled,
    MaintenanceStarted,
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
        attempt.refused(TransitionRefused, f"this one is {status}")


@pytest.mark.parametrize("action", [StartMaintenance, CompleteMaintenance, CancelMaintenance])
def test_no_action_on_a_window_that_does_not_exist(action):
    given(DECIDER).when(action()).refused(TransitionRefused, "does not exist")


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
def test_scheduling_with_something_wrong_names_the_field(change, message):
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
def test_when_the_scheduler_has_to_move_a_window(status, auto, due):
    scheduled = msgspec.structs.replace(SCHEDULED, auto_start=auto, auto_complete=auto)
    state = DECIDER.fold([scheduled, *HISTORIES[status][1:]])
    assert state is not None
    assert (state.status, state.due_at) == (status, due)

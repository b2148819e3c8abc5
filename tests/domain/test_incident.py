import pytest

from opsentry.domain.decider import MAX_TITLE_CHARACTERS, IllegalTransition, InvalidField
from opsentry.domain.incident import (
    DECIDER,
    STATUSES,
    ChangeIncident,
    IncidentEdited,
    IncidentEvent,
    IncidentOpened,
    IncidentReopened,
    IncidentResolved,
    IncidentServicesChanged,
    IncidentSeverityChanged,
    IncidentStatusChanged,
    IncidentUpdated,
    IncidentVisibilityChanged,
    OpenIncident,
    PostUpdate,
    ResolveIncident,
)
from tests.domain.spec import given

OPENED = IncidentOpened(
    title="Deploy failed", description="Rolling back", severity="degraded", visibility="public", service_ids=(1, 2)
)
HISTORIES = {
    "investigating": (OPENED,),
    "identified": (OPENED, IncidentStatusChanged(status="identified")),
    "monitoring": (OPENED, IncidentStatusChanged(status="monitoring")),
    "resolved": (OPENED, IncidentResolved()),
}
# (from, to): the events of the transition; None if it is refused.
MOVES: dict[tuple[str, str], list[IncidentEvent] | None] = {
    ("investigating", "investigating"): [],
    ("investigating", "identified"): [IncidentStatusChanged(status="identified")],
    ("investigating", "monitoring"): [IncidentStatusChanged(status="monitoring")],
    ("investigating", "resolved"): [IncidentResolved()],
    ("identified", "investigating"): [IncidentStatusChanged(status="investigating")],
    ("identified", "identified"): [],
    ("identified", "monitoring"): [IncidentStatusChanged(status="monitoring")],
    ("identified", "resolved"): [IncidentResolved()],
    ("monitoring", "investigating"): [IncidentStatusChanged(status="investigating")],
    ("monitoring", "identified"): [IncidentStatusChanged(status="identified")],
    ("monitoring", "monitoring"): [],
    ("monitoring", "resolved"): [IncidentResolved()],
    ("resolved", "investigating"): [IncidentReopened()],
    ("resolved", "identified"): None,
    ("resolved", "monitoring"): None,
    ("resolved", "resolved"): [],
}


def test_the_table_covers_all_pairs_of_statuses():
    assert set(MOVES) == {(start, end) for start in STATUSES for end in STATUSES}


@pytest.mark.parametrize(("start", "end"), MOVES)
def test_changing_the_status(start, end):
    attempt = given(DECIDER, *HISTORIES[start]).when(ChangeIncident(status=end))
    events = MOVES[start, end]
    if events is None:
        attempt.refused(IllegalTransition, "can only be reopened as investigating")
    else:
        attempt.then(*events)


@pytest.mark.parametrize(("start", "end"), MOVES)
def test_posting_an_update_with_a_status(start, end):
    attempt = given(DECIDER, *HISTORIES[start]).when(PostUpdate(message="News", status=end))
    events = MOVES[start, end]
    if events is None:
        attempt.refused(IllegalTransition, "can only be reopened as investigating")
    else:
        attempt.then(*events, IncidentUpdated(message="News", status=end))


@pytest.mark.parametrize("status", STATUSES)
def test_an_update_without_a_status_keeps_the_status(status):
    update = PostUpdate(message="News", is_public=False)
    given(DECIDER, *HISTORIES[status]).when(update).then(
        IncidentUpdated(message="News", status=status, is_public=False)
    )


@pytest.mark.parametrize("status", STATUSES[:3])
def test_an_open_incident_is_resolved_with_its_cause(status):
    command = ResolveIncident(root_cause="DNS", postmortem=None)
    given(DECIDER, *HISTORIES[status]).when(command).then(IncidentResolved(root_cause="DNS", postmortem=None))


def test_a_resolved_incident_is_not_resolved_again():
    given(DECIDER, *HISTORIES["resolved"]).when(ResolveIncident()).refused(IllegalTransition, "resolved already")


def test_a_description_is_the_first_entry_of_the_timeline():
    given(DECIDER).when(OpenIncident(title="T", description="D", service_ids=(3, 1, 3))).then(
        IncidentOpened(title="T", description="D", severity="degraded", visibility="public", service_ids=(1, 3)),
        IncidentUpdated(message="D", status="investigating"),
    )


@pytest.mark.parametrize("description", [None, "", "  "])
def test_without_a_description_the_timeline_is_empty(description):
    given(DECIDER).when(OpenIncident(title="T", description=description)).then(
        IncidentOpened(title="T", description=description, severity="degraded", visibility="public")
    )


@pytest.mark.parametrize(
    "command",
    [
        ChangeIncident(),
        ChangeIncident(title="Deploy failed", description="Rolling back", severity="degraded", visibility="public"),
        ChangeIncident(service_ids=(2, 1, 2), root_cause=None, postmortem=None, status="investigating"),
    ],
)
def test_a_change_to_the_present_values_is_no_event(command):
    given(DECIDER, OPENED).when(command).then()


def test_every_field_changes_by_an_event_of_its_own_kind():
    command = ChangeIncident(
        title="New", description=None, root_cause="R", severity="critical", visibility="internal", service_ids=()
    )
    given(DECIDER, OPENED).when(command).then(
        IncidentEdited(title="New", description=None, root_cause="R"),
        IncidentVisibilityChanged(visibility="internal"),
        IncidentServicesChanged(service_ids=()),
        IncidentSeverityChanged(severity="critical", previous="degraded"),
    )


def test_a_resolved_incident_can_still_be_edited():
    given(DECIDER, *HISTORIES["resolved"]).when(ChangeIncident(root_cause="DNS")).then(IncidentEdited(root_cause="DNS"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (OpenIncident(title=" \t"), "title: must not be blank"),
        (OpenIncident(title="x" * (MAX_TITLE_CHARACTERS + 1)), "title: must have at most"),
        (OpenIncident(title="a\x00b"), "title: must not contain the character NUL"),
        (OpenIncident(title="T", description="\x00"), "description: must not contain"),
        (OpenIncident(title="T", severity="bad"), "severity: must be one of informational, degraded"),
        (OpenIncident(title="T", visibility="secret"), "visibility: must be one of public, internal"),
    ],
)
def test_opening_with_an_invalid_field_names_the_field(command, message):
    given(DECIDER).when(command).refused(InvalidField, message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (ChangeIncident(title=""), "title: must not be blank"),
        (ChangeIncident(status="closed"), "status: must be one of investigating"),
        (ChangeIncident(severity="x"), "severity: must be one of"),
        (ChangeIncident(visibility="x"), "visibility: must be one of"),
        (ChangeIncident(root_cause="\x00"), "root_cause: must not contain"),
        (PostUpdate(message=" "), "message: must not be blank"),
        (PostUpdate(message="M", status="x"), "status: must be one of"),
        (ResolveIncident(postmortem="\x00"), "postmortem: must not contain"),
    ],
)
def test_changing_to_an_invalid_value_names_the_field(command, message):
    given(DECIDER, OPENED).when(command).refused(InvalidField, message)


@pytest.mark.parametrize("command", [ChangeIncident(), PostUpdate(message="M"), ResolveIncident()])
def test_commands_to_a_missing_incident_are_refused(command):
    given(DECIDER).when(command).refused(IllegalTransition, "does not exist")


def test_reopening_keeps_cause_and_postmortem():
    state = DECIDER.fold([OPENED, IncidentResolved(root_cause="DNS"), IncidentReopened()])
    assert state is not None
    assert (state.status, state.root_cause, state.postmortem) == ("investigating", "DNS", None)

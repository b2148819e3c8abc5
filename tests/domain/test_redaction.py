from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsentry.domain import incident, maintenance
from opsentry.domain.decider import REDACTED, InvalidField
from opsentry.domain.incident import ChangeIncident, OpenIncident, PostUpdate, RedactIncident, ResolveIncident
from opsentry.domain.redaction import HistoryEntry, RedactionPlan, plan_redaction
from tests.projections.histories import History, redaction, schedule

TEXT = st.sampled_from(["a", "b", "c", "d", "e"])


def written(*commands: Any) -> list[HistoryEntry]:
    history = History()
    for command in commands:
        history.incident(7, command)
    return [HistoryEntry(e.version, e.position + 100, e.event) for e in history.events]


LOGINS = written(
    OpenIncident(title="Logins fail", description="Says Jane"),
    PostUpdate(message="A deploy did it."),
    ChangeIncident(title="Logins are slow"),
    ResolveIncident(root_cause="An index", postmortem="Says Jane"),
)


def redact(*fields: str, events: tuple[int, ...] = ()) -> RedactionPlan:
    return plan_redaction(LOGINS, incident.REDACTABLE_FIELDS, fields, events)


def test_every_copy_of_a_text_is_redacted():
    plan = redact("description")
    assert plan.versions == (1, 2, 5)
    assert plan.fields == ("description", "postmortem")
    assert plan.restated == {"root_cause": "An index"}


def test_a_replaced_title_is_not_restated():
    assert "title" not in redact("description").restated
    assert redact("title") == RedactionPlan(
        versions=(1, 4), fields=("title",), restated={"description": "Says Jane"}
    )  # fmt: skip


def test_a_position_redacts_its_event():
    assert redact(events=(103,)) == RedactionPlan(versions=(3,), fields=(), restated={})
    assert redact(events=(101,)).versions == (1, 2, 5)


@pytest.mark.parametrize(
    ("fields", "events", "field"),
    [((), (), "fields"), (("status",), (), "fields"), ((), (1,), "events"), ((), (999,), "events")],
)
def test_fields_and_events_without_erasable_text_are_refused(fields, events, field):
    with pytest.raises(InvalidField) as refused:
        redact(*fields, events=events)
    assert refused.value.field == field


def test_an_event_without_erasable_text_is_refused():
    moved = written(OpenIncident(title="T"), ChangeIncident(status="monitoring"))
    with pytest.raises(InvalidField, match="no erasable text is recorded at 102"):
        plan_redaction(moved, incident.REDACTABLE_FIELDS, (), (102,))


def test_a_field_that_never_had_text_needs_no_redaction():
    assert (
        plan_redaction(written(OpenIncident(title="T")), incident.REDACTABLE_FIELDS, ["root_cause"], ()).versions == ()
    )


def test_a_redaction_and_its_restated_fields_are_events():
    state = incident.DECIDER.fold(event for _, _, event in LOGINS)  # type: ignore[misc]
    events = incident.decide(state, RedactIncident(plan=redact("description"), reason="Asked to"))
    assert [event.TYPE for event in events] == ["incident.redacted", "incident.edited"]
    after = incident.DECIDER.fold(events, state)
    assert after is not None
    assert (after.title, after.description, after.root_cause) == ("Logins are slow", REDACTED, "An index")
    nothing = RedactionPlan(versions=(), fields=(), restated={})
    assert incident.decide(state, RedactIncident(plan=nothing, reason="Asked to")) == []


@pytest.mark.parametrize("reason", ["", " \n", "x\x00", "x" * 50_001])
def test_a_blank_reason_is_refused(reason):
    (opened,) = incident.decide(None, OpenIncident(title="T"))
    with pytest.raises(InvalidField, match="reason: "):
        incident.decide(incident.evolve(None, opened), RedactIncident(plan=redact("title"), reason=reason))


@given(
    texts=st.lists(st.tuples(TEXT, st.none() | TEXT), min_size=1, max_size=6),
    messages=st.lists(TEXT, max_size=6),
    field=st.sampled_from(incident.REDACTABLE_FIELDS),
)
def test_a_redaction_leaves_no_requested_text_and_keeps_other_present_text(texts, messages, field):
    history = History()
    history.incident(7, OpenIncident(title=texts[0][0], description=texts[0][1]))
    for title, root_cause in texts[1:]:
        history.incident(7, ChangeIncident(title=title, root_cause=root_cause))
    for message in messages:
        history.incident(7, PostUpdate(message=message))
    asked = {getattr(e.event, field) for e in history.events if isinstance(getattr(e.event, field, None), str)}
    before = history.states["incident", 7]
    history.incident(7, redaction(history, "incident", 7, fields=[field]))
    after = history.states["incident", 7]
    for name in incident.REDACTABLE_FIELDS:
        text = getattr(before, name)
        assert getattr(after, name) == (REDACTED if text in asked and text is not None else text)
    left = {getattr(e.event, name) for e in history.erased() for name in e.event.ERASABLE if name != "reason"}
    assert not left & asked


def test_windows_are_redacted_like_incidents():
    history = History()
    history.window(7, schedule(title="Move", description="Says Jane"))
    history.window(7, redaction(history, maintenance.KIND, 7, fields=["description"]))
    state = history.states[maintenance.KIND, 7]
    assert (state.title, state.description) == ("Move", REDACTED)
    assert [e.event.TYPE for e in history.events][1:] == ["maintenance.redacted", "maintenance.edited"]

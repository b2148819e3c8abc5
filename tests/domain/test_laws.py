from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from opsentry.domain import incident
from opsentry.domain.decider import DomainError
from opsentry.domain.incident import (
    SEVERITIES,
    STATUSES,
    ChangeIncident,
    OpenIncident,
    PostUpdate,
    ResolveIncident,
)
from opsentry.domain.visibility import VISIBILITIES

words = st.text(max_size=20)
ids = st.lists(st.integers(1, 5), max_size=6).map(tuple)


def maybe(strategy):
    return st.one_of(st.just(UNSET), strategy)


changes = st.builds(
    ChangeIncident,
    title=maybe(words),
    description=maybe(st.none() | words),
    severity=maybe(st.sampled_from(SEVERITIES)),
    visibility=maybe(st.sampled_from(VISIBILITIES)),
    status=maybe(st.sampled_from(STATUSES)),
    service_ids=maybe(ids),
    root_cause=maybe(st.none() | words),
    postmortem=maybe(st.none() | words),
)
updates = st.builds(PostUpdate, message=words, status=st.none() | st.sampled_from(STATUSES), is_public=st.booleans())
resolves = st.builds(ResolveIncident, root_cause=maybe(words), postmortem=maybe(words))
histories = st.lists(st.one_of(changes, updates, resolves), max_size=12)


def lived(commands):
    """Return the states after each accepted command."""
    state = incident.DECIDER.fold(incident.decide(None, OpenIncident(title="T", service_ids=(2, 1))))
    states = [state]
    for command in commands:
        try:
            state = incident.DECIDER.fold(incident.decide(state, command), state)
        except DomainError:
            continue
        states.append(state)
    return states


@given(histories)
def test_an_incident_stays_valid_after_any_commands(commands):
    for state in lived(commands):
        assert state.status in STATUSES
        assert state.severity in SEVERITIES
        assert state.title.strip()
        assert list(state.service_ids) == sorted(set(state.service_ids))


@given(histories, changes)
def test_repeating_a_change_changes_nothing(commands, change):
    state = lived(commands)[-1]
    try:
        events = incident.decide(state, change)
    except DomainError:
        return
    assert list(incident.decide(incident.DECIDER.fold(events, state), change)) == []


@given(histories)
def test_a_resolved_incident_can_only_be_reopened(commands):
    states = lived(commands)
    for before, after in pairwise(states):
        if before.status == "resolved":
            assert after.status in {"resolved", "investigating"}

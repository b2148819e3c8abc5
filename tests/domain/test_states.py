"""The documented state diagrams, the transition tables and the deciders agree."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.decider import DomainError

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "states.md").read_text()
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)

INCIDENT_COMMANDS = [
    *(incident.ChangeIncident(status=status) for status in incident.STATUSES),
    *(incident.PostUpdate(message="News.", status=status) for status in (None, *incident.STATUSES)),
    incident.ResolveIncident(),
]
MAINTENANCE_COMMANDS = [
    maintenance.StartMaintenance(),
    maintenance.CompleteMaintenance(),
    maintenance.CancelMaintenance(),
    maintenance.RemindMaintenance(),
    maintenance.ChangeMaintenance(title="Changed"),
]
SUBSCRIPTION_COMMANDS = [
    subscription.ConfirmSubscription(),
    subscription.ChangeSubscription(enabled=True),
    subscription.ChangeSubscription(enabled=False),
    subscription.DisableSubscription(reason="endpoint_gone"),
    subscription.RemoveSubscription(),
    subscription.ExpireSubscription(),
]


BEGINNINGS: dict[Any, list[Any]] = {
    incident: [incident.OpenIncident(title="Slow")],
    maintenance: [
        maintenance.ScheduleMaintenance(title="Drill", scheduled_start=NOON, scheduled_end=NOON.replace(hour=14))
    ],
    subscription: [
        subscription.CreateSubscription(channel="email", target="a@example.com", pending=pending)
        for pending in (False, True)
    ],
}


def opened(aggregate):
    """Return the states in which a stream of the aggregate can begin, by status."""
    states = [aggregate.DECIDER.fold(aggregate.decide(None, command)) for command in BEGINNINGS[aggregate]]
    return {state.status: state for state in states}


def reached(aggregate, commands):
    """Return every pair of statuses between which one of the commands moves."""
    states, to_visit, moves = {}, opened(aggregate), set()
    while to_visit:
        status, state = to_visit.popitem()
        states[status] = state
        for command in commands:
            try:
                after = aggregate.DECIDER.fold(aggregate.decide(state, command), state)
            except DomainError:
                continue
            if after.status != status:
                moves.add((status, after.status))
            if after.status not in states:
                to_visit[after.status] = after
    return moves


def drawn(heading):
    """Return the transitions of the diagram below a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (diagram,) = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", section, re.DOTALL)
    return set(re.findall(r"^ +(\S+) --> (\w+)$", diagram, re.MULTILINE))


def pairs(transitions):
    return {(status, following) for status in transitions for following in transitions[status]}


AGGREGATES = [
    ("Incident", incident, INCIDENT_COMMANDS),
    ("Maintenance", maintenance, MAINTENANCE_COMMANDS),
    ("Subscription", subscription, SUBSCRIPTION_COMMANDS),
]


@pytest.mark.parametrize(("heading", "aggregate", "commands"), AGGREGATES, ids=lambda value: str(value)[:12])
def test_the_decider_makes_exactly_the_transitions_of_its_table(heading, aggregate, commands):
    assert reached(aggregate, commands) == pairs(aggregate.TRANSITIONS), heading


@pytest.mark.parametrize(("heading", "aggregate", "_"), AGGREGATES, ids=lambda value: str(value)[:12])
def test_the_diagram_shows_the_table_and_its_beginnings(heading, aggregate, _):
    beginnings = {("[*]", status) for status in opened(aggregate)}
    assert drawn(heading) == pairs(aggregate.TRANSITIONS) | beginnings


@pytest.mark.parametrize("aggregate", [aggregate for _, aggregate, _ in AGGREGATES])
def test_the_statuses_are_those_of_the_table(aggregate):
    assert list(aggregate.TRANSITIONS) == list(aggregate.STATUSES)

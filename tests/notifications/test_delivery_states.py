"""The documented diagram, the transition table, the schema and the code that moves deliveries agree."""

import re
from pathlib import Path

from opsentry.notifications.channel import Outcome
from opsentry.notifications.delivery.retry_policy import RETRY_SECONDS, next_state
from opsentry.notifications.delivery.states import (
    CANCELLABLE_STATES,
    INITIAL_STATES,
    REDELIVERABLE_STATES,
    RETRYABLE_STATES,
    STATES,
    TRANSITIONS,
)

ROOT = Path(__file__).parents[2]


def test_the_diagram_shows_the_table_and_its_beginnings():
    page = (ROOT / "docs" / "reference" / "states.md").read_text()
    section = page.partition("\n## Delivery\n")[2].partition("\n## ")[0]
    drawn = set(re.findall(r"^ +(\S+) --> (\w+)$", section, re.MULTILINE))
    moves = {(state, following) for state in TRANSITIONS for following in TRANSITIONS[state]}
    assert drawn == moves | {("[*]", state) for state in INITIAL_STATES}


def test_the_page_explains_each_state():
    page = (ROOT / "docs" / "reference" / "states.md").read_text()
    section = page.partition("\n## Delivery\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(STATES)


def test_the_schema_knows_the_same_states():
    schema = (ROOT / "migrations" / "0004_deliveries.sql").read_text()
    (listed,) = re.findall(r"CHECK \(state IN \((.*?)\)\)", schema, re.DOTALL)
    assert set(re.findall(r"'(\w+)'", listed)) == set(STATES)


def test_an_attempt_moves_to_a_state_that_follows_pending():
    outcomes = [Outcome(), Outcome("refused"), Outcome("gone", endpoint_gone=True)]
    moved = {next_state(outcome, attempts)[0] for outcome in outcomes for attempts in range(len(RETRY_SECONDS) + 1)}
    assert moved - {"pending"} == {"delivered", "exhausted", "disabled"}
    assert moved - {"pending"} <= TRANSITIONS["pending"]


def test_operators_and_tenants_move_only_along_the_table():
    assert set(RETRYABLE_STATES) - {"pending"} <= set(REDELIVERABLE_STATES)
    assert set(REDELIVERABLE_STATES) == set(STATES) - {"pending", "coalesced"}
    assert set(CANCELLABLE_STATES) == {"pending", "exhausted"}

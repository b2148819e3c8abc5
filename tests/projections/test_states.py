"""The documented diagram, the transition table and what happens to a projection agree."""

import re
from itertools import pairwise
from pathlib import Path

from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident
from opsentry.projections.engine import management
from opsentry.projections.engine.states import STATE, TRANSITIONS
from opsentry.projections.impact import Impact
from tests import commands
from tests.projections.histories import META

MOVES = {(state, following) for state in TRANSITIONS for following in TRANSITIONS[state]}
SELECT_STATE = f"""
SELECT {STATE} FROM checkpoints c LEFT JOIN projections p ON p.name = c.projection
WHERE c.tenant_id = $1 AND c.projection = 'impact'
"""


def test_the_diagram_shows_the_table_and_its_beginning():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "states.md").read_text()
    section = page.partition("\n## Projection\n")[2]
    assert set(re.findall(r"^ +(\S+) --> (\w+)$", section, re.MULTILINE)) == MOVES | {("[*]", "running")}
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(TRANSITIONS)


async def test_a_projection_makes_every_move_of_the_table(parts, acme, owner, monkeypatch):
    passed = []

    async def note_state():
        passed.append(await owner.fetchval(SELECT_STATE, acme.id))

    async def catch_up():
        opened = await commands.create(parts, incident.DECIDER, acme.id, OpenIncident(title="Down"), META)
        await parts.projector.catch_up(acme.id, opened.position)
        await note_state()

    async def fail(*_):
        raise ZeroDivisionError

    await catch_up()
    await management.register(owner, parts.projector.projections)
    for change in (management.pause, management.resume):
        await change(owner, ["impact"])
        await note_state()
    with monkeypatch.context() as patch:
        patch.setattr(Impact, "prepare", fail)
        await catch_up()
    for step in (management.pause, management.resume, management.retry_halted):
        await step(owner, ["impact"])
        await note_state()
    await catch_up()
    assert passed[0] == passed[-1] == "running"
    assert {pair for pair in pairwise(passed) if pair[0] != pair[1]} == MOVES

from typing import Any

import pytest

from opsentry.domain.incident import ChangeIncident, IncidentUpdated, OpenIncident, PostUpdate
from opsentry.events.codec import Actor, Meta
from opsentry.projections.incident_snapshots import SNAPSHOT_EVERY_VERSIONS, select_timeline
from opsentry.projections.incidents import Incidents
from tests.projections.histories import META, History, apply, dump, redaction

MANY = 3 * SNAPSHOT_EVERY_VERSIONS + 50
TOKEN = Meta(Actor("token", 1))


@pytest.fixture
def history():
    """An incident of 350 events, two thirds of them messages, some by a token."""
    made = History(1)
    made.incident(7, OpenIncident(title="Long"))
    while len(made.events) < MANY:
        number = len(made.events)
        command: Any = PostUpdate(message=f"message {number}")
        if number % 3 == 0:
            command = ChangeIncident(severity=("critical", "degraded")[number % 2])
        made.incident(7, command, meta=TOKEN if number % 5 else META) or made.incident(7, PostUpdate(message="same"))
    return made


async def applied(connection, events, size):
    """The rows after `events` came `size` at a time."""
    transaction = connection.transaction()
    await transaction.start()
    for begin in range(0, len(events), size):
        await apply(connection, Incidents(), events[begin : begin + size])
    rows = await dump(connection)
    await transaction.rollback()
    return rows


@pytest.mark.parametrize("size", [1, 7, 100, 101, 1000])
async def test_snapshots_do_not_depend_on_batches(app_connection, history, size):
    rows = await applied(app_connection, history.events, size)
    assert len(rows["incident_snapshots"]) == 3
    assert rows == await applied(app_connection, history.events, MANY)


@pytest.mark.parametrize("size", [1, 50, 100, 1000])
@pytest.mark.parametrize("at", [5, 99, 100, 101, 250, 300, MANY])
async def test_a_redaction_leaves_no_older_snapshot_and_no_text(app_connection, history, size, at):
    short = History(1)
    short.incident(7, OpenIncident(title="Long"))
    for event in history.events[1:at]:
        short.events.append(event)
        short.versions["incident", 7] = event.version
    erased = next(e for e in short.events if isinstance(e.event, IncidentUpdated))
    short.incident(7, redaction(short, "incident", 7, fields=(), positions=[erased.position]))
    while len(short.events) < MANY + 100:
        short.incident(7, PostUpdate(message=f"later {len(short.events)}"))
    rows = await applied(app_connection, short.events, size)
    assert rows == await applied(app_connection, short.events, len(short.events))
    assert '"message":"message 1"' not in str(rows)
    versions = [int(row.split(",")[2]) for row in rows["incident_snapshots"]]
    assert sorted(versions) == [v for v in range(100, len(short.events) + 1, 100) if v > at + 1]


async def test_the_timeline_is_the_same_from_snapshots_and_from_entries(app_connection, history):
    await apply(app_connection, Incidents(), history.events)
    whole = {}
    for version in (1, 2, 99, 100, 101, 200, 250, 300, 301, MANY):
        whole[version] = await select_timeline(app_connection, 1, 7, version)
    for gone in (100, 200, 300):
        await app_connection.execute("DELETE FROM incident_snapshots WHERE version = $1", gone)
        for version, found in whole.items():
            assert await select_timeline(app_connection, 1, 7, version) == found, (gone, version)

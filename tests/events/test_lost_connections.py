import asyncio
import re
import tempfile
from pathlib import Path

import pytest

from opsentry.events.appender import Appender
from opsentry.events.store import Appended, VersionConflict
from opsentry.infrastructure.postgres import Database, DatabaseUnavailable, OutcomeUnknown
from tests.events.appending_client import Fault, Line
from tests.events.ledger import messages, notes


def start(appender, *commands):
    return [asyncio.create_task(appender.append(command)) for command in commands]


@pytest.fixture
async def line(settings):
    match = re.fullmatch(r"postgresql://\w+@/\w+\?host=(.+)", settings.database_url)
    assert match
    with tempfile.TemporaryDirectory(prefix="line-") as folder:
        async with Line(Path(folder), f"{match[1]}/.s.PGSQL.5432").open() as line:
            yield line


@pytest.fixture
async def distant(settings, line):
    url = re.sub(r"host=.+", f"host={line.folder}", settings.database_url)
    # These tests wait for the timeout, so it is short.
    database = Database(url, size=1, timeout_seconds=0.9)
    await database.open()
    appender = Appender(database)
    yield appender
    await appender.drain()
    await database.close()


@pytest.mark.parametrize(
    ("fault", "recorded"), [(Fault.LOSES_REQUESTS, False), (Fault.LOSES_ANSWERS, True), (Fault.SWALLOWS, False)]
)
async def test_a_connection_lost_during_an_append_leaves_the_outcome_unknown(
    distant, line, connect, tenant, fault, recorded
):
    await distant.append(notes(tenant, "before", stream=1))
    line.fault = fault
    outcomes = await asyncio.gather(
        *start(distant, notes(tenant, "lost", stream=1, expected=1), notes(tenant, "lost", stream=2)),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown, OutcomeUnknown]
    assert await messages(await connect(), tenant) == ["before"] + ["lost", "lost"] * recorded
    line.fault = Fault.NONE
    again = await distant.append(notes(tenant, "again", stream=1, expected=1))
    assert again == VersionConflict(2) if recorded else isinstance(again, Appended)


async def test_an_unreachable_database_has_recorded_nothing(distant, line, connect, tenant):
    line.fault = Fault.REFUSES
    for outcome in await asyncio.gather(
        *start(distant, *(notes(tenant, str(i)) for i in range(5))), return_exceptions=True
    ):
        assert type(outcome) is DatabaseUnavailable
    assert await messages(await connect(), tenant) == []
    line.fault = Fault.NONE
    assert isinstance(await distant.append(notes(tenant, "after")), Appended)


async def test_a_frozen_database_that_received_nothing_has_recorded_nothing(distant, line, connect, tenant):
    line.fault = Fault.SWALLOWS
    with pytest.raises(DatabaseUnavailable) as raised:
        await distant.append(notes(tenant, "never sent"))
    assert type(raised.value) is DatabaseUnavailable
    assert await messages(await connect(), tenant) == []

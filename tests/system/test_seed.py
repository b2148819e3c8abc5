"""The seed of the demo is complete after every interruption."""

import pytest

from opsentry.demo import seed
from opsentry.events.appender import TenantBusy

SHOWN = "SELECT status, body::json ->> 'title' AS title FROM {} ORDER BY title"


class Killed(TenantBusy):
    """The demo ended here."""


async def look(owner):
    found = [list(map(tuple, await owner.fetch(SHOWN.format(table)))) for table in ("incidents", "maintenance")]
    return [*found, [row["slug"] for row in await owner.fetch("SELECT slug FROM services ORDER BY slug")]]


@pytest.fixture
async def caller(parts):
    return await seed.tenant(parts, seed.SLUG, seed.NAME)


async def test_a_second_seed_adds_nothing(parts, caller, owner):
    await seed.seed(parts, caller)
    await parts.projector.catch_up(caller.tenant_id, 0)
    before = await look(owner)
    head = await owner.fetchval("SELECT position FROM ledger_heads")
    assert await seed.tenant(parts, seed.SLUG, seed.NAME) == caller
    await seed.seed(parts, caller)
    assert await owner.fetchval("SELECT position FROM ledger_heads") == head
    assert await look(owner) == before


async def test_the_next_start_completes_an_interrupted_seed(parts, caller, owner, monkeypatch):
    append = parts.appender.append
    left = 0

    async def dying(command):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return await append(command)

    monkeypatch.setattr(parts.appender, "append", dying)
    ledger_heads: list[int] = []
    while True:
        left = len(ledger_heads)
        try:
            await seed.seed(parts, caller)
        except Killed:
            ledger_heads.append(await owner.fetchval("SELECT position FROM ledger_heads"))
        else:
            break
    assert ledger_heads == sorted(set(ledger_heads))
    assert len(ledger_heads) == 11
    await parts.projector.catch_up(caller.tenant_id, 0)
    incidents, windows, services = await look(owner)
    assert [status for status, _ in incidents] == ["resolved", "investigating", "resolved"]
    assert [status for status, _ in windows] == ["scheduled", "completed", "active"]
    assert len(services) == 5

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
async def tenant_id(parts):
    return await seed.tenant(parts, seed.SLUG, seed.NAME)


async def test_sowing_twice_adds_nothing(parts, tenant_id, owner):
    await seed.seed(parts, tenant_id)
    await parts.projector.catch_up(tenant_id, 0)
    before = await look(owner)
    head = await owner.fetchval("SELECT position FROM ledger_heads")
    assert await seed.tenant(parts, seed.SLUG, seed.NAME) == tenant_id
    await seed.seed(parts, tenant_id)
    assert await owner.fetchval("SELECT position FROM ledger_heads") == head
    assert await look(owner) == before


async def test_an_end_half_way_is_made_up_for_at_the_next_start(parts, tenant_id, owner, monkeypatch):
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
            await seed.seed(parts, tenant_id)
        except Killed:
            ledger_heads.append(await owner.fetchval("SELECT position FROM ledger_heads"))
        else:
            break
    assert ledger_heads == sorted(set(ledger_heads))
    assert len(ledger_heads) == 11
    await parts.projector.catch_up(tenant_id, 0)
    incidents, windows, services = await look(owner)
    assert [status for status, _ in incidents] == ["resolved", "investigating", "resolved"]
    assert [status for status, _ in windows] == ["scheduled", "completed", "active"]
    assert len(services) == 5

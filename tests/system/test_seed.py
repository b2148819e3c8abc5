import pytest

from opsentry.demo import seed
from opsentry.events.writer import TenantBusy

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
    await parts.runner.catch_up(tenant_id, 0)
    before = await look(owner)
    head = await owner.fetchval("SELECT seq FROM heads")
    assert await seed.tenant(parts, seed.SLUG, seed.NAME) == tenant_id
    await seed.seed(parts, tenant_id)
    assert await owner.fetchval("SELECT seq FROM heads") == head
    assert await look(owner) == before


async def test_an_end_half_way_is_made_up_for_at_the_next_start(parts, tenant_id, owner, monkeypatch):
    append = parts.writer.append
    left = 0

    async def dying(command):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return await append(command)

    monkeypatch.setattr(parts.writer, "append", dying)
    heads: list[int] = []
    while True:
        left = len(heads)
        try:
            await seed.seed(parts, tenant_id)
        except Killed:
            heads.append(await owner.fetchval("SELECT seq FROM heads"))
        else:
            break
    assert heads == sorted(set(heads))
    assert len(heads) == 11
    await parts.runner.catch_up(tenant_id, 0)
    incidents, windows, services = await look(owner)
    assert [status for status, _ in incidents] == ["resolved", "investigating", "resolved"]
    assert [status for status, _ in windows] == ["scheduled", "completed", "active"]
    assert len(services) == 5

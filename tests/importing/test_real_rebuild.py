"""Rebuild the read models of a real page."""

from opsentry.bootstrap import projections
from opsentry.projections.engine.rebuild import Rebuilder
from tests.projections.histories import clear, dump

NAMES = sorted(projection.name for projection in projections())


async def test_rebuilt_rows_equal_live_rows(page, owner, monkeypatch):
    parts, tenant, _, _ = page
    await parts.projector.catch_up(tenant.id, 0)
    live = await dump(owner)
    assert live["incidents"]
    rebuilder = Rebuilder(parts.database, projections())
    for in_memory, chunk in ((10**6, 2_000), (500, 50)):
        monkeypatch.setattr("opsentry.projections.engine.replay.MAX_ROWS_IN_MEMORY", in_memory)
        for projection in projections():
            assert await rebuilder.verify(projection, tenant.id) is None
            await clear(owner, projection, tenant.id)
        await rebuilder.request()
        assert sorted(await rebuilder.rebuild(tenant.id, chunk_events=chunk)) == NAMES
        assert await dump(owner) == live

"""Run concurrent clients whose writes carry unique marks, and check the ledgers afterwards."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import count, pairwise
from typing import Any, Self

import aiohttp

from opsentry.bootstrap import core
from opsentry.settings import Settings
from tests.conftest import Client, Tenant, make_service, make_tenant
from tests.events.ledger import first_broken
from tests.waiting import GENEROUS_SECONDS, until

_numbers = count(1)


class Load:
    """Write from many clients, each without a pause between responses.

    Attributes:
        answers: The response status of each marked write; `None` without a response.
        reads: The number of reads by response status.
        unseen: Marks of acknowledged writes that the next read lacked.
    """

    def __init__(self, base_url: str, tenants: Sequence[Tenant], *, clients: int) -> None:
        self.answers: dict[str, int | None] = {}
        self.reads: Counter[int] = Counter()
        self.unseen: list[str] = []
        self._base_url = base_url
        self._tenants = tenants
        self._clients = clients
        self._stopping = False
        self._answered = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=GENEROUS_SECONDS)
        )
        for number in range(self._clients):
            tenant = self._tenants[number % len(self._tenants)]
            client = Client(self._session, self._base_url, tenant.token)
            self._tasks.append(asyncio.create_task(self._client(client)))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        assert self._session is not None
        await self._session.close()

    async def stop(self) -> None:
        """Start no more requests, and wait for those in flight."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def answered(self, more: int) -> None:
        """Wait for this many more responses."""
        wanted = self.count() + more
        async with asyncio.timeout(GENEROUS_SECONDS), self._answered:
            await self._answered.wait_for(lambda: self.count() >= wanted)

    def count(self, status: int | None = None) -> int:
        """Return the number of answers, of one status if given."""
        return sum(found is not None and status in {None, found} for found in self.answers.values())

    async def _client(self, client: Client) -> None:
        last = None
        # A lost connection ends the client: the server was killed.
        with suppress(aiohttp.ClientError):
            while not self._stopping:
                last = await self._write(client, None if next(_numbers) % 3 else last)

    async def _write(self, client: Client, incident_id: int | None) -> int | None:
        """Declare an incident and check that the list shows it, or update one."""
        mark = f"write {next(_numbers)}"
        self.answers[mark] = None
        if incident_id is None:
            status, body, _ = await client.post("/incidents", {"title": mark})
        else:
            status, body, _ = await client.post(f"/incidents/{incident_id}/updates", {"message": mark})
        self.answers[mark] = status
        async with self._answered:
            self._answered.notify_all()
        if status != 201:
            return None
        status, seen, headers = await client.get("/incidents?limit=200")
        self.reads[status] += 1
        # A list that lags says so in a header.
        if status == 200 and "Opsentry-Lag-Events" not in headers and incident_id is None and mark not in str(seen):
            self.unseen.append(mark)
        return int(body["id"])


async def prepare(settings: Settings, tenants: int) -> list[Tenant]:
    """Create tenants with one service each; leave no connection open."""
    made = []
    async with core(settings) as parts:
        for number in range(tenants):
            made.append(await make_tenant(parts, f"tenant-{number}"))
            await make_service(parts, made[-1].id, "main-api")
    return made


async def nobody_writes(owner: Any) -> None:
    """Wait until the database has closed all sessions of the application."""
    query = (
        "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND usename = 'opsentry')"
    )
    await until(lambda: owner.fetchval(query))


async def check_ledgers(owner: Any, tenants: Sequence[Tenant], answers: dict[str, int | None]) -> Counter[str]:
    """Check that each acknowledged write is recorded once, and none twice; count the marks."""
    marks: Counter[str] = Counter()
    for tenant in tenants:
        rows = await owner.fetch("SELECT * FROM events WHERE tenant_id = $1 ORDER BY position", tenant.id)
        assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
        assert first_broken(rows) is None
        assert all(before["recorded_at"] < after["recorded_at"] for before, after in pairwise(rows))
        for row in rows:
            if row["type"] in {"incident.opened", "incident.updated"}:
                marks.update(json.loads(row["erasable"]).values())
    assert set(marks) <= set(answers)
    assert max(marks.values(), default=1) == 1
    assert [mark for mark, status in answers.items() if status == 201 and not marks[mark]] == []
    assert [mark for mark, status in answers.items() if status not in {201, 503, None} and marks[mark]] == []
    return marks


async def check_read_models(owner: Any, api: Client, tenant: Tenant) -> None:
    """Check that the API shows every incident of the ledger with all its entries, and is up to date."""
    _, listed, headers = await api.get("/incidents?limit=1")
    assert "Opsentry-Lag-Events" not in headers
    counts = "SELECT count(*) FROM events WHERE tenant_id = $1 AND type = $2"
    assert listed["total"] == await owner.fetchval(counts, tenant.id, "incident.opened")
    assert await owner.fetchval(
        "SELECT count(*) FROM incident_updates WHERE tenant_id = $1", tenant.id
    ) == await owner.fetchval(counts, tenant.id, "incident.updated")
    behind = (
        "SELECT array_agg(projection) FROM checkpoints c JOIN ledger_heads h USING (tenant_id)"
        " WHERE tenant_id = $1 AND (c.position < h.position OR c.halted_at IS NOT NULL)"
    )
    assert await owner.fetchval(behind, tenant.id) is None

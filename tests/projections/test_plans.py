"""What the queries that run all the time cost: they go by their indexes and read no more rows than they answer."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from opsentry.domain.incident import OpenIncident, ResolveIncident
from opsentry.domain.maintenance import CompleteMaintenance, StartMaintenance
from opsentry.domain.service import RegisterService
from opsentry.events import log
from opsentry.projections import impact, incidents, maintenance, services
from opsentry.wiring import projections
from tests.projections.histories import History, apply, at, schedule
from tests.projections.planting import plant

COUNT = 4000


class Explained:
    """A connection that explains queries instead of answering them."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.plans: list[dict[str, Any]] = []

    async def fetchrow(self, query: str, *values: Any) -> dict[str, Any]:
        text = await self._connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", *values)
        self.plans.append(msgspec.json.decode(text)[0]["Plan"])
        return {}

    async def fetch(self, query: str, *values: Any) -> list[Any]:
        await self.fetchrow(query, *values)
        return []


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


async def plan_of(connection: Any, query: Any) -> list[dict[str, Any]]:
    explained = Explained(connection)
    await query(explained)
    (plan,) = explained.plans
    return list(nodes(plan))


def assert_goes_by(plan: list[dict[str, Any]], table: str, index: str, *, reads: float) -> None:
    """No row of `table` is met but by `index`, and at most `reads` are."""
    found = [node for node in plan if node.get("Relation Name") == table]
    assert found
    assert "Seq Scan" not in {node["Node Type"] for node in found}
    by_index = {node["Index Name"] for node in found if "Index Name" in node}
    bitmaps = {node["Index Name"] for node in plan if node["Node Type"] == "Bitmap Index Scan"}
    assert index in by_index | bitmaps
    assert by_index <= {index}
    assert most_rows(plan, table) <= reads


def most_rows(plan: list[dict[str, Any]], table: str) -> float:
    return max(
        float((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
        for node in plan
        if node.get("Relation Name") == table
    )


@pytest.fixture
async def full(owner, app_connection, history, other_history):
    """Two tenants with thousands of rows each, of which few are open, and statistics as autovacuum leaves them."""
    for each in (history, other_history):
        fill(each)
        for projection in projections():
            await apply(owner, projection, each.events)
        for name in ("services", "incidents", "maintenance", "impact", "outbox"):
            await owner.execute("INSERT INTO checkpoints VALUES ($1, $2, $3)", each.tenant_id, name, 1)
        await plant(owner, each.tenant_id, 1, 1)
    await owner.execute("VACUUM ANALYZE")
    return history


def fill(history: History) -> None:
    for number in range(1, 201):
        history.service(number, RegisterService(slug=f"s{number}", name=f"Service {number}"))
    for number in range(1, COUNT + 1):
        history.incident(number, OpenIncident(title="i", description="d", service_ids=(number % 200 + 1,)))
        if number % 400:
            history.incident(number, ResolveIncident(), when=at(number + 1))
    for number in range(1, COUNT // 4 + 1):
        history.window(number, schedule(scheduled_start=at(number), scheduled_end=at(number + 1)), when=at(-number))
        history.window(number, StartMaintenance())
        if number % 100:
            history.window(number, CompleteMaintenance())


async def test_hot_queries_go_by_their_indexes(app_connection, full):
    tenant_id = full.tenant_id

    active = await plan_of(app_connection, lambda c: incidents.active(c, tenant_id))
    assert_goes_by(active, "incidents", "incidents_open", reads=COUNT // 400)

    one = await plan_of(app_connection, lambda c: incidents.one(c, tenant_id, 7))
    assert_goes_by(one, "incidents", "incidents_pkey", reads=1)
    assert_goes_by(one, "incident_updates", "incident_updates_pkey", reads=1)

    window = await plan_of(app_connection, lambda c: maintenance.one(c, tenant_id, 7))
    assert_goes_by(window, "maintenance", "maintenance_pkey", reads=1)

    due = await plan_of(app_connection, lambda c: maintenance.due(c, 2.0, 200))
    assert_goes_by(due, "maintenance", "maintenance_due", reads=2 * COUNT // 400)

    recent = await plan_of(app_connection, lambda c: impact.between(c, tenant_id, 7, None, None, 36500, COUNT))
    assert_goes_by(recent, "impact_periods", "impact_periods_of_service", reads=COUNT // 200 + COUNT // 800)
    assert most_rows(recent, "impact_periods") >= COUNT // 200

    service = await plan_of(app_connection, lambda c: services.one(c, tenant_id, 7))
    assert_goes_by(service, "services", "services_pkey", reads=1)
    assert most_rows(service, "impact_periods") <= COUNT // 200 + COUNT // 800

    refs = await plan_of(app_connection, lambda c: services.refs(c, tenant_id, [7, 8]))
    assert_goes_by(refs, "services", "services_pkey", reads=2)


async def test_the_first_page_of_a_list_reads_the_rows_it_shows(app_connection, full):
    async def incidents_page(connection):
        return await incidents.page(connection, full.tenant_id, status=None, severity=None, limit=20, offset=0)

    async def windows_page(connection):
        return await maintenance.page(connection, full.tenant_id, status=None, limit=20, offset=0)

    for page, index in ((incidents_page, "incidents_newest"), (windows_page, "maintenance_newest")):
        plan = await plan_of(app_connection, page)
        # The same index may serve the count, which looks at no row.
        (scan,) = [n for n in plan if n.get("Index Name") == index and n["Node Type"] == "Index Scan"]
        assert scan["Actual Rows"] * scan["Actual Loops"] == 20
        assert not [n for n in plan if n["Node Type"] == "Sort" and n["Actual Rows"] > 20]


async def test_the_log_is_read_by_its_keys(app_connection, owner, full):
    for number in range(2, 2002):
        await plant(owner, full.tenant_id, number % 100 + 1, number // 100 + 2)
    await owner.execute("VACUUM ANALYZE events")
    following = await plan_of(app_connection, lambda c: log.read_after(c, full.tenant_id, 1000, 50))
    assert_goes_by(following, "events", "events_pkey", reads=50)
    stream = await plan_of(app_connection, lambda c: log.read_stream(c, full.tenant_id, "incident", 7, after=10))
    assert_goes_by(stream, "events", "events_stream_version", reads=20)

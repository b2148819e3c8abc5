"""The cost of the worker's polls does not depend on the number of idle tenants."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from opsentry.bootstrap import projections
from opsentry.notifications.delivery import enqueue, leases
from opsentry.notifications.delivery.management import measure_backlog
from opsentry.projections import subscriptions
from opsentry.projections.engine.projector import Projector
from opsentry.projections.engine.rebuild import Rebuilder
from tests.projections.plans import Explained, most_rows, nodes

# $1 tenants with some events each, which all projections show.
GROW = (
    "INSERT INTO tenants (slug, name) SELECT 't' || n, 'T' FROM generate_series(1, $1) AS n ON CONFLICT DO NOTHING",
    """INSERT INTO events SELECT tenant_id, n, 'incident', 1, n, 'incident.updated', 1, now(), now(), '{}', '{}', NULL,
    NULL, NULL, '' FROM tenants, generate_series(1, 2) AS n WHERE tenant_id <= $1 ON CONFLICT DO NOTHING""",
    "UPDATE ledger_heads SET position = 2 WHERE position = 0 AND tenant_id <= $1",
    """INSERT INTO checkpoints (tenant_id, projection, position) SELECT tenant_id, p.name, 2 FROM tenants, projections p
    WHERE tenant_id <= $1 ON CONFLICT DO NOTHING""",
    "INSERT INTO outbox_cursors SELECT tenant_id, 2 FROM tenants WHERE tenant_id <= $1 ON CONFLICT DO NOTHING",
    """INSERT INTO outbox_intents SELECT tenant_id, md5(tenant_id::text)::uuid, 1, 1, 'webhook', 'incident.opened',
    'incident', 1, false, now() FROM tenants WHERE tenant_id <= $1 ON CONFLICT DO NOTHING""",
    """INSERT INTO deliveries (tenant_id, intent_id, subscription_id, stream_kind, stream_id, position, channel, topic,
    created_at, state, finalized_at) SELECT tenant_id, intent_id, 1, stream_kind, 1, 1, channel, topic, created_at,
    'delivered', now() FROM outbox_intents WHERE tenant_id <= $1 ON CONFLICT DO NOTHING""",
    "INSERT INTO endpoints SELECT tenant_id, 1, 'webhook' FROM tenants WHERE tenant_id <= $1 ON CONFLICT DO NOTHING",
    # One active subscription, and one that is not confirmed yet.
    """INSERT INTO subscriptions SELECT tenant_id, n, 1, CASE n WHEN 1 THEN 'active' ELSE 'pending' END, 'email', 'T',
    now(), '{}', '{}' FROM tenants, generate_series(1, 2) AS n WHERE tenant_id <= $1 ON CONFLICT DO NOTHING""",
)
GROWING = (
    "events",
    "ledger_heads",
    "checkpoints",
    "outbox_intents",
    "outbox_cursors",
    "deliveries",
    "endpoints",
    "subscriptions",
)
# The number of tenants that lag, need a rebuild and have an expired subscription; the outbox of one is halted.
LAGGING = 3
LAG = (
    "INSERT INTO projection_backlog SELECT tenant_id, 2 FROM ledger_heads WHERE tenant_id <= $1 ON CONFLICT DO NOTHING",
    "UPDATE checkpoints SET position = 1, generation = -1 WHERE tenant_id <= $1",
    "UPDATE checkpoints SET halted_at = 2 WHERE tenant_id = $1 AND projection = 'outbox'",
    "UPDATE deliveries SET state = 'pending', finalized_at = NULL, next_attempt_at = now() WHERE tenant_id <= $1",
    "UPDATE endpoints SET available_at = now() WHERE tenant_id <= $1",
    "UPDATE outbox_cursors SET position = 0 WHERE tenant_id <= $1",
    "INSERT INTO outbox_backlog SELECT tenant_id, 1 FROM ledger_heads WHERE tenant_id <= $1 ON CONFLICT DO NOTHING",
    "UPDATE subscriptions SET created_at = now() - interval '8 days' WHERE subscription_id = 2 AND tenant_id <= $1",
)
CATCH_UP = (
    "UPDATE checkpoints SET position = 2, generation = 0, halted_at = NULL WHERE tenant_id > $1",
    "DELETE FROM projection_backlog WHERE tenant_id > $1",
    "UPDATE deliveries SET state = 'delivered', finalized_at = now(), next_attempt_at = NULL WHERE tenant_id > $1",
    "UPDATE endpoints SET available_at = NULL WHERE tenant_id > $1",
    "UPDATE outbox_cursors SET position = 2 WHERE tenant_id > $1",
    "DELETE FROM outbox_backlog WHERE tenant_id > $1",
    "UPDATE subscriptions SET created_at = now() WHERE tenant_id > $1",
)


class Cost(NamedTuple):
    """What a poll costs: rows that were met in tables that grow with tenants, and pages of any that were looked at."""

    rows: float
    pages: int


class Polled(Explained):
    """A database whose queries are explained, with what they cost, planned for the values given or for any."""

    def __init__(self, connection: Any, *, generic: bool) -> None:
        super().__init__(connection)
        self._generic = generic

    @asynccontextmanager
    async def connection(self, _: float) -> AsyncIterator["Polled"]:
        yield self

    async def fetch(self, query: str, *values: Any, seconds: float = 0) -> list[Any]:  # noqa: ARG002
        await self.fetchrow(query, *values)
        return []

    async def fetchrow(self, query: str, *values: Any) -> dict[str, Any]:
        mode = "force_generic_plan" if self._generic else "force_custom_plan"
        await self._connection.execute(f"SET plan_cache_mode = {mode}; PREPARE polled AS {query}")
        given = ", ".join(map(_literal, values))
        text = await self._connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE polled({given})")
        await self._connection.execute("DEALLOCATE polled")
        self.plans.append(msgspec.json.decode(text)[0]["Plan"])
        return {}

    async def execute(self, query: str, *_: Any) -> dict[str, Any]:
        await self._connection.execute(query)
        return {}

    def cost(self) -> Cost:
        found = [node for plan in self.plans for node in nodes(plan) if node.get("Relation Name") in GROWING]
        pages = sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in self.plans)
        return Cost(sum(most_rows([node], node["Relation Name"]) for node in found), pages)


def _literal(value: Any) -> str:
    match value:
        case int() | float():
            return str(value)
        case UUID() | str() | datetime():
            return f"'{value}'"
    return "'{" + ",".join(map(str, value)) + "}'"


async def polls(connection: Any) -> dict[str, Cost]:
    """Return the cost of each poll with a custom and with a generic plan."""
    found = {}
    for generic in (False, True):
        for name in ("lagging", "pending", "backlog", "fresh", "unconfirmed", "lease"):
            polled: Any = Polled(connection, generic=generic)
            # The rollback undoes what a poll sets and changes.
            transaction = connection.transaction()
            await transaction.start()
            match name:
                case "lagging":
                    await Projector(polled, projections()).lagging_tenants()
                case "pending":
                    await Rebuilder(polled, projections()).pending_tenants(20, 300.0)
                case "backlog":
                    with suppress(TypeError):  # the explained query returns no row
                        await measure_backlog(polled, 1001)
                case "fresh":
                    await enqueue.tenants_with_backlog(polled, 0, 50)
                case "unconfirmed":
                    await subscriptions.select_unconfirmed(polled, 7 * 86_400.0, 200)
                case _:
                    await leases.lease_endpoints(polled, UUID(int=1), "webhook", lease_seconds=60, limit=10)
            await transaction.rollback()
            found[f"{name}, {'any' if generic else 'these'} values"] = polled.cost()
    return found


async def test_idle_polls_cost_the_same_for_few_and_many_tenants(owner, app_connection):
    async def run(statements, number):
        for statement in statements:
            await owner.execute(statement, number)

    for table in (*GROWING, "projection_backlog"):
        await owner.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    await owner.execute(
        "INSERT INTO projections (name, version) SELECT unnest($1::text[]), 1", [each.name for each in projections()]
    )
    await run(GROW, 10)
    await run(LAG, LAGGING)
    await owner.execute("VACUUM ANALYZE")
    # The planner scans tables with few rows, so a small table is no measure for a large one.
    await app_connection.execute("SET enable_seqscan = off")
    few = await polls(app_connection)
    assert few["unconfirmed, any values"].rows == few["unconfirmed, these values"].rows == 2 * LAGGING
    await app_connection.execute("RESET enable_seqscan")

    async def check(statistics: str, *, pages: bool = True) -> None:
        for name, cost in (await polls(app_connection)).items():
            assert cost.rows <= few[name].rows, (statistics, name)
            # An index has three levels instead of one.
            assert cost.pages <= 3 * few[name].pages or not pages, (statistics, name)

    await run(GROW, 100_000)
    await check("of when there were few")
    for table in (*GROWING, "projection_backlog"):
        await owner.execute("SELECT pg_clear_relation_stats('public', $1)", table)
        await owner.execute(
            "SELECT pg_clear_attribute_stats('public', tablename, attname, false) FROM pg_stats WHERE tablename = $1",
            table,
        )
    await check("that were never taken")
    await run(LAG, 100_000)
    await owner.execute("ANALYZE")
    await run(CATCH_UP, LAGGING)
    await check("of when all lagged", pages=False)  # the pages still hold dead rows
    await owner.execute("VACUUM ANALYZE")
    await check("as they should be")

"""Query plans, for tests that bound the cost of queries."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec


class Explained:
    """A connection that explains queries instead of answering them."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.plans: list[dict[str, Any]] = []

    async def fetchrow(self, query: str, *values: Any) -> dict[str, Any]:
        text = await self._connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", *values)
        self.plans.append(msgspec.json.decode(text)[0]["Plan"])
        return {}

    execute = fetchrow

    async def fetch(self, query: str, *values: Any) -> list[Any]:
        await self.fetchrow(query, *values)
        return []


class ExplainedOnce(Explained):
    """The same of the plan that a connection makes once and keeps, for whatever values."""

    async def fetchrow(self, query: str, *values: Any) -> dict[str, Any]:
        literals = ", ".join("NULL" if value is None else f"'{value}'" for value in values)
        await self._connection.execute(f"SET plan_cache_mode = force_generic_plan; PREPARE kept AS {query}")
        text = await self._connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE kept ({literals})")
        await self._connection.execute("DEALLOCATE kept; RESET plan_cache_mode")
        self.plans.append(msgspec.json.decode(text)[0]["Plan"])
        return {}


async def plans_inside(connection: Any, run: Callable[[], Awaitable[object]]) -> list[dict[str, Any]]:
    """Return the nodes of all plans that `run` executes on a superuser's connection, those in functions included."""
    found: list[dict[str, Any]] = []

    def note(_connection: Any, message: Any) -> None:
        _, separator, text = message.message.partition("plan:\n")
        if separator:
            found.extend(nodes(msgspec.json.decode(text)["Plan"]))

    await connection.execute(
        "LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;"
        " SET auto_explain.log_analyze = on; SET auto_explain.log_format = json; SET auto_explain.log_level = notice"
    )
    connection.add_log_listener(note)
    try:
        await run()
    finally:
        connection.remove_log_listener(note)
        await connection.execute("RESET auto_explain.log_min_duration")
    return found


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from nodes(inner)


async def plan_of(connection: Any, query: Any, how: type[Explained] = Explained) -> list[dict[str, Any]]:
    explained = how(connection)
    await query(explained)
    (plan,) = explained.plans
    return list(nodes(plan))


def assert_goes_by(plan: list[dict[str, Any]], table: str, *indexes: str, reads: float) -> None:
    """No row of `table` is met but by `indexes`, and at most `reads` are."""
    found = [node for node in plan if node.get("Relation Name") == table]
    assert found
    assert "Seq Scan" not in {node["Node Type"] for node in found}
    by_index = {node["Index Name"] for node in found if "Index Name" in node}
    bitmaps = {node["Index Name"] for node in plan if node["Node Type"] == "Bitmap Index Scan"}
    assert set(indexes) <= by_index | bitmaps
    assert by_index <= set(indexes)
    assert most_rows(plan, table) <= reads


def most_rows(plan: list[dict[str, Any]], table: str) -> float:
    return max(
        float((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
        for node in plan
        if node.get("Relation Name") == table
    )

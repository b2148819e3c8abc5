"""Comparing a tenant's rows with those that were folded from its ledger."""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Table
from opsentry.projections.engine.replay import Chunk


class Difference(NamedTuple):
    """A row that is not what the ledger gives: `live` or `folded` is `None` where that side has none."""

    table: str
    live: dict[str, Any] | None
    folded: dict[str, Any] | None


async def compare(connection: Connection, tables: Sequence[Table], tenant_id: int, derived: Chunk) -> Difference | None:
    """Return the first row of the chunk's streams that is not what was derived, `None` if none is."""
    for table in tables:
        if derived.kind not in table.of_streams:
            continue
        rows = await connection.fetch(
            f"SELECT {', '.join(table.columns)} FROM {table.name}"
            f" WHERE tenant_id = $1 AND {table.of_streams[derived.kind]}",
            tenant_id,
            derived.first,
            derived.last,
        )
        if (difference := _first_difference(table, rows, derived.rows.get(table.name, ()))) is not None:
            return difference
    return None


async def compare_summaries(connection: Connection, tables: Sequence[Table], tenant_id: int) -> Difference | None:
    """Return the first row of a summary that is not what it should be, going by rows that were compared before."""
    for table in tables:
        if table.summary is None:
            continue
        live = await connection.fetch(
            f"SELECT {', '.join(table.columns)} FROM {table.name} WHERE tenant_id = $1", tenant_id
        )
        wanted = await connection.fetch(table.summary, tenant_id)
        if (difference := _first_difference(table, live, wanted)) is not None:
            return difference
    return None


def _first_difference(
    table: Table, live_rows: Iterable[Sequence[Any]], folded_rows: Iterable[Sequence[Any]]
) -> Difference | None:
    live, folded = dict(map(keyed(table), live_rows)), dict(map(keyed(table), folded_rows))
    if live == folded:
        return None
    key = min(key for key in live.keys() | folded.keys() if live.get(key) != folded.get(key))
    return Difference(table.name, _named(table, live.get(key)), _named(table, folded.get(key)))


def keyed(table: Table) -> Callable[[Sequence[Any]], tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Return a function that gives a row's key and all its values, as they can be compared."""

    def of(row: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        values = tuple(map(_comparable, row))
        return values[: table.keys], values

    return of


def _comparable(value: Any) -> Any:
    """Return a value as it is derived; the driver reads arrays as lists, and `infinity` as a time of no zone."""
    if isinstance(value, list):
        return tuple(value)
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


def _named(table: Table, values: tuple[Any, ...] | None) -> dict[str, Any] | None:
    return None if values is None else dict(zip(table.columns, values, strict=True))

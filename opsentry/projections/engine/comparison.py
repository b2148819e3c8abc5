"""Compare a tenant's stored rows with the rows that a replay of its ledger gives."""

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Table
from opsentry.projections.engine.replay import ReplayedChunk


class Difference(NamedTuple):
    """A row that differs from the ledger.

    Attributes:
        table: The name of the table.
        stored: The row in the table; `None` if only the replay gives one.
        replayed: The row that the replay gives; `None` if only the table has one.
    """

    table: str
    stored: dict[str, Any] | None
    replayed: dict[str, Any] | None


async def compare(
    connection: Connection, tables: Sequence[Table], tenant_id: int, chunk: ReplayedChunk
) -> Difference | None:
    """Return the first stored row of the chunk's streams that differs from the replay; `None` if all are equal."""
    for table in tables:
        if chunk.kind not in table.of_streams:
            continue
        # The table's rows of these streams.
        rows = await connection.fetch(
            f"SELECT {', '.join(table.columns)} FROM {table.name}"
            f" WHERE tenant_id = $1 AND {table.of_streams[chunk.kind]}",
            tenant_id,
            chunk.first_id,
            chunk.last_id,
        )
        if (difference := _first_difference(table, map(tuple, rows), chunk.rows.get(table.name, ()))) is not None:
            return difference
    return None


async def compare_summaries(connection: Connection, tables: Sequence[Table], tenant_id: int) -> Difference | None:
    """Return the first summary row that does not sum up the rows in the database; `None` if all do.

    The summarized rows themselves are compared before, by `compare`.
    """
    for table in tables:
        if table.summary is None:
            continue
        # All of the tenant's summary rows.
        stored = await connection.fetch(
            f"SELECT {', '.join(table.columns)} FROM {table.name} WHERE tenant_id = $1", tenant_id
        )
        computed = await connection.fetch(table.summary, tenant_id)
        if (difference := _first_difference(table, map(tuple, stored), map(tuple, computed))) is not None:
            return difference
    return None


def _first_difference(
    table: Table, stored_rows: Iterable[Sequence[Any]], replayed_rows: Iterable[Sequence[Any]]
) -> Difference | None:
    stored, replayed = dict(map(keyed(table), stored_rows)), dict(map(keyed(table), replayed_rows))
    if stored == replayed:
        return None
    key = min(key for key in stored.keys() | replayed.keys() if stored.get(key) != replayed.get(key))
    return Difference(table.name, _named(table, stored.get(key)), _named(table, replayed.get(key)))


def keyed(table: Table) -> Callable[[Sequence[Any]], tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Return a function that splits a row into its key and its comparable values."""

    def key_and_values(row: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        values = tuple(map(_comparable, row))
        return values[: table.keys], values

    return key_and_values


def _comparable(value: Any) -> Any:
    """Return a value as a replay gives it.

    The driver reads arrays as lists, and `infinity` as a datetime without a time zone.
    """
    if isinstance(value, list):
        return tuple(value)
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


def _named(table: Table, values: tuple[Any, ...] | None) -> dict[str, Any] | None:
    return None if values is None else dict(zip(table.columns, values, strict=True))

"""Queries of operators: how projections and sending stand, over all tenants."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from opsentry.infrastructure.postgres import Connection, Database, Record
from opsentry.infrastructure.single_flight import TtlCache
from opsentry.notifications.delivery import management as sending
from opsentry.projections.engine import management
from opsentry.projections.engine.projection import Projection

CACHE_SECONDS = 1.0
# These queries take less with 100,000 tenants.
QUERY_TIMEOUT_SECONDS = 10.0
MAX_ROWS = 1_000

OperatorQuery = Callable[[Connection], Awaitable[Sequence[Record]]]


class OperatorQueries:
    """Runs each query once for all who ask within a second, because it goes over all tenants."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._queries: Mapping[str, OperatorQuery] = {
            "projections": lambda connection: management.projection_status(connection, projections),
            "outbox": lambda connection: sending.sending_status(connection, limit=MAX_ROWS),
            "halted": lambda connection: management.list_halted(connection, limit=MAX_ROWS),
        }
        self._rows: TtlCache[str, Sequence[Mapping[str, Any]]] = TtlCache(
            self._query, ttl_seconds=CACHE_SECONDS, max_entries=len(self._queries)
        )

    async def projections(self) -> Sequence[Mapping[str, Any]]:
        """Return for each projection how many tenants are up to date, behind and halted, and the lag."""
        return await self._rows.get("projections")

    async def halted(self) -> Sequence[Mapping[str, Any]]:
        """Return each projection that an event halted, and why."""
        return await self._rows.get("halted")

    async def outbox(self) -> Sequence[Mapping[str, Any]]:
        """Return for each tenant with unfinished deliveries how many are due, pending and exhausted."""
        return await self._rows.get("outbox")

    async def _query(self, name: str) -> Sequence[Mapping[str, Any]]:
        async with self._database.connection(QUERY_TIMEOUT_SECONDS) as connection:
            return [dict(row) for row in await self._queries[name](connection)]

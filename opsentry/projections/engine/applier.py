"""Apply the events of a tenant's ledger to projections, batch by batch, each event exactly once."""

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import structlog

from opsentry.events import store
from opsentry.events.codec import RecordedEvent, UnknownEvent
from opsentry.infrastructure.postgres import Connection, Database, TransientError, is_transient
from opsentry.projections.engine.projection import Projection, WriterRows, writer_call
from opsentry.projections.engine.states import STATE

_log = structlog.get_logger()

# Inserts the checkpoints that a new tenant or a new projection lacks.
_ENSURE_CHECKPOINTS = """
INSERT INTO checkpoints (tenant_id, projection, generation)
SELECT $1, name, coalesce((SELECT generation FROM projections p WHERE p.name = new.name), 0)
FROM unnest($2::text[]) AS new (name) ON CONFLICT DO NOTHING
"""

# Selects the tenant's checkpoints, without a lock.
_SELECT_CHECKPOINTS = f"""
SELECT c.projection, c.position, c.rebuilt_at, {STATE} AS state
FROM checkpoints c LEFT JOIN projections p ON p.name = c.projection WHERE c.tenant_id = $1 AND c.projection = ANY($2)
"""

# Deletes the tenant's rows of `projection_backlog` up to $2, as far as all running projections have come.
_TRIM_BACKLOG = "SELECT trim_backlog($1, $2)"

# Halts a projection at event $3, unless another process, which may know the event, has passed it meanwhile, or has
# rebuilt the rows since $6. Rows of newer code than this may be the cause of the failure; then the newer code rebuilds
# them.
_HALT = """
UPDATE checkpoints c SET halted_at = $3, halt_error = $4, generation = CASE WHEN EXISTS (
    SELECT FROM projections p WHERE p.name = c.projection AND p.version > $5) THEN -1 ELSE generation END
WHERE tenant_id = $1 AND projection = $2 AND position = $3 - 1 AND halted_at IS NULL
    AND rebuilt_at IS NOT DISTINCT FROM $6
"""

BATCH_EVENTS = 500
CATCH_UP_TIMEOUT_SECONDS = 30.0
MAX_KNOWN_TENANTS = 10_000
"""Of how many tenants a process remembers the position of the checkpoints."""


class PoisonEvent(Exception):
    """A projection cannot apply an event; the projection's rows, last rebuilt at `rebuilt_at`, are unchanged."""

    def __init__(self, projection: str, position: int, error: str, rebuilt_at: datetime | None = None) -> None:
        super().__init__(f"{projection} cannot apply event {position}: {error}")
        self.projection = projection
        self.position = position
        self.error = error
        self.rebuilt_at = rebuilt_at


class Applier:
    """Applies events to projections: reads without locks, then writes rows and checkpoints in one statement.

    The statement writes nothing if another process has moved the checkpoints or rebuilt the rows meanwhile. So each
    event applies exactly once, and a process that hangs holds no lock.
    """

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._projections = sorted(projections, key=attrgetter("name"))
        self._names = [projection.name for projection in self._projections]
        self._versions = {projection.name: projection.version for projection in self._projections}
        self._known: dict[int, _Checkpoints] = {}

    @property
    def projections(self) -> Sequence[Projection]:
        """The projections that this applier serves, by name."""
        return self._projections

    async def apply(self, tenant_id: int, events: Sequence[RecordedEvent] = (), until: int | None = None) -> int:
        """Apply unprojected events, batch by batch; return the position reached.

        Args:
            tenant_id: The tenant.
            events: Events that the caller has, in any order. Those that follow the last batch are not read again.
            until: The position to reach: what comes later may be left to others. `None` means the end of the ledger.

        Raises:
            DatabaseUnavailable: The database was lost; the last batch may or may not be applied.
        """
        following = self._following(tenant_id, events)
        # After a failed batch: how many steps still apply one event to one projection, to find the poison event.
        single_steps = 0
        while True:
            try:
                async with self._database.connection(CATCH_UP_TIMEOUT_SECONDS) as connection:
                    known = self._known.get(tenant_id)
                    if following and known is not None and known.position == following[0].position - 1:
                        batch, following = following[:BATCH_EVENTS], following[BATCH_EVENTS:]
                        reached, has_more = batch[-1].position, bool(following)
                        await self._apply_batch(connection, tenant_id, known, batch)
                    else:
                        following = []
                        reached, has_more = await self._step(connection, tenant_id, until, single=single_steps > 0)
            except _OtherWriter:
                following = []
                continue
            except _BatchFailed:
                following = []
                single_steps = BATCH_EVENTS * len(self._projections)
                continue
            except PoisonEvent as poison:
                await self._halt(tenant_id, poison)
                single_steps = 0
                continue
            single_steps = max(0, single_steps - 1)
            if not has_more:
                return reached

    def _following(self, tenant_id: int, events: Sequence[RecordedEvent]) -> list[RecordedEvent]:
        """Return those of `events` that follow the last batch without a gap."""
        known = self._known.get(tenant_id)
        following: list[RecordedEvent] = []
        if known is not None:
            for event in sorted(events, key=attrgetter("position")):
                if event.position == known.position + len(following) + 1:
                    following.append(event)
        return following

    async def _step(
        self, connection: Connection, tenant_id: int, until: int | None, *, single: bool
    ) -> tuple[int, bool]:
        """Read and apply one batch; return the position reached and whether there is more."""
        rows = await connection.fetch(_SELECT_CHECKPOINTS, tenant_id, self._names)
        if len(rows) < len(self._names):
            await connection.execute(_ENSURE_CHECKPOINTS, tenant_id, self._names)
            rows = await connection.fetch(_SELECT_CHECKPOINTS, tenant_id, self._names)
        positions = {row["projection"]: int(row["position"]) for row in rows if row["state"] == "running"}
        if not positions:
            # All are halted or paused; a retry or a resume adds the tenant to the backlog again.
            head = await store.read_head_position(connection, tenant_id)
            await connection.execute(_TRIM_BACKLOG, tenant_id, head)
            return head, False
        lowest = min(positions.values())
        if until is not None and lowest >= until:
            return lowest, False
        # Projections at the same position advance together; those further behind catch up first.
        group = [p for p in self._projections if positions.get(p.name) == lowest]
        next_position = min((position for position in positions.values() if position > lowest), default=None)
        limit = BATCH_EVENTS if next_position is None else min(BATCH_EVENTS, next_position - lowest)
        if single:
            group, limit = group[:1], 1
        rebuilt = {row["projection"]: row["rebuilt_at"] for row in rows}
        checkpoints = _Checkpoints(lowest, group, [rebuilt[projection.name] for projection in group])
        try:
            events = await store.read_after(connection, tenant_id, lowest, limit)
        except UnknownEvent as error:
            if limit > 1 or len(group) > 1:
                raise _BatchFailed from error
            if error.kind in group[0].kinds:
                raise PoisonEvent(group[0].name, lowest + 1, str(error), checkpoints.rebuilt[0]) from error
            # The projection does not read streams of this kind, so it can skip the event.
            await self._write(connection, tenant_id, checkpoints, lowest + 1, [])
            return lowest + 1, True
        if not events:
            await connection.execute(_TRIM_BACKLOG, tenant_id, lowest)
            return lowest, False
        await self._apply_batch(connection, tenant_id, checkpoints, events)
        return events[-1].position, len(events) == limit or next_position is not None or len(group) < len(positions)

    async def _apply_batch(
        self, connection: Connection, tenant_id: int, checkpoints: "_Checkpoints", events: Sequence[RecordedEvent]
    ) -> None:
        """Bring the projections of `checkpoints` up to `events`, which follow their position."""
        writers: list[tuple[str, WriterRows]] = []
        group = checkpoints.projections
        projection = group[0]
        try:
            for projection in group:
                if wanted := [event for event in events if event.kind in projection.kinds]:
                    writers.append((projection.writer, await projection.prepare(connection, tenant_id, wanted)))
            await self._write(connection, tenant_id, checkpoints, events[-1].position, writers)
        except Exception as error:
            if is_transient(error):
                raise
            if len(events) == 1 and len(group) == 1:
                cause = f"{type(error).__name__}: {error}"
                raise PoisonEvent(projection.name, events[0].position, cause, checkpoints.rebuilt[0]) from error
            raise _BatchFailed from error

    async def _write(
        self,
        connection: Connection,
        tenant_id: int,
        checkpoints: "_Checkpoints",
        reached: int,
        writers: Sequence[tuple[str, WriterRows]],
    ) -> None:
        """Write the rows of all writers and move `checkpoints` to `reached`, or do nothing.

        Raises:
            _OtherWriter: The checkpoints are no longer as given, or a projection is halted or paused.
        """
        self._known.pop(tenant_id, None)
        names = [projection.name for projection in checkpoints.projections]
        row = await connection.fetchrow(
            _write_query(tuple((writer, len(rows)) for writer, rows in writers)),
            tenant_id,
            names,
            [self._versions[name] for name in names],
            checkpoints.rebuilt,
            checkpoints.position,
            reached,
            *(each for _, rows in writers for each in rows),
        )
        if row is None:
            raise _OtherWriter
        if len(names) == len(self._projections):
            if len(self._known) >= MAX_KNOWN_TENANTS:
                del self._known[next(iter(self._known))]
            self._known[tenant_id] = checkpoints._replace(position=reached)

    async def _halt(self, tenant_id: int, poison: PoisonEvent) -> None:
        _log.error("projection_halted", tenant_id=tenant_id, projection=poison.projection, position=poison.position)
        async with self._database.transaction() as connection:
            version = self._versions[poison.projection]
            await connection.execute(
                _HALT, tenant_id, poison.projection, poison.position, poison.error, version, poison.rebuilt_at
            )


class _Checkpoints(NamedTuple):
    """A tenant's checkpoints as they were read: rows that were read afterwards are as old or newer.

    Attributes:
        position: The position of all of them.
        projections: Their projections, by name.
        rebuilt: When each was last rebuilt.
    """

    position: int
    projections: Sequence[Projection]
    rebuilt: Sequence[datetime | None]


class _BatchFailed(Exception):
    """A batch of several events or projections failed; which event is the cause is not known yet."""


class _OtherWriter(TransientError):
    """Another process has changed the checkpoints; nothing was written."""


@lru_cache(maxsize=1024)
def _write_query(writers: tuple[tuple[str, int], ...]) -> str:
    """Return SQL that advances checkpoints and calls the writers, given by name and number of lists; no row: refused.

    FROM comes first: the checkpoints are locked before the writers run.
    """
    calls, first = ["true"], 7
    for writer, lists in writers:
        calls.append(writer_call(writer, lists, first))
        first += lists
    return f"SELECT {', '.join(calls)} FROM advance_checkpoints($1, $2, $3, $4, $5, $6) AS advanced WHERE advanced"

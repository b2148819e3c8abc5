"""Deriving read models anew, and comparing them with what the ledger gives, without anybody's noticing.

A tenant's rebuild is one transaction. It folds the ledger stream by stream, without any lock, into rows that it keeps
aside; then it locks the checkpoints, replaces the tenant's rows, applies what came meanwhile, and commits. Readers see
the old rows until then; a process that is killed leaves nothing behind.
"""

import tempfile
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import IO, Any, NamedTuple, Self

import msgspec
import structlog

from opsentry.events import log
from opsentry.events.codec import UnknownEvent
from opsentry.postgres import Connection, Database, is_passing
from opsentry.projections.operations import register
from opsentry.projections.projection import Projection, Rows, Streams, Table
from opsentry.projections.runner import Poison

_log = structlog.get_logger()

# So many events are folded at once: enough to make round trips cheap, few enough to stay small.
_CHUNK = 2_000
_TAIL = 500
# Rows beyond so many wait in a file.
_IN_MEMORY = 30_000
_PATIENCE = 24 * 3600.0

# Only one rebuild of a tenant at a time; whoever comes second leaves it to the first. Whoever stands still in the
# transaction is thrown out of it. A read model can be derived again, so its commit need not wait for the disk.
_ALONE = """
SELECT pg_try_advisory_xact_lock(hashtextextended('rebuild', $1)),
    set_config('idle_in_transaction_session_timeout', '60s', true), set_config('synchronous_commit', 'off', true)
"""

# Which of these projections are still to be rebuilt for the tenant by code of these versions, and to which generation.
_WANTED = """
SELECT c.projection, p.generation FROM unnest($2::text[], $3::int[]) AS own (name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version AND NOT p.paused
JOIN checkpoints c ON c.projection = p.name AND c.tenant_id = $1
WHERE c.generation < p.generation AND c.rebuild_error IS NULL
"""

# Taken in the same order as a pass does, and with the same impatience.
_LOCK = """
SELECT projection, (SELECT set_config('idle_in_transaction_session_timeout', '3s', true)) AS setting
FROM checkpoints WHERE tenant_id = $1 AND projection = ANY($2) ORDER BY projection FOR NO KEY UPDATE
"""

# The generation is the one that was asked for when the fold began: whoever asked since is not answered by it.
_DONE = """
UPDATE checkpoints c SET position = $4, parked_seq = NULL, error = NULL, rebuild_seq = NULL, rebuild_error = NULL,
    generation = wanted.generation, rebuilt_at = clock_timestamp()
FROM unnest($2::text[], $3::int[]) AS wanted (name, generation)
WHERE c.tenant_id = $1 AND c.projection = wanted.name
"""

# Unless somebody else could do it meanwhile.
_FAILED = """
UPDATE checkpoints c SET rebuild_seq = $4, rebuild_error = $5 FROM unnest($2::text[], $3::int[]) AS own (name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version
WHERE c.tenant_id = $1 AND c.projection = p.name AND c.generation < p.generation
"""

# A rebuild of all tenants begins by raising the generation, unless one is under way: then it goes on. What failed in
# one is tried again. It is done with the version that this code has.
_BEGIN = """
UPDATE projections p SET version = new.version, generation = generation + CASE
    WHEN p.version = new.version AND EXISTS (
        SELECT FROM checkpoints c WHERE c.projection = p.name AND c.generation < p.generation
        AND c.rebuild_error IS NULL) THEN 0 ELSE 1 END
FROM unnest($1::text[], $2::int[]) AS new (name, version) WHERE p.name = new.name
"""
_TRY_AGAIN = """
UPDATE checkpoints SET rebuild_seq = NULL, rebuild_error = NULL
WHERE projection = ANY($1) AND rebuild_error IS NOT NULL AND ($2::bigint IS NULL OR tenant_id = $2)
"""

# The same for one tenant.
_BEGIN_ONE = "UPDATE checkpoints SET generation = -1 WHERE projection = ANY($1) AND tenant_id = $2 AND generation >= 0"

# Tenants that are still to be rebuilt, found by the index: as much work as there are such tenants. Rows of a version
# that this code does not have are left to code that has it, and those to which older code that still runs has added
# after they were done are not done again before $4 seconds are over.
_LEFT = """
SELECT DISTINCT left_over.tenant_id FROM unnest($1::text[], $2::int[]) AS own (name, version)
JOIN projections p ON p.name = own.name AND p.version = own.version AND NOT p.paused
CROSS JOIN LATERAL (
    SELECT tenant_id FROM checkpoints c
    WHERE c.projection = p.name AND c.generation < p.generation AND c.rebuild_error IS NULL
        AND (c.generation >= 0 OR c.rebuilt_at IS NULL
            OR c.rebuilt_at <= clock_timestamp() - $4 * interval '1 second')
    ORDER BY c.generation LIMIT $3) AS left_over
"""

# How many events tenants have.
_SIZES = "SELECT tenant_id, seq FROM heads WHERE tenant_id = ANY($1) ORDER BY seq DESC"

_POSITION = "SELECT position, parked_seq FROM checkpoints WHERE tenant_id = $1 AND projection = $2"


async def _go_on() -> None:
    return None


def _own(projections: Sequence[Projection]) -> tuple[list[str], list[int]]:
    return [projection.name for projection in projections], [projection.version for projection in projections]


class _NoLongerWanted(Exception):
    """Somebody has changed what is to be rebuilt, while it was."""


class Rebuilder:
    """Derives rows anew, tenant by tenant."""

    def __init__(self, database: Database, projections: Sequence[Projection]) -> None:
        self._database = database
        self._projections = sorted(projections, key=attrgetter("name"))
        self._names = [projection.name for projection in self._projections]
        self._versions = [projection.version for projection in self._projections]

    async def begin(self, tenant_id: int | None = None) -> None:
        """Have the rows of all tenants, or of one, derived anew; go on with what is under way already."""
        async with self._database.connection(60) as connection, connection.transaction():
            await register(connection, self._projections)
            if tenant_id is None:
                await connection.execute(_BEGIN, self._names, self._versions)
            else:
                await connection.execute(_BEGIN_ONE, self._names, tenant_id)
            await connection.execute(_TRY_AGAIN, self._names, tenant_id)

    async def left(self, limit: int, rest: float = 0.0) -> dict[int, int]:
        """Return the tenants that are still to be done, and how many events each has, the longest ledger first.

        At most `limit` of each projection. Rows that were done less than `rest` seconds ago are left to rest where
        older code has added to them since.
        """
        async with self._database.connection(60) as connection:
            rows = await connection.fetch(_LEFT, self._names, self._versions, limit, rest)
            sizes = await connection.fetch(_SIZES, [row["tenant_id"] for row in rows])
            return {row["tenant_id"]: row["seq"] for row in sizes}

    async def rebuild(
        self,
        tenant_id: int,
        *,
        advance: Callable[[int], None] = lambda _events: None,
        breathe: Callable[[], Awaitable[None]] = _go_on,
        chunk: int = _CHUNK,
    ) -> list[str]:
        """Derive anew what is to be derived of a tenant; return the names of the projections that were.

        Nothing is done where somebody else is at it just now. A projection that meets an event that it cannot apply
        has its rows left as they were, and says so among what is parked; so does one whose rows cannot be written.

        Args:
            tenant_id: The tenant.
            advance: Called with the number of events that were folded.
            breathe: Awaited after each chunk, while nothing is locked.
            chunk: So many events are folded at once.

        Raises:
            DatabaseUnavailable: The database was lost; the rows are as they were.
        """
        tried = self._projections
        while tried:
            try:
                return await self._rebuild(tenant_id, tried, advance, breathe, chunk)
            except _NoLongerWanted:
                return []
            except Poison as poison:
                failed = [projection for projection in tried if projection.name == poison.projection]
                await self._fail(tenant_id, failed, poison.seq, poison.error)
                tried = [projection for projection in tried if projection not in failed]
            except Exception as error:
                if is_passing(error):
                    raise
                await self._fail(tenant_id, tried, None, f"{type(error).__name__}: {error}")
                raise
        return []

    async def _fail(self, tenant_id: int, failed: Sequence[Projection], seq: int | None, error: str) -> None:
        names = [projection.name for projection in failed]
        _log.error("rebuild failed", tenant_id=tenant_id, projections=names, seq=seq)
        async with self._database.transaction(60) as connection:
            await connection.execute(_FAILED, tenant_id, *_own(failed), seq, error)

    async def _rebuild(
        self,
        tenant_id: int,
        projections: Sequence[Projection],
        advance: Callable[[int], None],
        breathe: Callable[[], Awaitable[None]],
        chunk: int,
    ) -> list[str]:
        async with self._database.transaction(_PATIENCE) as connection:
            if not await connection.fetchval(_ALONE, tenant_id):
                return []
            rows = await connection.fetch(_WANTED, tenant_id, *_own(projections))
            wanted = {row["projection"]: row["generation"] for row in rows}
            group = [projection for projection in projections if projection.name in wanted]
            if not group:
                return []
            end = await log.head(connection, tenant_id)
            with Staged() as staged:
                async for derived in fold(connection, group, tenant_id, end, chunk):
                    staged.add(derived.rows)
                    advance(derived.events)
                    await breathe()
                await connection.fetch(_LOCK, tenant_id, list(wanted))
                # What was paused or raised since is not for this code to replace; it begins again where it is wanted.
                if len(await connection.fetch(_WANTED, tenant_id, *_own(group))) < len(group):
                    raise _NoLongerWanted
                await _replace(connection, [table for each in group for table in each.tables], tenant_id, staged)
            end = await _apply_tail(connection, group, tenant_id, end)
            await connection.execute(_DONE, tenant_id, list(wanted), list(wanted.values()), end)
            return list(wanted)

    async def verify(
        self, projection: Projection, tenant_id: int, advance: Callable[[int], None] = lambda _events: None
    ) -> "Difference | None":
        """Return the first row that differs from what the ledger gives up to the checkpoint, `None` if none does.

        Nothing is locked: the ledger and the rows are read as they were at one moment.

        Raises:
            Poison: An event before the checkpoint cannot be applied.
            DatabaseUnavailable: The database was lost.
        """
        async with (
            self._database.connection(_PATIENCE) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            row = await connection.fetchrow(_POSITION, tenant_id, projection.name)
            shown = 0 if row is None else row["position"]
            async for derived in fold(connection, [projection], tenant_id, shown, _CHUNK):
                difference = await _compare(connection, projection.tables, tenant_id, derived)
                if difference is not None:
                    return difference
                advance(derived.events)
            return await _compare_summaries(connection, projection.tables, tenant_id)


# ------------------------------------------------------------------------------------------------ folding


class Chunk(NamedTuple):
    """Rows of whole streams of a kind: all those with ids from `first` to `last`."""

    kind: str
    first: int
    last: int
    events: int
    rows: Rows


async def fold(
    connection: Connection, projections: Sequence[Projection], tenant_id: int, until: int, size: int
) -> AsyncIterator[Chunk]:
    """Yield what `projections` make of a tenant's ledger up to position `until`, without writing anything.

    Raises:
        Poison: A projection cannot apply an event.
    """
    derivers = [(projection, projection.deriver()) for projection in projections]
    for kind in _kinds(projections):
        readers = [(projection, derive) for projection, derive in derivers if kind in projection.kinds]
        first = 0
        pages = log.read_by_stream(connection, tenant_id, kind, until, size)
        while True:
            try:
                streams = await anext(pages, None)
            except UnknownEvent as error:
                raise Poison(readers[0][0].name, error.seq or 0, str(error)) from error
            rows: Rows = {}
            for projection, derive in readers:
                try:
                    rows |= derive(kind, streams or {})
                except Exception as error:
                    raise _blame(projection, kind, streams or {}, error) from error
            if streams is None:
                # Ids behind the last stream's belong to this chunk, which has no streams: nothing may be there.
                yield Chunk(kind, first, 2**63 - 1, 0, rows)
                break
            last = max(streams)
            yield Chunk(kind, first, last, sum(map(len, streams.values())), rows)
            first = last + 1


def _kinds(projections: Sequence[Projection]) -> list[str]:
    """Return the kinds of streams that `projections` read, in an order that suits all of them."""
    kinds: list[str] = []
    for projection in sorted(projections, key=lambda projection: -len(projection.kinds)):
        kinds += [kind for kind in projection.kinds if kind not in kinds]
    return kinds


def _blame(projection: Projection, kind: str, streams: Streams, error: Exception) -> Poison:
    """Return the poison: the first event without which its stream can be folded up to there."""

    def failure(number: int, length: int) -> Exception | None:
        try:
            projection.deriver()(kind, {number: streams[number][:length]})
        except Exception as blamed:  # noqa: BLE001 - whatever it is that the event is to blame for
            return blamed
        return None

    for number, stream in streams.items():
        if failure(number, len(stream)) is not None:
            # A stream that cannot be folded up to some event cannot be folded further either.
            first = bisect_left(range(len(stream)), 1, key=lambda place: int(failure(number, place + 1) is not None))
            blamed = failure(number, first + 1)
            return Poison(projection.name, stream[first].seq, f"{type(blamed).__name__}: {blamed}")
    raise error


# ------------------------------------------------------------------------------------------------ rows kept aside


class NoRoom(Exception):
    """Rows that wait to be written found no room in a file."""


class Staged:
    """Rows that were derived and are not written yet: in memory while they are few, then in a file."""

    def __init__(self) -> None:
        self._rows: Rows = {}
        self._count = 0
        self._file: IO[bytes] | None = None
        self._blocks: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, rows: Mapping[str, Sequence[tuple[Any, ...]]]) -> None:
        """Keep `rows` aside."""
        for table, new in rows.items():
            self._rows.setdefault(table, []).extend(new)
            self._count += len(new)
        if self._count > _IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        try:
            self._write()
        except OSError as error:
            # In words of its own, as it would pass for a lost database.
            raise NoRoom(f"rows cannot be kept aside in {tempfile.gettempdir()}: {error}") from error
        self._rows, self._count = {}, 0

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="opsentry-rebuild-")  # noqa: SIM115 - closed by __exit__
        for table, rows in self._rows.items():
            block = msgspec.msgpack.encode(rows)
            self._blocks.setdefault(table, []).append((self._file.tell(), len(block)))
            self._file.write(block)

    def of(self, table: str) -> Iterator[Sequence[Sequence[Any]]]:
        """Yield all rows of a table, some at a time."""
        for place, length in self._blocks.get(table, ()):
            assert self._file is not None  # noqa: S101 - there are blocks
            self._file.seek(place)
            yield msgspec.msgpack.decode(self._file.read(length))
        if self._file is not None:
            self._file.seek(0, 2)
        if rows := self._rows.get(table):
            yield rows


async def _replace(connection: Connection, tables: Sequence[Table], tenant_id: int, staged: Staged) -> None:
    """Put the rows kept aside in the place of the tenant's rows."""
    deletes = (f"d{n} AS (DELETE FROM {table.name} WHERE tenant_id = $1)" for n, table in enumerate(tables))
    await connection.execute(f"WITH {', '.join(deletes)} SELECT", tenant_id)
    for table in tables:
        for rows in staged.of(table.name):
            await connection.copy_records_to_table(
                table.name, records=[(tenant_id, *row) for row in rows], columns=("tenant_id", *table.columns)
            )
    for table in tables:
        if table.summary is not None:
            columns = ", ".join(("tenant_id", *table.columns))
            await connection.execute(
                f"INSERT INTO {table.name} ({columns}) SELECT $1, summary.* FROM ({table.summary}) AS summary",
                tenant_id,
            )


async def _apply_tail(connection: Connection, group: Sequence[Projection], tenant_id: int, position: int) -> int:
    """Apply what was appended meanwhile, with the checkpoints locked; return the position reached."""
    end = await log.head(connection, tenant_id)
    while position < end:
        until = min(position + _TAIL, end)
        for projection in group:
            try:
                events = await log.read_between(connection, tenant_id, position, until, projection.kinds)
                if events:
                    await projection.apply(connection, tenant_id, events)
            except UnknownEvent as error:
                raise Poison(projection.name, error.seq or until, str(error)) from error
            except Exception as error:
                if is_passing(error):
                    raise
                # Whoever catches up comes to the same event and names it.
                blamed = f"in events {position + 1} to {until}: {type(error).__name__}: {error}"
                raise Poison(projection.name, until, blamed) from error
        position = until
    return end


# ------------------------------------------------------------------------------------------------ comparing


class Difference(NamedTuple):
    """A row that is not what the ledger gives: `live` or `folded` is `None` where that side has none."""

    table: str
    live: dict[str, Any] | None
    folded: dict[str, Any] | None


async def _compare(
    connection: Connection, tables: Sequence[Table], tenant_id: int, derived: Chunk
) -> Difference | None:
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


async def _compare_summaries(connection: Connection, tables: Sequence[Table], tenant_id: int) -> Difference | None:
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
    live, folded = dict(map(_keyed(table), live_rows)), dict(map(_keyed(table), folded_rows))
    if live == folded:
        return None
    key = min(key for key in live.keys() | folded.keys() if live.get(key) != folded.get(key))
    return Difference(table.name, _named(table, live.get(key)), _named(table, folded.get(key)))


def _keyed(table: Table) -> Callable[[Sequence[Any]], tuple[tuple[Any, ...], tuple[Any, ...]]]:
    def keyed(row: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        values = tuple(map(_comparable, row))
        return values[: table.keys], values

    return keyed


def _comparable(value: Any) -> Any:
    """Return a value as it is derived; the driver reads arrays as lists, and `infinity` as a time of no zone."""
    if isinstance(value, list):
        return tuple(value)
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


def _named(table: Table, values: tuple[Any, ...] | None) -> dict[str, Any] | None:
    return None if values is None else dict(zip(table.columns, values, strict=True))

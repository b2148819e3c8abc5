"""Replay a tenant's ledger into rows without writing them, and stage such rows until they are written."""

import tempfile
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Self

import msgspec

from opsentry.events import store
from opsentry.events.codec import UnknownEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.applier import PoisonEvent
from opsentry.projections.engine.projection import Projection, Rows, Streams

MAX_ROWS_IN_MEMORY = 30_000
"""Staged rows beyond this number move to a temporary file."""

_MAX_ID = 2**63 - 1


class ReplayedChunk(NamedTuple):
    """The rows of whole streams of a kind: of all streams with ids from `first_id` to `last_id`."""

    kind: str
    first_id: int
    last_id: int
    events: int
    rows: Rows


async def replay(
    connection: Connection, projections: Sequence[Projection], tenant_id: int, until: int, chunk_events: int
) -> AsyncIterator[ReplayedChunk]:
    """Yield the rows that `projections` derive from a tenant's ledger up to position `until`.

    Args:
        connection: Reads the ledger; nothing is written.
        projections: The projections to replay.
        tenant_id: The tenant.
        until: The last position to read.
        chunk_events: The number of events in a chunk, give or take the last stream's.

    Raises:
        PoisonEvent: A projection cannot apply an event.
    """
    replayers = [(projection, projection.replayer()) for projection in projections]
    for kind in _kinds(projections):
        readers = [(projection, replayer) for projection, replayer in replayers if kind in projection.kinds]
        first_id = 0
        pages = store.read_by_stream(connection, tenant_id, kind, until, chunk_events)
        while True:
            try:
                streams = await anext(pages, None)
            except UnknownEvent as error:
                raise PoisonEvent(readers[0][0].name, error.position or 0, str(error)) from error
            rows: Rows = {}
            for projection, replayer in readers:
                try:
                    rows |= replayer(kind, streams or {})
                except Exception as error:
                    raise _find_poison(projection, kind, streams or {}, error) from error
            if streams is None:
                # The last chunk covers the ids behind the last stream, so a comparison finds rows of no stream.
                yield ReplayedChunk(kind, first_id, _MAX_ID, 0, rows)
                break
            last_id = max(streams)
            yield ReplayedChunk(kind, first_id, last_id, sum(map(len, streams.values())), rows)
            first_id = last_id + 1


def _kinds(projections: Sequence[Projection]) -> list[str]:
    """Return the stream kinds that `projections` read, in an order that suits all of them."""
    kinds: list[str] = []
    for projection in sorted(projections, key=lambda projection: -len(projection.kinds)):
        kinds += [kind for kind in projection.kinds if kind not in kinds]
    return kinds


def _find_poison(projection: Projection, kind: str, streams: Streams, error: Exception) -> PoisonEvent:
    """Find the first event that the projection cannot apply, and return it as a `PoisonEvent`.

    Raises:
        Exception: The original `error`, if each stream alone can be replayed.
    """

    def failure(stream_id: int, length: int) -> Exception | None:
        try:
            projection.replayer()(kind, {stream_id: streams[stream_id][:length]})
        except Exception as cause:  # noqa: BLE001 - any failure of a projection is the event's
            return cause
        return None

    for stream_id, stream in streams.items():
        if failure(stream_id, len(stream)) is not None:
            # If a replay fails at an event, each longer replay of the stream fails too: bisection finds the first.
            first = bisect_left(range(len(stream)), 1, key=lambda index: int(failure(stream_id, index + 1) is not None))
            cause = failure(stream_id, first + 1)
            return PoisonEvent(projection.name, stream[first].position, f"{type(cause).__name__}: {cause}")
    raise error


class StagingFailed(Exception):
    """Staged rows cannot be written to a temporary file; the tenant's rows are unchanged."""


class StagedRows:
    """Replayed rows that are not written to the database yet: in memory, and beyond a limit in a temporary file."""

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
        """Stage `rows`, given by table.

        Raises:
            StagingFailed: The temporary file cannot be written.
        """
        for table, new in rows.items():
            self._rows.setdefault(table, []).extend(new)
            self._count += len(new)
        if self._count > MAX_ROWS_IN_MEMORY:
            self._spill()

    def _spill(self) -> None:
        try:
            self._write()
        except OSError as error:
            # An OSError would pass for a lost database.
            raise StagingFailed(
                f"cannot stage rows in {tempfile.gettempdir()}: {error}; the tenant's rows are unchanged;"
                " free space there or set TMPDIR"
            ) from error
        self._rows, self._count = {}, 0

    def _write(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="opsentry-rebuild-")  # noqa: SIM115 - closed by __exit__
        for table, rows in self._rows.items():
            block = msgspec.msgpack.encode(rows)
            self._blocks.setdefault(table, []).append((self._file.tell(), len(block)))
            self._file.write(block)

    def of(self, table: str) -> Iterator[Sequence[Sequence[Any]]]:
        """Yield all staged rows of a table, in blocks."""
        for offset, length in self._blocks.get(table, ()):
            assert self._file is not None  # noqa: S101 - blocks exist only in the file
            self._file.seek(offset)
            yield msgspec.msgpack.decode(self._file.read(length))
        if self._file is not None:
            self._file.seek(0, 2)
        if rows := self._rows.get(table):
            yield rows

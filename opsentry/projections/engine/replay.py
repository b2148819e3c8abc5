"""Folding a tenant's ledger into rows without writing them, whole streams at a time; rows that wait to be written."""

import tempfile
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Self

import msgspec

from opsentry.events import store
from opsentry.events.codec import UnknownEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Projection, Rows, Streams
from opsentry.projections.engine.projector import PoisonEvent

# Rows beyond so many wait in a file.
_IN_MEMORY = 30_000


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
        PoisonEvent: A projection cannot apply an event.
    """
    replayers = [(projection, projection.replayer()) for projection in projections]
    for kind in _kinds(projections):
        readers = [(projection, replay) for projection, replay in replayers if kind in projection.kinds]
        first = 0
        pages = store.read_by_stream(connection, tenant_id, kind, until, size)
        while True:
            try:
                streams = await anext(pages, None)
            except UnknownEvent as error:
                raise PoisonEvent(readers[0][0].name, error.position or 0, str(error)) from error
            rows: Rows = {}
            for projection, replay in readers:
                try:
                    rows |= replay(kind, streams or {})
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


def _blame(projection: Projection, kind: str, streams: Streams, error: Exception) -> PoisonEvent:
    """Return the poison: the first event without which its stream can be folded up to there."""

    def failure(number: int, length: int) -> Exception | None:
        try:
            projection.replayer()(kind, {number: streams[number][:length]})
        except Exception as blamed:  # noqa: BLE001 - whatever it is that the event is to blame for
            return blamed
        return None

    for number, stream in streams.items():
        if failure(number, len(stream)) is not None:
            # A stream that cannot be folded up to some event cannot be folded further either.
            first = bisect_left(range(len(stream)), 1, key=lambda place: int(failure(number, place + 1) is not None))
            blamed = failure(number, first + 1)
            return PoisonEvent(projection.name, stream[first].position, f"{type(blamed).__name__}: {blamed}")
    raise error


class NoRoom(Exception):
    """Rows that wait to be written found no room in a file."""


class StagedRows:
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

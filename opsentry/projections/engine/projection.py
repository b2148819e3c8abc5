"""The contract of a projection, and the replay of streams that all projections share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection

V = TypeVar("V")


Streams: TypeAlias = Mapping[int, Sequence[RecordedEvent]]
"""Whole streams of one kind by id, each stream's events in order."""

Rows: TypeAlias = dict[str, list[tuple[Any, ...]]]
"""Rows by the name of their table, each a tuple of the table's `columns`."""

Replay: TypeAlias = Callable[[str, Streams], Rows]
"""Returns the rows of whole streams of a kind."""

WriterRows: TypeAlias = Sequence[Sequence[tuple[Any, ...]]]
"""The arguments of a projection's writer: lists of rows, each a tuple of the attributes of the list's type."""


class Table(NamedTuple):
    """A table that one projection alone writes. Each row belongs to one stream or summarizes other rows.

    Attributes:
        name: The name in the database.
        columns: All columns but `tenant_id`; those of the primary key come first.
        keys: The number of `columns` that belong to the primary key.
        of_streams: By stream kind, the SQL condition of the rows of the streams with ids from $2 to $3.
        summary: SQL that computes the rows of the tenant $1, for a table that summarizes other rows.
    """

    name: str
    columns: Sequence[str]
    keys: int
    of_streams: Mapping[str, str] = {}
    summary: str | None = None


class Projection(Protocol):
    """Derives one read model's rows from events.

    A stream's rows depend on the events of that stream alone, and each row carries the version that it shows. So
    applying an event twice changes nothing, and the order in which streams interleave does not matter.
    """

    name: str
    version: int
    """Increased when the same events give other rows: workers then rebuild the rows of all tenants."""
    writer: str
    """The database function that writes rows. Its first argument is the tenant, the others are lists of rows."""

    @property
    def kinds(self) -> Sequence[str]:
        """The stream kinds that it reads, in the order in which a replay must pass them."""

    @property
    def tables(self) -> Sequence[Table]:
        """The tables that it writes."""

    async def prepare(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> WriterRows:
        """Return the rows with which `writer` brings the tenant's rows up to `events`.

        It reads the stored rows that the events continue, without a lock; the number of statements does not depend on
        the number of events. The caller writes only if no other process has changed the rows meanwhile.
        """

    def replayer(self) -> Replay:
        """Return a function that computes the rows that `writer` would leave, without a database.

        It serves one tenant. The caller passes all of the tenant's streams, kind by kind in the order of `kinds`.
        """


def writer_call(writer: str, lists: int, first: int) -> str:
    """Return SQL that calls a writer for the tenant $1 with `lists` lists of rows, which are $`first` and so on."""
    return f"{writer}($1, {', '.join(f'${number}' for number in range(first, first + lists))})"


async def apply(
    connection: Connection, projection: Projection, tenant_id: int, events: Sequence[RecordedEvent]
) -> None:
    """Bring the tenant's rows up to `events` in the caller's transaction, which holds the checkpoint's lock."""
    rows = await projection.prepare(connection, tenant_id, events)
    await connection.execute(f"SELECT {writer_call(projection.writer, len(rows), 2)}", tenant_id, *rows)


def by_stream(events: Iterable[RecordedEvent]) -> dict[int, list[RecordedEvent]]:
    """Group events of one kind by stream id; the order within each stream stays."""
    streams: dict[int, list[RecordedEvent]] = {}
    for event in events:
        streams.setdefault(event.stream_id, []).append(event)
    return streams


def continued(streams: Streams) -> list[int]:
    """Return the ids of streams that begin before this batch: their rows must be loaded first."""
    return [stream_id for stream_id, events in streams.items() if events[0].version > 1]


def replay_streams(
    streams: Streams,
    stored: Mapping[int, tuple[int, V]],
    evolve: Callable[[V | None, RecordedEvent], V],
    on_view: Callable[[V, int], None] = lambda _view, _version: None,
) -> list[tuple[V, int]]:
    """Return the view of each stream after its events, with the version that it shows.

    Args:
        streams: Events by stream id, each stream's in order.
        stored: (version, view) of streams that begin before this batch; events up to that version are skipped.
        evolve: Applies one event to a view.
        on_view: Called with each intermediate view and its version.
    """
    views = []
    for stream_id, events in streams.items():
        version, view = stored.get(stream_id, (0, None))
        for recorded in events:
            if recorded.version > version:
                view = evolve(view, recorded)
                version = recorded.version
                on_view(view, version)
        if view is not None:
            views.append((view, version))
    return views

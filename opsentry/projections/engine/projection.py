"""What every projection is, and what they share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection

V = TypeVar("V")


Streams: TypeAlias = Mapping[int, Sequence[RecordedEvent]]
"""Whole streams of one kind by their ids, each stream's events in order."""

Rows: TypeAlias = dict[str, list[tuple[Any, ...]]]
"""Rows by the table that they belong to, each a tuple of the table's `columns`."""


class Table(NamedTuple):
    """A table of a projection's rows, and of nobody else's; each row belongs to one stream, or sums up other rows.

    Attributes:
        name: The table's.
        columns: All columns but `tenant_id`, the others of the primary key first.
        keys: How many of the columns belong to the primary key.
        of_streams: For each kind of stream, the condition of the rows that streams from $2 to $3 have.
        summary: A query of the tenant $1 that gives the rows, where they are not of streams.
    """

    name: str
    columns: Sequence[str]
    keys: int
    of_streams: Mapping[str, str] = {}
    summary: str | None = None


class Projection(Protocol):
    """Builds one read model's rows from events.

    A stream's rows depend on that stream's events alone, and each row knows the stream version it shows: applying
    events again changes nothing, and nothing depends on how events of different streams interleave.
    """

    name: str
    version: int
    """Raised in the code whenever the same events give other rows: workers then replay all rows anew."""

    @property
    def kinds(self) -> Sequence[str]:
        """The stream kinds it reads, in the order in which it must be given whole streams."""

    @property
    def tables(self) -> Sequence[Table]:
        """Where its rows lie."""

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Bring the tenant's rows up to `events`, in the caller's transaction, in a fixed number of statements."""

    def replayer(self) -> Callable[[str, Streams], Rows]:
        """Return a function that gives the rows of whole streams of a kind, the same that `apply` would leave.

        It serves one tenant, all of whose streams it is given, kind by kind in the order of `kinds`.
        """

    async def clear(self, connection: Connection, tenant_id: int) -> None:
        """Delete all of the tenant's rows, in the caller's transaction."""


def by_stream(events: Iterable[RecordedEvent]) -> dict[int, list[RecordedEvent]]:
    """Return the events of each stream id, in order; the events are of one kind."""
    streams: dict[int, list[RecordedEvent]] = {}
    for event in events:
        streams.setdefault(event.stream_id, []).append(event)
    return streams


def continued(streams: dict[int, list[RecordedEvent]]) -> list[int]:
    """Return the ids of streams that do not begin in this batch, whose rows must be read before going on."""
    return [stream_id for stream_id, events in streams.items() if events[0].version > 1]


def fold(
    streams: Mapping[int, Sequence[RecordedEvent]],
    stored: Mapping[int, tuple[int, V]],
    evolve: Callable[[V | None, RecordedEvent], V],
    each: Callable[[V, int], None] = lambda _view, _version: None,
) -> list[tuple[V, int]]:
    """Return the view of each stream after its events, with the version that it shows.

    Args:
        streams: Events by stream, each stream's in order.
        stored: (version, view) of streams that do not begin here; events that they show already are passed over.
        evolve: Folds one event into a view.
        each: Called with every view on the way, and its version.
    """
    folded = []
    for stream_id, events in streams.items():
        version, view = stored.get(stream_id, (0, None))
        for recorded in events:
            if recorded.version > version:
                view = evolve(view, recorded)
                version = recorded.version
                each(view, version)
        if view is not None:
            folded.append((view, version))
    return folded


# A command is answered once its events are projected or, where that fails, this long after they were recorded. So an
# event that is younger than this and not projected yet belongs to a command that nobody has an answer to.
UNANSWERED_SECONDS = 0.25


def freshness(*projections: str) -> str:
    """Return a FROM item `fresh(head_position, trusted_position, projected_position, tag)` of the tenant `$1`.

    `head` is where the tenant's ledger ends, `position` how far the rows can be trusted: to the head if all that is
    missing is younger than any answered command. One that is halted or paused counts as up to date: waiting would not
    help.
    `shown` is the last event that the rows show in fact, `tag` a text that is another one whenever the rows are: after
    an event, and after a rebuild.
    All but `head` are NULL where one of the projections has never run for the tenant.

    The first missing event is asked for in the order of position, so that only the index on position will do:
    planned while the
    ledger is small, an EXISTS, or an equality, may for as long as the connection lives read all of it instead.
    """
    names = ", ".join(f"'{name}'" for name in projections)
    return f"""(
        SELECT h.position AS head_position, how.* FROM ledger_heads h LEFT JOIN LATERAL (
            SELECT min(CASE WHEN c.position < h.position AND c.halted_at IS NULL
                    AND NOT EXISTS (SELECT FROM projections p WHERE p.name = c.projection AND p.paused) AND (
                    SELECT e.recorded_at FROM events e WHERE e.tenant_id = c.tenant_id AND e.position > c.position
                    ORDER BY e.position LIMIT 1) < clock_timestamp() - {UNANSWERED_SECONDS} * interval '1 second'
                    THEN c.position ELSE h.position END) AS trusted_position,
                min(c.position) AS projected_position, string_agg(
                    concat_ws('.', c.position, floor(extract(epoch FROM c.rebuilt_at) * 1000)), '-'
                    ORDER BY c.projection) AS tag
            FROM checkpoints c WHERE c.tenant_id = h.tenant_id AND c.projection IN ({names})
            HAVING count(*) = {len(projections)}
        ) AS how ON true WHERE h.tenant_id = $1) AS fresh"""

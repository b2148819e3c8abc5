"""What every projection is, and what they share."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from opsentry.events.codec import RecordedEvent
from opsentry.postgres import Connection


class Projection(Protocol):
    """Builds one read model's rows from events.

    A stream's rows depend on that stream's events alone, and each row knows the stream version it shows: applying
    events again changes nothing, and nothing depends on how events of different streams interleave.
    """

    name: str
    kinds: frozenset[str]
    """The stream kinds it reads; events of others are not given to it."""

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Bring the tenant's rows up to `events`, in the caller's transaction, in a fixed number of statements."""

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


# What a read of a projection's rows must select beside them, to know whether it shows all there is: `head` is where
# the tenant's ledger ends, `position` where the projection stands. $1 is the tenant. A parked projection counts as
# up to date: waiting would not help.
def freshness(*projections: str) -> str:
    """Return a FROM item `fresh(head, position)` for `projections`, all rows of one tenant `$1`."""
    names = ", ".join(f"'{name}'" for name in projections)
    return (
        "(SELECT h.seq AS head, (SELECT min(CASE WHEN c.parked_seq IS NULL THEN c.position ELSE h.seq END)"
        f" FROM checkpoints c WHERE c.tenant_id = h.tenant_id AND c.projection IN ({names})) AS position"
        " FROM heads h WHERE h.tenant_id = $1) AS fresh"
    )

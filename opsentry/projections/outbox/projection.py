"""The projection `outbox`: an intent for each notification that events ask for.

Unlike other projections, it reads several streams for one row: subscriptions and active windows as of each event, and
at the end of a window the incidents that it withheld. It stores its knowledge of them in its own table.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import asyncpg
import msgspec

from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.maintenance import MaintenanceCompleted
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Replay, Rows, Streams, Table, WriterRows, by_stream
from opsentry.projections.outbox.intents import (
    ACTIVE,
    Intent,
    IntentGenerator,
    OutboxChanges,
    StateKey,
    is_notifiable,
)
from opsentry.projections.outbox.rules import SubjectState, SubscriberFilter

# Selects all states of the kinds $2 (active windows, which are few, and perhaps all subscriptions), and the states of
# the streams $3 and $4. LIMIT makes it one index lookup for each; see `incidents`.
_LOAD = """
SELECT kind, id, state FROM outbox_state WHERE tenant_id = $1 AND kind = ANY($2)
UNION ALL
SELECT s.* FROM unnest($3::text[], $4::bigint[]) AS wanted (kind, id) CROSS JOIN LATERAL (
    SELECT kind, id, state FROM outbox_state
    WHERE tenant_id = $1 AND kind = wanted.kind AND id = wanted.id LIMIT 1) AS s
"""

# Selects the open incidents whose last notification a window withheld. A partial index has exactly these rows.
_LOAD_WITHHELD = """
SELECT kind, id, state FROM outbox_state WHERE tenant_id = $1 AND kind = 'incident' AND state LIKE '%"is_withheld":%'
"""

_KINDS = (subscription.KIND, maintenance.KIND, incident.KIND)
INTENTS = Table(
    "outbox_intents",
    Intent._fields,
    keys=1,
    of_streams={kind: f"stream_kind = '{kind}' AND stream_id BETWEEN $2 AND $3" for kind in _KINDS},
)
STATES = Table(
    "outbox_state",
    ("kind", "id", "state"),
    keys=2,
    of_streams={
        subscription.KIND: f"kind = '{subscription.KIND}' AND id BETWEEN $2 AND $3",
        maintenance.KIND: f"kind IN ('{maintenance.KIND}', '{ACTIVE}') AND id BETWEEN $2 AND $3",
        incident.KIND: f"kind = '{incident.KIND}' AND id BETWEEN $2 AND $3",
    },
)


class Outbox:
    """The projection `outbox`."""

    name = "outbox"
    version = 1
    writer = "write_outbox"
    kinds = _KINDS
    tables = (INTENTS, STATES)

    async def prepare(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> WriterRows:
        """Return the states that the next events need, the keys of outdated states, and the intents of `events`."""
        generator, subjects = await _load(connection, tenant_id, events)
        states: list[tuple[Any, ...]] = []
        deleted: list[StateKey] = []
        intents: list[Intent] = []
        for kind in self.kinds:
            known = subjects.get(kind, {})
            streams = dict.fromkeys(known, ()) | by_stream(event for event in events if event.kind == kind)
            changes = generator.process(kind, streams, known)
            states += _state_rows(changes)
            deleted += sorted(changes.deleted)
            intents += changes.intents
        return states, deleted, intents

    def replayer(self) -> Replay:
        """Return a function that computes the rows of whole streams."""
        generator = IntentGenerator({}, {})

        def replay(kind: str, streams: Streams) -> Rows:
            changes = generator.process(kind, streams, {})
            return {INTENTS.name: list(changes.intents), STATES.name: _state_rows(changes)}

        return replay


_S = TypeVar("_S", bound=msgspec.Struct)


def _state_rows(changes: OutboxChanges) -> list[tuple[Any, ...]]:
    return [
        (kind, stream_id, msgspec.json.encode(state).decode()) for (kind, stream_id), state in changes.states.items()
    ]


async def _load(
    connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]
) -> tuple[IntentGenerator, dict[str, dict[int, SubjectState]]]:
    """Return a generator that knows the subscriptions and active windows, and the subjects of `events` by kind and id.

    Subscriptions may be very many, so they are all loaded only if an event is notifiable.
    """
    whole_kinds = [ACTIVE]
    if any(is_notifiable(recorded) for recorded in events):
        whole_kinds.append(subscription.KIND)
    keys = sorted({(e.kind, e.stream_id) for e in events if e.kind not in whole_kinds})
    kinds, ids = zip(*keys, strict=True) if keys else ((), ())
    rows = list(await connection.fetch(_LOAD, tenant_id, whole_kinds, kinds, ids))
    if any(isinstance(recorded.event, MaintenanceCompleted) for recorded in events):
        rows += await connection.fetch(_LOAD_WITHHELD, tenant_id)
    filters: dict[int, SubscriberFilter] = {}
    subjects: dict[str, dict[int, SubjectState]] = {}
    for row in rows:
        if row["kind"] == subscription.KIND:
            filters[row["id"]] = _decode(row, SubscriberFilter)
        else:
            subjects.setdefault(row["kind"], {})[row["id"]] = _decode(row, SubjectState)
    return IntentGenerator(filters, subjects.get(ACTIVE, {})), subjects


def _decode(row: asyncpg.Record, type_: type[_S]) -> _S:
    return msgspec.json.decode(row["state"], type=type_)

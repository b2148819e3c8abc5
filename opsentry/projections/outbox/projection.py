"""Notification intents: who must be told of which event, derived from the log, subscriptions and suppression.

The only projection that looks at more than one stream: at subscriptions and active windows, as of each event, and at
incidents that a window withheld, when it is over. It keeps what it has to know of them as its own rows.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import asyncpg
import msgspec

from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.maintenance import MaintenanceCompleted
from opsentry.events.codec import RecordedEvent
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Replay, Rows, Streams, Table, by_stream
from opsentry.projections.outbox.intents import Derivation, Derived, Intent, tells
from opsentry.projections.outbox.rules import SubscriberFilter, Topic

# A tenant's active windows, which are few, and all of its subscriptions, which may be very many.
_LOAD_ALL = "SELECT kind, id, state FROM outbox_state WHERE tenant_id = $1 AND kind = $2"

# Incidents that a window withheld and that are open: as many as were withheld, found by their index.
_LOAD_MUTED = """
SELECT kind, id, state FROM outbox_state WHERE tenant_id = $1 AND kind = 'incident' AND state LIKE '%"muted":%'
"""

# What is known already of the streams in this batch, each by the index; see the same in incidents.
_LOAD = """
SELECT s.* FROM unnest($2::text[], $3::bigint[]) AS wanted (kind, id) CROSS JOIN LATERAL (
    SELECT kind, id, state FROM outbox_state
    WHERE tenant_id = $1 AND kind = wanted.kind AND id = wanted.id LIMIT 1) AS s
"""

_STORE = """
INSERT INTO outbox_state (tenant_id, kind, id, state) SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::text[])
ON CONFLICT (tenant_id, kind, id) DO UPDATE SET state = excluded.state
"""

_FORGET = """
DELETE FROM outbox_state WHERE tenant_id = $1 AND (kind, id) IN (SELECT * FROM unnest($2::text[], $3::bigint[]))
"""

_STORE_INTENTS = """
INSERT INTO outbox_intents (tenant_id, intent_id, position, subscription_id, channel, topic, stream_kind, stream_id,
    suppressed, created_at)
SELECT $1, *
FROM unnest($2::uuid[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[], $8::bigint[], $9::bool[],
            $10::timestamptz[])
ON CONFLICT DO NOTHING
"""

_KINDS = (subscription.KIND, maintenance.KIND, incident.KIND)
INTENTS = Table(
    "outbox_intents",
    Intent._fields,
    keys=1,
    of_streams={kind: f"stream_kind = '{kind}' AND stream_id BETWEEN $2 AND $3" for kind in _KINDS},
)
STATE = Table(
    "outbox_state",
    ("kind", "id", "state"),
    keys=2,
    of_streams={
        subscription.KIND: f"kind = '{subscription.KIND}' AND id BETWEEN $2 AND $3",
        maintenance.KIND: f"kind IN ('{maintenance.KIND}', 'active') AND id BETWEEN $2 AND $3",
        incident.KIND: f"kind = '{incident.KIND}' AND id BETWEEN $2 AND $3",
    },
)


class Outbox:
    """The projection `outbox`."""

    name = "outbox"
    version = 2
    kinds = _KINDS
    tables = (INTENTS, STATE)

    async def apply(self, connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]) -> None:
        """Write the intents that `events` give rise to, and what has to be known for the next ones."""
        derivation, topics = await _load(connection, tenant_id, events)
        for kind in self.kinds:
            known = topics.get(kind, {})
            streams = dict.fromkeys(known, ()) | by_stream(event for event in events if event.kind == kind)
            derived = derivation.follow(kind, streams, known)
            if derived.known:
                await connection.execute(_STORE, tenant_id, *zip(*_state_rows(derived), strict=True))
            if derived.forgotten:
                await connection.execute(_FORGET, tenant_id, *zip(*sorted(derived.forgotten), strict=True))
            if derived.intents:
                await connection.execute(_STORE_INTENTS, tenant_id, *zip(*derived.intents, strict=True))

    def replayer(self) -> Replay:
        """Return a function that gives the rows of whole streams."""
        derivation = Derivation({}, {})

        def replay(kind: str, streams: Streams) -> Rows:
            derived = derivation.follow(kind, streams, {})
            return {INTENTS.name: list(derived.intents), STATE.name: _state_rows(derived)}

        return replay


_S = TypeVar("_S", bound=msgspec.Struct)


def _state_rows(derived: Derived) -> list[tuple[Any, ...]]:
    return [(kind, number, msgspec.json.encode(value).decode()) for (kind, number), value in derived.known.items()]


async def _load(
    connection: Connection, tenant_id: int, events: Sequence[RecordedEvent]
) -> tuple[Derivation, dict[str, dict[int, Topic]]]:
    """Return what there is to replay from, and the topics that `events` may tell of, by kind and id."""
    rows = list(await connection.fetch(_LOAD_ALL, tenant_id, "active"))
    loaded = set()
    if any(tells(recorded) for recorded in events):
        rows += await connection.fetch(_LOAD_ALL, tenant_id, subscription.KIND)
        loaded.add(subscription.KIND)
    if keys := sorted({(e.kind, e.stream_id) for e in events if e.kind not in loaded}):
        rows += await connection.fetch(_LOAD, tenant_id, *zip(*keys, strict=True))
    if any(isinstance(recorded.event, MaintenanceCompleted) for recorded in events):
        rows += await connection.fetch(_LOAD_MUTED, tenant_id)
    filters: dict[int, SubscriberFilter] = {}
    topics: dict[str, dict[int, Topic]] = {}
    for row in rows:
        if row["kind"] == subscription.KIND:
            filters[row["id"]] = _decode(row, SubscriberFilter)
        else:
            topics.setdefault(row["kind"], {})[row["id"]] = _decode(row, Topic)
    return Derivation(filters, topics.get("active", {})), topics


def _decode(row: asyncpg.Record, type_: type[_S]) -> _S:
    return msgspec.json.decode(row["state"], type=type_)

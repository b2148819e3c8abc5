"""Leases: a sender takes endpoints, with what is due there, and records what came of it, as long as it holds them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from opsentry.domain.subscription import Subscription
from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.channel import Change
from opsentry.notifications.delivery import ordering
from opsentry.notifications.delivery.ordering import IS_ON, NEXT_DUE, PROBE_AFTER, Lane, begin, columns

# After the first attempt, and after each further one: 5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 10 h. Then it is parked.
RETRY_SECONDS = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 36000.0)
# What is probed is tried so long after the last time.
PROBE_SECONDS = 300.0
FAILING_DAYS = 5
WIDEST = 8
_ENDED_AT_ONCE = 5_000

# Leases endpoints of a channel ($7) where something is due, the one that has waited longest first, found by where they
# lie: one that was moved while it was being locked is left for the next time. Tenants that have their share are passed
# over ($3), and endpoints that have not shown that they answer well where those have theirs: all of them ($4), or a
# tenant's ($6).
_CLAIM = f"""
UPDATE endpoints e SET lease = $1, due_at = statement_timestamp() + $5 * interval '1 second'
WHERE e.ctid = ANY(ARRAY(
    SELECT due.ctid FROM endpoints due
    WHERE due.channel = $7 AND due.due_at <= statement_timestamp() AND due.tenant_id <> ALL($3)
        AND (due.width > 1 OR (NOT $4 AND due.tenant_id <> ALL($6))) AND {IS_ON.format(tenant="due.tenant_id")}
    ORDER BY due.due_at LIMIT $2 FOR UPDATE SKIP LOCKED))
RETURNING e.tenant_id, e.subscription_id, e.failures, e.width,
    (SELECT s.state FROM subscriptions s
     WHERE s.tenant_id = e.tenant_id AND s.subscription_id = e.subscription_id LIMIT 1) AS state,
    (SELECT s.version FROM subscriptions s
     WHERE s.tenant_id = e.tenant_id AND s.subscription_id = e.subscription_id LIMIT 1) AS version,
    coalesce((SELECT c.position FROM checkpoints c
     WHERE c.tenant_id = e.tenant_id AND c.projection = 'subscriptions' LIMIT 1), 0) AS shown
"""

# What is due at leased endpoints, at most so many of each. The first time that one is taken it is settled what its
# message tells: all changes of the same thing within $4 seconds after the first of them. The others end with that.
_TAKE = """
WITH ledger_heads AS (
    SELECT d.* FROM unnest($1::bigint[], $2::bigint[], $3::int[]) AS e (tenant_id, subscription_id, at_most)
    CROSS JOIN LATERAL (
        SELECT tenant_id, intent_id, subscription_id, stream_kind, stream_id, position, topic, created_at,
        until_position,
            attempts, tried
        FROM deliveries WHERE tenant_id = e.tenant_id AND subscription_id = e.subscription_id
            AND due_at <= statement_timestamp()
        ORDER BY due_at, position LIMIT e.at_most) AS d),
followers AS MATERIALIZED (
    SELECT h.tenant_id, h.intent_id AS leader, f.intent_id FROM ledger_heads h CROSS JOIN LATERAL (
        SELECT intent_id FROM deliveries
        WHERE tenant_id = h.tenant_id AND subscription_id = h.subscription_id AND stream_kind = h.stream_kind
            AND stream_id = h.stream_id AND settled_at IS NULL AND created_at >= h.created_at
            AND created_at < h.created_at + $4 * interval '1 second'
            AND position > h.position AND due_at IS NULL AND until_position IS NULL
        ORDER BY created_at, position) AS f
    WHERE h.until_position IS NULL AND h.stream_kind <> 'subscription'),
merged AS (
    UPDATE deliveries d SET state = 'merged', leader = f.leader, settled_at = statement_timestamp()
    FROM followers f WHERE d.tenant_id = f.tenant_id AND d.intent_id = f.intent_id
    RETURNING d.tenant_id, d.leader, d.position, d.topic, d.created_at),
begun AS (
    UPDATE deliveries d SET until_position = greatest(h.position, (
        SELECT max(m.position) FROM merged m WHERE m.tenant_id = h.tenant_id AND m.leader = h.intent_id))
    FROM ledger_heads h WHERE h.until_position IS NULL AND d.tenant_id = h.tenant_id AND d.intent_id = h.intent_id)
SELECT h.tenant_id, h.intent_id, h.subscription_id, h.stream_kind, h.stream_id, h.position, h.topic, h.created_at,
    h.attempts, h.tried, more.positions, more.topics, more.moments
FROM ledger_heads h CROSS JOIN LATERAL (
    SELECT array_agg(position ORDER BY position) AS positions, array_agg(topic ORDER BY position) AS topics,
        array_agg(created_at ORDER BY position) AS moments
    FROM (
        SELECT m.position, m.topic, m.created_at FROM merged m WHERE m.tenant_id = h.tenant_id AND m.leader =
        h.intent_id
        UNION
        SELECT f.position, f.topic, f.created_at FROM deliveries f
        WHERE h.until_position > h.position AND f.tenant_id = h.tenant_id AND f.subscription_id = h.subscription_id
            AND f.position BETWEEN h.position + 1 AND h.until_position AND f.leader = h.intent_id) AS told) AS more
"""

# Which endpoints are still leased as they were: what is to be recorded of others is refused.
_HELD = """
SELECT e.* FROM unnest($1::bigint[], $2::bigint[], $3::uuid[]) AS row (tenant_id, subscription_id, lease)
CROSS JOIN LATERAL (
    SELECT tenant_id, subscription_id, lease FROM endpoints
    WHERE tenant_id = row.tenant_id AND subscription_id = row.subscription_id AND lease = row.lease LIMIT 1 FOR UPDATE
    ) AS e
"""

# What came of each. `delay` in seconds is until the next attempt, NULL at an end; `milliseconds` is NULL where there
# was none. One that somebody else has ended meanwhile, an operator for one, stays as it is; so does one whose attempt
# is recorded already, which is not known where the connection was lost at the commit. Where an older one of the lane
# came back meanwhile, what is to be tried again waits behind that.
_RECORD = """
WITH results AS (
    SELECT * FROM unnest($1::bigint[], $2::uuid[], $3::text[], $4::float8[], $5::int[], $6::text[], $7::int[],
        $8::int[]) AS row (tenant_id, intent_id, state, delay, answer, error, milliseconds, tried)),
moved AS (
    UPDATE deliveries d SET state = r.state, due_at = CASE WHEN r.delay IS NOT NULL AND NOT EXISTS (
            SELECT FROM deliveries o WHERE o.tenant_id = d.tenant_id AND o.subscription_id = d.subscription_id
                AND o.stream_kind = d.stream_kind AND o.stream_id = d.stream_id AND o.settled_at IS NULL
                AND (o.created_at, o.position) < (d.created_at, d.position))
            THEN statement_timestamp() + r.delay * interval '1 second' END,
        settled_at = CASE WHEN r.delay IS NULL THEN statement_timestamp() END, answer = r.answer, error = r.error,
        attempts = d.attempts + (r.milliseconds IS NOT NULL)::int, tried = d.tried + (r.milliseconds IS NOT NULL)::int
    FROM results r
    WHERE d.tenant_id = r.tenant_id AND d.intent_id = r.intent_id AND d.state = 'waiting' AND d.tried = r.tried
    RETURNING d.tenant_id, d.intent_id, d.tried)
INSERT INTO delivery_attempts (tenant_id, intent_id, number, at, milliseconds, answer, error)
SELECT m.tenant_id, m.intent_id, m.tried, statement_timestamp() - r.milliseconds * interval '1 millisecond',
    r.milliseconds, r.answer, r.error
FROM moved m JOIN results r USING (tenant_id, intent_id) WHERE r.milliseconds IS NOT NULL
ON CONFLICT DO NOTHING
"""

# Nothing is sent to a subscription that is off: what waits there ends, up to the event until which that is known; some
# of it, if it is very much, and the rest when the endpoint is looked at again.
_TURN_OFF = """
UPDATE deliveries d SET state = 'disabled', due_at = NULL, settled_at = statement_timestamp(),
    error = coalesce(d.error, 'the subscription is off')
FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS off (tenant_id, subscription_id, shown) CROSS JOIN LATERAL (
    SELECT intent_id FROM deliveries
    WHERE tenant_id = off.tenant_id AND subscription_id = off.subscription_id AND settled_at IS NULL
        AND position <= off.shown
    LIMIT $4) AS ending
WHERE d.tenant_id = off.tenant_id AND d.intent_id = ending.intent_id
RETURNING d.tenant_id, d.subscription_id, d.stream_kind, d.stream_id
"""

# Gives endpoints back, to the end of the line. One that fails again and again is looked at after a while only. How it
# went says nothing of a subscription that was changed meanwhile: it may be another endpoint, or a mended one.
_RELEASE = f"""
WITH released AS (
    SELECT r.*, version IS NOT DISTINCT FROM (
        SELECT s.version FROM subscriptions s
        WHERE s.tenant_id = r.tenant_id AND s.subscription_id = r.subscription_id LIMIT 1) AS same, (
        SELECT d.due_at FROM deliveries d WHERE d.tenant_id = r.tenant_id AND d.subscription_id = r.subscription_id
            AND d.due_at IS NOT NULL ORDER BY d.due_at LIMIT 1) AS next_due
    FROM unnest($1::bigint[], $2::bigint[], $3::int[], $4::int[], $5::float8[], $6::bool[], $7::int[])
        AS r (tenant_id, subscription_id, failures, width, hold, failed, version))
UPDATE endpoints e SET lease = NULL,
    failures = CASE WHEN same THEN r.failures ELSE 0 END,
    width = CASE WHEN same THEN r.width ELSE 1 END,
    held_until = CASE WHEN same THEN statement_timestamp() + r.hold * interval '1 second' END,
    failing_since = CASE WHEN same AND r.failures > 0 THEN coalesce(e.failing_since, statement_timestamp()) END,
    due_at = CASE WHEN next_due IS NOT NULL
        THEN greatest(next_due, statement_timestamp() + CASE WHEN same THEN r.hold END * interval '1 second',
            statement_timestamp()) END
FROM released r WHERE e.tenant_id = r.tenant_id AND e.subscription_id = r.subscription_id
RETURNING e.tenant_id, e.subscription_id, r.failed AND e.failures >= {PROBE_AFTER}
    AND e.failing_since < statement_timestamp() - interval '{FAILING_DAYS} days' AS hopeless
"""

# Whoever enables it again begins anew. What still waits there is looked at when it is due.
_REST = f"""
UPDATE endpoints e SET failures = 0, failing_since = NULL, width = 1, held_until = NULL,
    due_at = CASE WHEN lease IS NOT NULL THEN due_at ELSE {NEXT_DUE} END
WHERE tenant_id = $1 AND subscription_id = $2
"""

_decode = msgspec.json.Decoder(Subscription).decode


class LeasedEndpoint(NamedTuple):
    """An endpoint that is leased. `subscription` is `None` where its read model does not know it yet."""

    tenant_id: int
    subscription_id: int
    lease: UUID
    failures: int
    width: int
    subscription: Subscription | None
    version: int | None
    """Of the subscription."""
    shown: int
    """Up to which event the read model goes that `subscription` is from."""


class Due(NamedTuple):
    """A delivery that is to be tried now.

    Attributes:
        tenant_id: The tenant.
        intent_id: What is told to whom.
        subscription_id: The subscription.
        kind: Of the stream.
        stream_id: The stream that it tells of.
        attempts: How often it was tried, since somebody last asked for it to be sent again.
        tried: How often ever.
        changes: The events that its message tells, oldest first.
    """

    tenant_id: int
    intent_id: UUID
    subscription_id: int
    kind: str
    stream_id: int
    attempts: int
    tried: int
    changes: Sequence[Change]

    @property
    def lane(self) -> tuple[int, int, str, int]:
        """What is sent in order: what tells one subscription of one stream."""
        return self.tenant_id, self.subscription_id, self.kind, self.stream_id

    @property
    def sequence(self) -> int:
        """The last event that it tells."""
        return self.changes[-1].position


class Result(NamedTuple):
    """What came of one delivery.

    Attributes:
        due: The delivery.
        state: As in the table; `waiting` if it is to be tried again.
        delay: Seconds until then, `None` at an end.
        answer: The status that came back.
        error: What went wrong.
        milliseconds: How long the attempt took; `None`: there was none that says anything of the endpoint.
    """

    due: Due
    state: str
    delay: float | None = None
    answer: int | None = None
    error: str | None = None
    milliseconds: int | None = None


class Release(NamedTuple):
    """How an endpoint is given back.

    Attributes:
        failures: In a row.
        width: So many messages at once it is trusted to take.
        hold: For so many seconds it is to be left alone.
        failed: Whether an attempt failed just now.
        off: Whether its subscription is: all that waits there ends.
    """

    failures: int
    width: int
    hold: float | None = None
    failed: bool = False
    off: bool = False


class Work(NamedTuple):
    """What has come of an endpoint, or a part of it; with a `release`, that is all for this time."""

    endpoint: LeasedEndpoint
    results: Sequence[Result]
    release: Release | None = None


async def claim(
    connection: Connection,
    lease: UUID,
    channel: str,
    *,
    seconds: float,
    at_most: int,
    passing_over: Sequence[int] = (),
    proven: bool = False,
    proven_of: Sequence[int] = (),
) -> list[LeasedEndpoint]:
    """Lease endpoints where something is due, in the caller's transaction.

    Args:
        connection: Inside a transaction.
        lease: Random; who holds it may record.
        channel: Those of this one.
        seconds: For so long nobody else takes them.
        at_most: So many endpoints.
        passing_over: Tenants that have their share.
        proven: Only those that have answered well before.
        proven_of: The same, of these tenants.
    """
    await begin(connection)
    rows = await connection.fetch(_CLAIM, lease, at_most, list(passing_over), proven, seconds, list(proven_of), channel)
    return [
        LeasedEndpoint(
            row["tenant_id"],
            row["subscription_id"],
            lease,
            row["failures"],
            row["width"],
            _subscription(row["state"]),
            row["version"],
            row["shown"],
        )
        for row in rows
    ]


async def take(connection: Connection, endpoints: Iterable[tuple[LeasedEndpoint, int]], burst: float) -> list[Due]:
    """Return what is due at leased endpoints, for each at most the number beside it; in the caller's transaction."""
    wanted = [(endpoint.tenant_id, endpoint.subscription_id, at_most) for endpoint, at_most in endpoints]
    if not wanted:
        return []
    rows = await connection.fetch(_TAKE, *map(list, zip(*wanted, strict=True)), burst)
    return [
        Due(
            row["tenant_id"],
            row["intent_id"],
            row["subscription_id"],
            row["stream_kind"],
            row["stream_id"],
            row["attempts"],
            row["tried"],
            [
                Change(row["position"], row["topic"], row["created_at"]),
                *map(Change, row["positions"] or (), row["topics"] or (), row["moments"] or ()),
            ],
        )
        for row in rows
    ]


async def record(connection: Connection, work: Sequence[Work], burst: float) -> list[LeasedEndpoint]:
    """Record what came of deliveries, and give endpoints back, in the caller's transaction; only what is still leased.

    Returns:
        The endpoints given back that have failed for so long that they are to be disabled.
    """
    await begin(connection)
    leases = {(w.endpoint.tenant_id, w.endpoint.subscription_id, w.endpoint.lease) for w in work}
    held = {tuple(row) for row in await connection.fetch(_HELD, *columns(sorted(leases)))}
    work = [w for w in work if (w.endpoint.tenant_id, w.endpoint.subscription_id, w.endpoint.lease) in held]
    if results := [result for w in work for result in w.results]:
        await connection.execute(_RECORD, *columns(map(_result_row, results)))
    released = [(w.endpoint, w.release) for w in work if w.release is not None]
    ended = [r.due.lane for r in results if r.delay is None]
    if off := [(e.tenant_id, e.subscription_id, e.shown) for e, release in released if release.off]:
        ended += await _turn_off(connection, off)
    if ended:
        await ordering.make_due(connection, ended, burst)
    if not released:
        return []
    rows = [(e.tenant_id, e.subscription_id, r.failures, r.width, r.hold, r.failed, e.version) for e, r in released]
    hopeless = {tuple(row)[:2] for row in await connection.fetch(_RELEASE, *columns(rows)) if row["hopeless"]}
    return [endpoint for endpoint, _ in released if (endpoint.tenant_id, endpoint.subscription_id) in hopeless]


async def turn_off(connection: Connection, endpoint: LeasedEndpoint) -> None:
    """End what waits for a subscription that was disabled, in the caller's transaction."""
    key = (endpoint.tenant_id, endpoint.subscription_id)
    await begin(connection)
    await ordering.lock(connection, [key])
    if ended := await _turn_off(connection, [(*key, endpoint.shown)]):
        await ordering.make_due(connection, ended, 0.0)
    await connection.execute(_REST, *key)


def _subscription(state: str | None) -> Subscription | None:
    """Return what the read model holds; `None` too where newer code than this wrote it: then others are to send."""
    try:
        return None if state is None else _decode(state)
    except msgspec.MsgspecError:
        return None


async def _turn_off(connection: Connection, off: Sequence[tuple[int, int, int]]) -> list[Lane]:
    rows = await connection.fetch(_TURN_OFF, *columns(off), max(1, _ENDED_AT_ONCE // len(off)))
    return [(row["tenant_id"], row["subscription_id"], row["stream_kind"], row["stream_id"]) for row in rows]


def _result_row(result: Result) -> tuple[Any, ...]:
    return (
        result.due.tenant_id,
        result.due.intent_id,
        result.state,
        result.delay,
        result.answer,
        result.error,
        result.milliseconds,
        result.due.tried,
    )

"""The ledger of deliveries: what came of each intent. Facts, which no rebuild touches.

Intents are taken over in the order of the tenant's ledger, up to a position that only rises: so each is taken over
once, whatever is derived again later, and one that a changed rule gives for an event before that position never is.

Order is kept for each subscription and stream, a *lane*: only its oldest waiting delivery is ever due, and what ends it
makes the next one due. Whoever moves deliveries of an endpoint holds the lock of the endpoint's row: so nobody misses
that another one has just ended, or has just come.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from opsentry.domain.subscription import Subscription
from opsentry.notifications.channel import Change
from opsentry.postgres import Connection

# After the first attempt, and after each further one: 5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 10 h. Then it is parked.
RETRY_SECONDS = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 36000.0)
# An endpoint that failed so often in a row is tried with one message at a time, so long after the last.
PROBE_AFTER = 10
PROBE_SECONDS = 300.0
FAILING_DAYS = 5
WIDEST = 8

# Whoever stands still with locks that others wait for is thrown out by the server. And all goes by indexes: plans are
# made from statistics of another time, here often of a moment before thousands of rows came, and are kept.
_BEGIN = """
SELECT set_config('idle_in_transaction_session_timeout', '3s', true), set_config('enable_seqscan', 'off', true),
    set_config('enable_sort', 'off', true), set_config('jit', 'off', true)
"""

# Tenants with intents beyond what is settled, each found by the index, as `_BEHIND` of the runner does it.
_FRESH = """
WITH RECURSIVE found AS (
    (SELECT tenant_id, 1 AS number FROM outbox_fresh WHERE tenant_id > $1 ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT next.tenant_id, number + 1 FROM found CROSS JOIN LATERAL (
        SELECT tenant_id FROM outbox_fresh WHERE tenant_id > found.tenant_id ORDER BY tenant_id LIMIT 1) AS next
    WHERE number < $2)
SELECT tenant_id FROM found
"""

_MAKE_SETTLED = "INSERT INTO outbox_settled (tenant_id, position) SELECT unnest($1::bigint[]), 0 ON CONFLICT DO NOTHING"

# What another sender is at is passed over.
_TAKE_SETTLED = """
SELECT tenant_id FROM outbox_settled WHERE tenant_id = ANY($1) ORDER BY tenant_id FOR UPDATE SKIP LOCKED
"""

# Takes intents over, in one statement, so that intents and the position that they reach are of one moment. Of a tenant
# with very many, about $2; all of one event's together.
_TAKE_OVER = """
WITH span AS (
    SELECT s.tenant_id, s.position AS since, coalesce(cut.seq, c.position) AS until
    FROM unnest($1::bigint[]) AS mine (tenant_id)
    CROSS JOIN LATERAL (SELECT * FROM outbox_settled WHERE tenant_id = mine.tenant_id LIMIT 1) AS s
    CROSS JOIN LATERAL (
        SELECT position FROM checkpoints WHERE tenant_id = mine.tenant_id AND projection = 'outbox' LIMIT 1) AS c
    LEFT JOIN LATERAL (
        SELECT seq FROM outbox_intents WHERE tenant_id = mine.tenant_id AND seq > s.position
        ORDER BY seq OFFSET $2 LIMIT 1) AS cut ON true),
taken AS (
    INSERT INTO deliveries (tenant_id, intent_id, subscription_id, stream_kind, stream_id, seq, channel, topic,
        created_at, state, settled_at)
    SELECT span.tenant_id, i.intent_id, i.subscription_id, i.stream_kind, i.stream_id, i.seq, i.channel, i.topic,
        i.created_at, CASE WHEN i.suppressed THEN 'suppressed' ELSE 'waiting' END,
        CASE WHEN i.suppressed THEN statement_timestamp() END
    FROM span CROSS JOIN LATERAL (
        SELECT * FROM outbox_intents WHERE tenant_id = span.tenant_id AND seq > span.since AND seq <= span.until
        ORDER BY seq OFFSET 0) AS i
    ON CONFLICT DO NOTHING
    RETURNING tenant_id, subscription_id, stream_kind, stream_id, state),
settled AS (
    UPDATE outbox_settled s SET position = greatest(s.position, span.until) FROM span
    WHERE s.tenant_id = span.tenant_id),
noted AS (
    DELETE FROM outbox_fresh f USING span WHERE f.tenant_id = span.tenant_id AND f.seq <= span.until)
SELECT DISTINCT tenant_id, subscription_id, stream_kind, stream_id FROM taken WHERE state = 'waiting'
"""

# Locks endpoints in the order of the lists, which is one for all; makes those that are not there yet.
_MAKE_ENDPOINTS = """
INSERT INTO endpoints (tenant_id, subscription_id) SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[])
ON CONFLICT DO NOTHING
"""
_LOCK_ENDPOINTS = """
SELECT e.* FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id) CROSS JOIN LATERAL (
    SELECT tenant_id, subscription_id FROM endpoints
    WHERE tenant_id = row.tenant_id AND subscription_id = row.subscription_id LIMIT 1 FOR UPDATE) AS e
"""

# Makes the oldest delivery of each lane due that is not: $5 seconds after its event was recorded, so that more changes
# of the same thing can come along.
_WAKE_LANES = """
WITH head AS MATERIALIZED (
    SELECT lane.tenant_id, oldest.* FROM (
        SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[])
            AS row (tenant_id, subscription_id, stream_kind, stream_id)) AS lane
    CROSS JOIN LATERAL (
        SELECT intent_id, stream_kind, created_at, due_at FROM deliveries
        WHERE tenant_id = lane.tenant_id AND subscription_id = lane.subscription_id AND stream_kind = lane.stream_kind
            AND stream_id = lane.stream_id AND settled_at IS NULL
        ORDER BY created_at, seq LIMIT 1) AS oldest)
UPDATE deliveries d SET due_at = greatest(statement_timestamp(), head.created_at
    + CASE WHEN head.stream_kind = 'subscription' THEN 0 ELSE $5 END * interval '1 second')
FROM head WHERE head.due_at IS NULL AND d.tenant_id = head.tenant_id AND d.intent_id = head.intent_id
    AND d.state = 'waiting'
"""

# What comes back to a lane may be older than what is due there: nothing is, until the lane is woken.
_HUSH_LANES = """
UPDATE deliveries d SET due_at = NULL
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[])
    AS row (tenant_id, subscription_id, stream_kind, stream_id)) AS lane
WHERE d.tenant_id = lane.tenant_id AND d.subscription_id = lane.subscription_id AND d.stream_kind = lane.stream_kind
    AND d.stream_id = lane.stream_id AND d.settled_at IS NULL AND d.due_at IS NOT NULL
"""

# When the next delivery of an endpoint is due.
_NEXT_DUE = """
(SELECT d.due_at FROM deliveries d WHERE d.tenant_id = e.tenant_id AND d.subscription_id = e.subscription_id
    AND d.due_at IS NOT NULL ORDER BY d.due_at LIMIT 1)
"""

# One that somebody is at looks again by itself, and one that is to be left alone for a while is left alone.
_WAKE_ENDPOINTS = f"""
UPDATE endpoints e SET due_at = least(e.due_at, greatest({_NEXT_DUE}, e.held_until))
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id)) AS woken
WHERE e.tenant_id = woken.tenant_id AND e.subscription_id = woken.subscription_id AND e.lease IS NULL
"""

# Leases endpoints where something is due, the one that has waited longest first, found by where they lie: one that was
# moved while it was being locked is left for the next time. Tenants that have their share are passed over ($3), and
# endpoints that have not shown that they answer well where those have theirs: all of them ($4), or a tenant's ($6).
_CLAIM = """
UPDATE endpoints e SET lease = $1, due_at = statement_timestamp() + $5 * interval '1 second'
WHERE e.ctid = ANY(ARRAY(
    SELECT due.ctid FROM endpoints due
    WHERE due.due_at <= statement_timestamp() AND due.tenant_id <> ALL($3)
        AND (due.width > 1 OR (NOT $4 AND due.tenant_id <> ALL($6)))
        AND NOT EXISTS (SELECT FROM outbox_paused p WHERE p.tenant_id = 0 OR p.tenant_id = due.tenant_id)
    ORDER BY due.due_at LIMIT $2 FOR UPDATE SKIP LOCKED))
RETURNING e.tenant_id, e.subscription_id, e.failures, e.width,
    (SELECT s.state FROM subscriptions s
     WHERE s.tenant_id = e.tenant_id AND s.subscription_id = e.subscription_id LIMIT 1) AS state,
    coalesce((SELECT c.position FROM checkpoints c
     WHERE c.tenant_id = e.tenant_id AND c.projection = 'subscriptions' LIMIT 1), 0) AS shown
"""

# What is due at leased endpoints, at most so many of each. The first time that one is taken it is settled what its
# message tells: all changes of the same thing within $4 seconds after the first of them. The others end with that.
_TAKE = """
WITH heads AS (
    SELECT d.* FROM unnest($1::bigint[], $2::bigint[], $3::int[]) AS e (tenant_id, subscription_id, at_most)
    CROSS JOIN LATERAL (
        SELECT tenant_id, intent_id, subscription_id, stream_kind, stream_id, seq, topic, created_at, until_seq,
            attempts
        FROM deliveries WHERE tenant_id = e.tenant_id AND subscription_id = e.subscription_id
            AND due_at <= statement_timestamp()
        ORDER BY due_at, seq LIMIT e.at_most) AS d),
followers AS MATERIALIZED (
    SELECT h.tenant_id, h.intent_id AS leader, f.intent_id FROM heads h CROSS JOIN LATERAL (
        SELECT intent_id FROM deliveries
        WHERE tenant_id = h.tenant_id AND subscription_id = h.subscription_id AND stream_kind = h.stream_kind
            AND stream_id = h.stream_id AND settled_at IS NULL AND created_at >= h.created_at
            AND created_at < h.created_at + $4 * interval '1 second'
            AND seq > h.seq AND due_at IS NULL AND until_seq IS NULL
        ORDER BY created_at, seq) AS f
    WHERE h.until_seq IS NULL AND h.stream_kind <> 'subscription'),
merged AS (
    UPDATE deliveries d SET state = 'merged', leader = f.leader, settled_at = statement_timestamp()
    FROM followers f WHERE d.tenant_id = f.tenant_id AND d.intent_id = f.intent_id
    RETURNING d.tenant_id, d.leader, d.seq, d.topic, d.created_at),
begun AS (
    UPDATE deliveries d SET until_seq = greatest(h.seq, (
        SELECT max(m.seq) FROM merged m WHERE m.tenant_id = h.tenant_id AND m.leader = h.intent_id))
    FROM heads h WHERE h.until_seq IS NULL AND d.tenant_id = h.tenant_id AND d.intent_id = h.intent_id)
SELECT h.tenant_id, h.intent_id, h.subscription_id, h.stream_kind, h.stream_id, h.seq, h.topic, h.created_at,
    h.attempts, more.seqs, more.topics, more.moments
FROM heads h CROSS JOIN LATERAL (
    SELECT array_agg(seq ORDER BY seq) AS seqs, array_agg(topic ORDER BY seq) AS topics,
        array_agg(created_at ORDER BY seq) AS moments
    FROM (
        SELECT m.seq, m.topic, m.created_at FROM merged m WHERE m.tenant_id = h.tenant_id AND m.leader = h.intent_id
        UNION
        SELECT f.seq, f.topic, f.created_at FROM deliveries f
        WHERE h.until_seq > h.seq AND f.tenant_id = h.tenant_id AND f.subscription_id = h.subscription_id
            AND f.seq BETWEEN h.seq + 1 AND h.until_seq AND f.leader = h.intent_id) AS told) AS more
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
# was none. One that somebody else has ended meanwhile, an operator for one, stays as it is.
_RECORD = """
WITH results AS (
    SELECT * FROM unnest($1::bigint[], $2::uuid[], $3::text[], $4::float8[], $5::int[], $6::text[], $7::int[],
        $8::bool[]) AS row (tenant_id, intent_id, state, delay, answer, error, milliseconds, counted)),
moved AS (
    UPDATE deliveries d SET state = r.state, due_at = statement_timestamp() + r.delay * interval '1 second',
        settled_at = CASE WHEN r.delay IS NULL THEN statement_timestamp() END, answer = r.answer, error = r.error,
        attempts = d.attempts + r.counted::int, tried = d.tried + (r.milliseconds IS NOT NULL)::int
    FROM results r WHERE d.tenant_id = r.tenant_id AND d.intent_id = r.intent_id AND d.state = 'waiting'
    RETURNING d.tenant_id, d.intent_id, d.tried)
INSERT INTO delivery_attempts (tenant_id, intent_id, number, at, milliseconds, answer, error)
SELECT m.tenant_id, m.intent_id, m.tried, statement_timestamp() - r.milliseconds * interval '1 millisecond',
    r.milliseconds, r.answer, r.error
FROM moved m JOIN results r USING (tenant_id, intent_id) WHERE r.milliseconds IS NOT NULL
ON CONFLICT DO NOTHING
"""

# Whoever is to be tried again now is looked at now, also where an endpoint was to be left alone for a while; and where
# one was only probed, all that is due follows if the first is taken.
_LOOK = f"""
UPDATE endpoints e SET due_at = least(e.due_at, statement_timestamp()), held_until = NULL,
    failures = least(e.failures, {PROBE_AFTER - 1})
FROM (SELECT DISTINCT * FROM unnest($1::bigint[], $2::bigint[]) AS row (tenant_id, subscription_id)) AS row
WHERE e.tenant_id = row.tenant_id AND e.subscription_id = row.subscription_id
    AND (e.lease IS NULL OR e.due_at < statement_timestamp())
"""

# Nothing is sent to a subscription that is off: all that waits there ends, up to the event until which that is known.
_TURN_OFF = """
UPDATE deliveries d SET state = 'disabled', due_at = NULL, settled_at = statement_timestamp(),
    error = coalesce(d.error, 'the subscription is off')
FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS off (tenant_id, subscription_id, shown)
WHERE d.tenant_id = off.tenant_id AND d.subscription_id = off.subscription_id AND d.settled_at IS NULL
    AND d.seq <= off.shown
"""

# Gives endpoints back, to the end of the line. One that fails again and again is looked at after a while only.
_RELEASE = f"""
UPDATE endpoints e SET lease = NULL, failures = r.failures, width = r.width,
    held_until = statement_timestamp() + r.hold * interval '1 second',
    failing_since = CASE WHEN r.failures > 0 THEN coalesce(e.failing_since, statement_timestamp()) END,
    due_at = CASE WHEN next.due_at IS NOT NULL
        THEN greatest(next.due_at, statement_timestamp() + coalesce(r.hold, 0) * interval '1 second') END
FROM unnest($1::bigint[], $2::bigint[], $3::int[], $4::int[], $5::float8[])
    AS r (tenant_id, subscription_id, failures, width, hold)
CROSS JOIN LATERAL (
    SELECT (SELECT d.due_at FROM deliveries d WHERE d.tenant_id = r.tenant_id
        AND d.subscription_id = r.subscription_id AND d.due_at IS NOT NULL ORDER BY d.due_at LIMIT 1) AS due_at) AS next
WHERE e.tenant_id = r.tenant_id AND e.subscription_id = r.subscription_id
RETURNING e.tenant_id, e.subscription_id,
    e.failures >= {PROBE_AFTER} AND e.failing_since < statement_timestamp() - interval '{FAILING_DAYS} days' AS hopeless
"""

# Whoever enables it again begins anew.
_REST = """
UPDATE endpoints SET failures = 0, failing_since = NULL, width = 1, held_until = NULL,
    due_at = CASE WHEN lease IS NOT NULL THEN due_at END
WHERE tenant_id = $1 AND subscription_id = $2
"""

# Ends of long ago, and what was tried for them. All lie behind the position up to which it is settled what is sent, so
# that they are gone makes nothing be sent again.
_PRUNE = """
WITH old AS (
    SELECT d.tenant_id, d.intent_id FROM deliveries d
    WHERE d.settled_at < statement_timestamp() - $1 * interval '1 day'
        AND d.seq <= (SELECT s.position FROM outbox_settled s WHERE s.tenant_id = d.tenant_id LIMIT 1)
    ORDER BY d.settled_at LIMIT $2 FOR UPDATE SKIP LOCKED),
attempts AS (
    DELETE FROM delivery_attempts a USING old WHERE a.tenant_id = old.tenant_id AND a.intent_id = old.intent_id),
gone AS (
    DELETE FROM deliveries d USING old WHERE d.tenant_id = old.tenant_id AND d.intent_id = old.intent_id
    RETURNING 1)
SELECT count(*) FROM gone
"""

_decode = msgspec.json.Decoder(Subscription).decode


class Claimed(NamedTuple):
    """An endpoint that is leased. `subscription` is `None` where its read model does not know it yet."""

    tenant_id: int
    subscription_id: int
    lease: UUID
    failures: int
    width: int
    subscription: Subscription | None
    shown: int
    """Up to which event the read model goes that `subscription` is from."""


class Due(NamedTuple):
    """A delivery that is to be tried now; `changes` are the events that its message tells, oldest first."""

    tenant_id: int
    intent_id: UUID
    subscription_id: int
    kind: str
    stream_id: int
    attempts: int
    changes: Sequence[Change]

    @property
    def sequence(self) -> int:
        """The last event that it tells."""
        return self.changes[-1].seq


class Result(NamedTuple):
    """What came of one delivery.

    Attributes:
        due: The delivery.
        state: As in the table; `waiting` if it is to be tried again.
        delay: Seconds until then, `None` at an end.
        answer: The status that came back.
        error: What went wrong.
        milliseconds: How long the attempt took; `None`: there was none.
        counted: Whether the attempt counts as one of those that there are.
    """

    due: Due
    state: str
    delay: float | None = None
    answer: int | None = None
    error: str | None = None
    milliseconds: int | None = None
    counted: bool = False


class Release(NamedTuple):
    """How an endpoint is given back: its failures in a row, how wide it is, and for how many seconds to leave it."""

    failures: int
    width: int
    hold: float | None = None
    off: bool = False


class Work(NamedTuple):
    """What has come of an endpoint, or a part of it; with a `release`, that is all for this time."""

    endpoint: Claimed
    results: Sequence[Result]
    release: Release | None = None


async def fresh(connection: Connection, after: int, limit: int) -> list[int]:
    """Return tenants, at most `limit`, whose ids are above `after`, with intents that were not taken over; in order."""
    return [row["tenant_id"] for row in await connection.fetch(_FRESH, after, limit)]


async def begin(connection: Connection) -> None:
    """Set what all work on the ledger needs, for the caller's transaction."""
    await connection.execute(_BEGIN)


async def lock(connection: Connection, endpoints: Iterable[tuple[int, int]]) -> None:
    """Lock endpoints, (tenant, subscription), for the caller's transaction: whoever moves their deliveries does."""
    if columns := _columns(sorted(set(endpoints))):
        await connection.execute(_MAKE_ENDPOINTS, *columns)
        await connection.fetch(_LOCK_ENDPOINTS, *columns)


async def wake(connection: Connection, lanes: Iterable[tuple[int, int, str, int]], burst: float = 0.0) -> None:
    """Make the oldest delivery of each lane due, and its endpoint be looked at; the endpoints are locked."""
    if columns := _columns(lanes):
        await connection.execute(_WAKE_LANES, *columns, burst)
        await connection.execute(_WAKE_ENDPOINTS, *columns[:2])


async def again(connection: Connection, lanes: Iterable[tuple[int, int, str, int]]) -> None:
    """Have lanes go on, now, with the oldest that waits, after something came back to them; endpoints are locked."""
    wanted = list(lanes)
    await connection.execute(_HUSH_LANES, *_columns(wanted))
    await wake(connection, wanted)
    await look(connection, {(tenant_id, subscription_id) for tenant_id, subscription_id, _, _ in wanted})


async def look(connection: Connection, endpoints: Iterable[tuple[int, int]]) -> None:
    """Have endpoints be looked at now, whenever that was to be; they are locked."""
    await connection.execute(_LOOK, *_columns(set(endpoints)))


async def take_over(connection: Connection, tenant_ids: Sequence[int], burst: float, at_most: int = 5_000) -> int:
    """Take tenants' intents over, in the caller's transaction; return how many lanes that gave something new.

    Args:
        connection: Inside a transaction.
        tenant_ids: The tenants; those that another sender is at are passed over.
        burst: For so many seconds after the first change of a thing its message waits for more.
        at_most: About so many intents of one tenant, the others later.
    """
    await begin(connection)
    await connection.execute(_MAKE_SETTLED, tenant_ids)
    mine = [row["tenant_id"] for row in await connection.fetch(_TAKE_SETTLED, tenant_ids)]
    rows = await connection.fetch(_TAKE_OVER, mine, at_most)
    lanes = [(row["tenant_id"], row["subscription_id"], row["stream_kind"], row["stream_id"]) for row in rows]
    await lock(connection, ((tenant_id, subscription_id) for tenant_id, subscription_id, _, _ in lanes))
    await wake(connection, lanes, burst)
    return len(lanes)


async def claim(
    connection: Connection,
    lease: UUID,
    *,
    seconds: float,
    at_most: int,
    passing_over: Sequence[int] = (),
    proven: bool = False,
    proven_of: Sequence[int] = (),
) -> list[Claimed]:
    """Lease endpoints where something is due, in the caller's transaction.

    Args:
        connection: Inside a transaction.
        lease: Random; who holds it may record.
        seconds: For so long nobody else takes them.
        at_most: So many endpoints.
        passing_over: Tenants that have their share.
        proven: Only those that have answered well before.
        proven_of: The same, of these tenants.
    """
    await begin(connection)
    rows = await connection.fetch(_CLAIM, lease, at_most, list(passing_over), proven, seconds, list(proven_of))
    return [
        Claimed(
            row["tenant_id"],
            row["subscription_id"],
            lease,
            row["failures"],
            row["width"],
            _subscription(row["state"]),
            row["shown"],
        )
        for row in rows
    ]


async def take(connection: Connection, endpoints: Iterable[tuple[Claimed, int]], burst: float) -> list[Due]:
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
            [
                Change(row["seq"], row["topic"], row["created_at"]),
                *map(Change, row["seqs"] or (), row["topics"] or (), row["moments"] or ()),
            ],
        )
        for row in rows
    ]


async def record(connection: Connection, work: Sequence[Work], burst: float) -> list[Claimed]:
    """Record what came of deliveries, and give endpoints back, in the caller's transaction; only what is still leased.

    Returns:
        The endpoints given back that have failed for so long that they are to be disabled.
    """
    await begin(connection)
    leases = {(w.endpoint.tenant_id, w.endpoint.subscription_id, w.endpoint.lease) for w in work}
    held = {tuple(row) for row in await connection.fetch(_HELD, *_columns(sorted(leases)))}
    work = [w for w in work if (w.endpoint.tenant_id, w.endpoint.subscription_id, w.endpoint.lease) in held]
    if results := [result for w in work for result in w.results]:
        await connection.execute(_RECORD, *_columns(map(_result_row, results)))
    released = [(w.endpoint, w.release) for w in work if w.release is not None]
    if off := [(e.tenant_id, e.subscription_id, e.shown) for e, release in released if release.off]:
        await connection.execute(_TURN_OFF, *_columns(off))
    if ended := [r.due for r in results if r.delay is None]:
        lanes = [(due.tenant_id, due.subscription_id, due.kind, due.stream_id) for due in ended]
        await connection.execute(_WAKE_LANES, *_columns(lanes), burst)
    if not released:
        return []
    rows = [(e.tenant_id, e.subscription_id, r.failures, r.width, r.hold) for e, r in released]
    hopeless = {tuple(row)[:2] for row in await connection.fetch(_RELEASE, *_columns(rows)) if row["hopeless"]}
    return [endpoint for endpoint, _ in released if (endpoint.tenant_id, endpoint.subscription_id) in hopeless]


async def turn_off(connection: Connection, endpoint: Claimed) -> None:
    """End all that waits for a subscription that was disabled, in the caller's transaction."""
    key = (endpoint.tenant_id, endpoint.subscription_id)
    await begin(connection)
    await lock(connection, [key])
    await connection.execute(_TURN_OFF, *_columns([(*key, endpoint.shown)]))
    await connection.execute(_REST, *key)


async def prune(connection: Connection, days: float, at_most: int) -> int:
    """Forget at most so many deliveries that ended more than `days` ago; return how many."""
    pruned: int = await connection.fetchval(_PRUNE, days, at_most)
    return pruned


def _subscription(state: str | None) -> Subscription | None:
    """Return what the read model holds; `None` too where newer code than this wrote it: then others are to send."""
    try:
        return None if state is None else _decode(state)
    except msgspec.MsgspecError:
        return None


def _result_row(result: Result) -> tuple[Any, ...]:
    return (
        result.due.tenant_id,
        result.due.intent_id,
        result.state,
        result.delay,
        result.answer,
        result.error,
        result.milliseconds,
        result.counted,
    )


def _columns(rows: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]

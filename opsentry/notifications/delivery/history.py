"""The ledger of deliveries as the API reads it, and the one thing that is asked for there: to send again."""

import re
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg
import msgspec

from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery import ordering

STATES = ("waiting", "delivered", "merged", "suppressed", "withheld", "parked", "dropped", "disabled")

# What is told of one, its attempts in order.
_SHOWN = """
intent_id, topic, position, stream_kind, stream_id, state, created_at, due_at, settled_at, leader, ARRAY(
    SELECT (number, at, milliseconds, answer, error) FROM delivery_attempts a
    WHERE a.tenant_id = d.tenant_id AND a.intent_id = d.intent_id ORDER BY number) AS attempts
"""

# A page of a subscription's, the newest first: those of the event $4 behind $5, and of events before. $3 state: NULL
# for any.
_PAGE = f"""
SELECT {_SHOWN} FROM deliveries d
WHERE tenant_id = $1 AND subscription_id = $2 AND ($3::text IS NULL OR state = $3)
    AND position <= $4 AND (position < $4 OR intent_id > $5)
ORDER BY position DESC, intent_id LIMIT $6
"""

_ONE = f"SELECT {_SHOWN} FROM deliveries d WHERE tenant_id = $1 AND subscription_id = $2 AND intent_id = $3"

# Back to waiting, for another round of attempts.
_REDELIVER = """
UPDATE deliveries SET state = 'waiting', attempts = 0, answer = NULL, error = NULL, settled_at = NULL
WHERE tenant_id = $1 AND subscription_id = $2 AND intent_id = $3 AND state NOT IN ('waiting', 'merged')
RETURNING stream_kind, stream_id
"""

_ANEW = """
UPDATE endpoints SET failures = 0, failing_since = NULL, width = 1, held_until = NULL,
    due_at = least(due_at, statement_timestamp())
WHERE tenant_id = $1 AND subscription_id = $2 AND (lease IS NULL OR due_at < statement_timestamp())
"""

_LAST = 2**63 - 1
_NOBODY = UUID(int=0)


class Attempt(msgspec.Struct):
    """One time that it was sent. `answer` is a status of HTTP or SMTP, `error` is null where it was taken."""

    number: int
    at: datetime
    milliseconds: int
    answer: int | None
    error: str | None


class Delivery(msgspec.Struct, kw_only=True):
    """A delivery. `sequence` is the event told of, `merged_into` the message that told it where another one did."""

    id: str
    type: str
    sequence: int
    kind: str
    subject_id: int
    state: str
    created_at: datetime
    next_attempt_at: datetime | None
    attempts: Sequence[Attempt]
    settled_at: datetime | None
    merged_into: str | None


def message_id(intent_id: UUID) -> str:
    """Return what an intent is called outside: `msg_` and its 32 hex digits."""
    return f"msg_{intent_id.hex}"


def intent_id(message: str) -> UUID | None:
    """Return the intent that is called `message` outside, `None` if nothing can be called so."""
    return UUID(message[4:]) if re.fullmatch(r"msg_[0-9a-f]{32}", message) else None


async def list_deliveries(
    connection: Connection,
    tenant_id: int,
    subscription_id: int,
    *,
    state: str | None,
    before: UUID | None,
    limit: int,
) -> tuple[Sequence[Delivery], str | None] | None:
    """Return a subscription's deliveries, the newest first, and the id behind which there are more, if there are.

    Args:
        connection: To read with.
        tenant_id: The tenant.
        subscription_id: The subscription.
        state: Only those in one of `STATES`.
        before: Only those behind this one; the answer is `None` if the subscription has none such.
        limit: So many at most.
    """
    position = _LAST, _NOBODY
    if before is not None:
        row = await connection.fetchrow(_ONE, tenant_id, subscription_id, before)
        if row is None:
            return None
        position = row["position"], row["intent_id"]
    rows = await connection.fetch(_PAGE, tenant_id, subscription_id, state, *position, limit + 1)
    found = [_delivery(row) for row in rows[:limit]]
    return found, found[-1].id if len(rows) > limit else None


async def get_delivery(
    connection: Connection, tenant_id: int, subscription_id: int, intent_id: UUID
) -> Delivery | None:
    """Return a delivery, `None` if the subscription has none such."""
    row: asyncpg.Record | None = await connection.fetchrow(_ONE, tenant_id, subscription_id, intent_id)
    return None if row is None else _delivery(row)


async def redeliver(connection: Connection, tenant_id: int, subscription_id: int, intent_id: UUID) -> Delivery | None:
    """Have a delivery that came to its end sent again; return it as it is then, `None` if there is none such.

    One that waits, or that another message told, stays as it is. What waits of the same thing goes in its order: older
    ones first. In the caller's transaction.
    """
    endpoint = (tenant_id, subscription_id)
    await ordering.begin(connection)
    await ordering.lock(connection, [endpoint])
    row = await connection.fetchrow(_REDELIVER, tenant_id, subscription_id, intent_id)
    if row is not None:
        await ordering.again(connection, [(*endpoint, row["stream_kind"], row["stream_id"])])
    return await get_delivery(connection, tenant_id, subscription_id, intent_id)


async def reset_endpoint(connection: Connection, tenant_id: int, subscription_id: int) -> None:
    """Have a subscription's endpoint be tried now, whatever it did before: it is another one, or was mended.

    In the caller's transaction. One that nothing was ever sent to, or that somebody is at, stays as it is.
    """
    await ordering.begin(connection)
    await connection.execute(_ANEW, tenant_id, subscription_id)


def _delivery(row: asyncpg.Record) -> Delivery:
    return Delivery(
        id=message_id(row["intent_id"]),
        type=row["topic"],
        sequence=row["position"],
        kind=row["stream_kind"],
        subject_id=row["stream_id"],
        state=row["state"],
        created_at=row["created_at"],
        next_attempt_at=row["due_at"],
        attempts=[Attempt(*attempt) for attempt in row["attempts"]],
        settled_at=row["settled_at"],
        merged_into=None if row["leader"] is None else message_id(row["leader"]),
    )

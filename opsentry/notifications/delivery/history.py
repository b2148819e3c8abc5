"""Read a subscription's deliveries, as the API shows them, and send one again."""

import re
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg
import msgspec

from opsentry.infrastructure.postgres import Connection
from opsentry.notifications.delivery.ordering import configure_transaction, lock_endpoints, reschedule_now
from opsentry.notifications.delivery.states import REDELIVERABLE_STATES

# The columns of a `Delivery`, with its attempts in order.
_COLUMNS = """
intent_id, topic, position, stream_kind, stream_id, state, created_at, next_attempt_at, finalized_at, coalesced_into,
ARRAY(
    SELECT (number, attempted_at, duration_ms, response_status, error) FROM delivery_attempts a
    WHERE a.tenant_id = d.tenant_id AND a.intent_id = d.intent_id ORDER BY number) AS attempts
"""

# A page of a subscription's deliveries, newest first, that begins behind position $4 and intent $5. $3 is a state, or
# NULL for any.
_PAGE = f"""
SELECT {_COLUMNS} FROM deliveries d
WHERE tenant_id = $1 AND subscription_id = $2 AND ($3::text IS NULL OR state = $3)
    AND position <= $4 AND (position < $4 OR intent_id > $5)
ORDER BY position DESC, intent_id LIMIT $6
"""

_ONE = f"SELECT {_COLUMNS} FROM deliveries d WHERE tenant_id = $1 AND subscription_id = $2 AND intent_id = $3"

_REDELIVER = """
UPDATE deliveries
SET state = 'pending', attempts_in_round = 0, response_status = NULL, error = NULL, finalized_at = NULL
WHERE tenant_id = $1 AND subscription_id = $2 AND intent_id = $3 AND state = ANY($4)
RETURNING stream_kind, stream_id
"""

_RESET_ENDPOINT = """
UPDATE endpoints SET consecutive_failures = 0, failing_since = NULL, concurrency = 1, backoff_until = NULL,
    available_at = least(available_at, statement_timestamp())
WHERE tenant_id = $1 AND subscription_id = $2 AND (lease IS NULL OR available_at < statement_timestamp())
"""

_MAX_POSITION = 2**63 - 1
_LOWEST_INTENT_ID = UUID(int=0)


class Attempt(msgspec.Struct):
    """One attempt to send a delivery.

    Attributes:
        number: 1, 2, 3 … in all rounds.
        attempted_at: The start of the attempt.
        duration_ms: Its duration in milliseconds.
        response_status: The HTTP or SMTP status of the response; `None` if there was none.
        error: The reason of a failure; `None` for a success.
    """

    number: int
    attempted_at: datetime
    duration_ms: int
    response_status: int | None
    error: str | None


class Delivery(msgspec.Struct, kw_only=True):
    """A delivery as the API shows it.

    Attributes:
        id: `msg_` and 32 hex digits.
        type: The type of the event.
        position: The position of the event in the tenant's ledger.
        subject_kind: `incident`, `maintenance` or `subscription`.
        subject_id: The subject's id.
        state: One of `states.STATES`.
        created_at: The time at which the event was recorded.
        next_attempt_at: The time of the next attempt; `None` in a final state, or behind an older delivery.
        attempts: All attempts, oldest first.
        finalized_at: The time at which it reached its final state.
        coalesced_into: The id of the delivery that reported the event, if another one did.
    """

    id: str
    type: str
    position: int
    subject_kind: str
    subject_id: int
    state: str
    created_at: datetime
    next_attempt_at: datetime | None
    attempts: Sequence[Attempt]
    finalized_at: datetime | None
    coalesced_into: str | None


def message_id(intent_id: UUID) -> str:
    """Return the public id of an intent's message: `msg_` and 32 hex digits."""
    return f"msg_{intent_id.hex}"


def parse_message_id(message_id: str) -> UUID | None:
    """Return the intent of a public message id; `None` if the id is malformed."""
    return UUID(message_id[4:]) if re.fullmatch(r"msg_[0-9a-f]{32}", message_id) else None


async def list_deliveries(
    connection: Connection,
    tenant_id: int,
    subscription_id: int,
    *,
    state: str | None,
    before: UUID | None,
    limit: int,
) -> tuple[Sequence[Delivery], str | None] | None:
    """Return a page of a subscription's deliveries, newest first, and the id to continue behind, if there are more.

    Args:
        connection: The connection to read with.
        tenant_id: The tenant.
        subscription_id: The subscription, unique within the tenant.
        state: One of `states.STATES`; `None` for any.
        before: The intent of the delivery that the page follows.
        limit: The limit of deliveries.

    Returns:
        `None` if the subscription has no delivery `before`.
    """
    start = _MAX_POSITION, _LOWEST_INTENT_ID
    if before is not None:
        row = await connection.fetchrow(_ONE, tenant_id, subscription_id, before)
        if row is None:
            return None
        start = row["position"], row["intent_id"]
    rows = await connection.fetch(_PAGE, tenant_id, subscription_id, state, *start, limit + 1)
    deliveries = [_to_delivery(row) for row in rows[:limit]]
    return deliveries, deliveries[-1].id if len(rows) > limit else None


async def get_delivery(
    connection: Connection, tenant_id: int, subscription_id: int, intent_id: UUID
) -> Delivery | None:
    """Return a delivery; `None` if the subscription has none with this intent."""
    row: asyncpg.Record | None = await connection.fetchrow(_ONE, tenant_id, subscription_id, intent_id)
    return None if row is None else _to_delivery(row)


async def redeliver(connection: Connection, tenant_id: int, subscription_id: int, intent_id: UUID) -> Delivery | None:
    """Put a final delivery back to `pending`, in the caller's transaction, and return it.

    A pending or coalesced delivery stays as it is. Pending deliveries of the same ordering key keep their order: older
    ones are sent first.

    Returns:
        The delivery afterwards; `None` if the subscription has none with this intent.
    """
    endpoint = (tenant_id, subscription_id)
    await configure_transaction(connection)
    await lock_endpoints(connection, [endpoint])
    row = await connection.fetchrow(_REDELIVER, tenant_id, subscription_id, intent_id, REDELIVERABLE_STATES)
    if row is not None:
        await reschedule_now(connection, [(*endpoint, row["stream_kind"], row["stream_id"])])
    return await get_delivery(connection, tenant_id, subscription_id, intent_id)


async def reset_endpoint(connection: Connection, tenant_id: int, subscription_id: int) -> None:
    """Reset an endpoint's health and try it now, in the caller's transaction: its target changed or was repaired.

    A leased endpoint stays as it is, and so does a subscription that nothing was ever enqueued for.
    """
    await configure_transaction(connection)
    await connection.execute(_RESET_ENDPOINT, tenant_id, subscription_id)


def _to_delivery(row: asyncpg.Record) -> Delivery:
    return Delivery(
        id=message_id(row["intent_id"]),
        type=row["topic"],
        position=row["position"],
        subject_kind=row["stream_kind"],
        subject_id=row["stream_id"],
        state=row["state"],
        created_at=row["created_at"],
        next_attempt_at=row["next_attempt_at"],
        attempts=[Attempt(*attempt) for attempt in row["attempts"]],
        finalized_at=row["finalized_at"],
        coalesced_into=None if row["coalesced_into"] is None else message_id(row["coalesced_into"]),
    )

"""Use cases of deliveries: list the messages to a subscription, read one, send one again."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.errors import NotFound
from opsentry.application.queries import is_behind, lag_events, read_row
from opsentry.domain.decider import IllegalTransition, InvalidField
from opsentry.infrastructure.postgres import Record
from opsentry.notifications.delivery import history
from opsentry.notifications.delivery.history import Delivery
from opsentry.projections import subscriptions
from opsentry.projections.engine.projector import PositionNotReached


class DeliveryPage(NamedTuple):
    """Deliveries of a subscription, the newest first; `next_id` is where the next page begins, `None` at the end."""

    items: Sequence[Delivery]
    next_id: str | None
    position: int
    lag_events: int


class FoundDelivery(NamedTuple):
    """One delivery, with the ledger position that its subscription's read model shows."""

    delivery: Delivery
    position: int
    lag_events: int


async def list_deliveries(
    app: Application, caller: Caller, subscription_id: int, *, state: str | None, before: str | None, limit: int
) -> DeliveryPage:
    """Return a page of a subscription's deliveries.

    Args:
        app: The application.
        caller: The caller.
        subscription_id: The subscription.
        state: Only deliveries in this state.
        before: The id of the delivery after which the page begins.
        limit: The number of deliveries at most.

    Raises:
        MissingPermission: The caller may not manage subscriptions.
        NotFound: The tenant has no such subscription.
        InvalidField: `before` is no delivery of the subscription.
        PositionNotReached, DatabaseUnavailable: It cannot be read.
    """
    row = await _subscription(app, caller, subscription_id)
    intent_id = None if before is None else history.parse_message_id(before)
    found = None
    if before is None or intent_id is not None:
        async with app.database.connection() as connection:
            found = await history.list_deliveries(
                connection, caller.tenant_id, subscription_id, state=state, before=intent_id, limit=limit
            )
    if found is None:
        raise InvalidField("before", "must be the id of a delivery of this subscription")
    return DeliveryPage(*found, row["projected_position"] or 0, lag_events(row))


async def get_delivery(app: Application, caller: Caller, subscription_id: int, delivery_id: str) -> FoundDelivery:
    """Return one delivery; raises `NotFound`, and as `list_deliveries`."""
    intent_id = _intent_id(delivery_id)
    row = await _subscription(app, caller, subscription_id)
    async with app.database.connection() as connection:
        delivery = await history.get_delivery(connection, caller.tenant_id, subscription_id, intent_id)
    return _found(delivery, row)


async def redeliver(app: Application, caller: Caller, subscription_id: int, delivery_id: str) -> FoundDelivery:
    """Send a finished delivery again.

    Raises:
        NotFound: There is no such delivery.
        IllegalTransition: Another message carried it, or the subscription is not active.
    Further, raises as `list_deliveries`.
    """
    intent_id = _intent_id(delivery_id)
    row = await _subscription(app, caller, subscription_id)
    is_active = row["status"] == "active"
    change = history.redeliver if is_active else history.get_delivery
    async with app.database.transaction() as connection:
        found = _found(await change(connection, caller.tenant_id, subscription_id, intent_id), row)
    if found.delivery.state == "coalesced":
        raise IllegalTransition(f"message {found.delivery.coalesced_into} carried it: send that one again")
    if not is_active:
        raise IllegalTransition(f"only an active subscription receives messages; this one is {row['status']}")
    return found


async def _subscription(app: Application, caller: Caller, subscription_id: int) -> Record:
    caller.require("write:subscriptions")
    row = await read_row(
        app,
        caller,
        lambda connection: subscriptions.select_subscription(connection, caller.tenant_id, subscription_id),
    )
    if row["body"] is None:
        if is_behind(row):
            raise PositionNotReached("the last changes cannot be shown yet")
        raise NotFound
    return row


def _intent_id(delivery_id: str) -> UUID:
    found = history.parse_message_id(delivery_id)
    if found is None:
        raise NotFound
    return found


def _found(delivery: Delivery | None, row: Record) -> FoundDelivery:
    if delivery is None:
        raise NotFound
    return FoundDelivery(delivery, row["projected_position"] or 0, lag_events(row))

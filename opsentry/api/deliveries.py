"""`/subscriptions/:id/deliveries…`: what came of each message."""

from uuid import UUID

import asyncpg
import msgspec
from aiohttp import web

from opsentry.api.context import RequestContext
from opsentry.api.errors import BadRequest, NotFound
from opsentry.api.responses import add_digest, add_links, object_response, with_position
from opsentry.domain.decider import IllegalTransition
from opsentry.notifications.delivery import history
from opsentry.projections import subscriptions

DEFAULT_LIMIT, MAX_LIMIT = 50, 200


async def listing(call: RequestContext) -> web.Response:
    """`GET /subscriptions/:id/deliveries`."""
    number = call.id()
    state = call.choice("state", history.STATES)
    limit = min(call.number("limit", DEFAULT_LIMIT, lowest=1), MAX_LIMIT)
    named = call.request.query.get("before")
    before = None if named is None else history.intent_id(named)
    row = await _subscription(call, number)
    found = None
    if before is not None or named is None:
        async with call.parts.database.connection() as connection:
            found = await history.list_deliveries(
                connection, call.tenant_id, number, state=state, before=before, limit=limit
            )
    if found is None:
        raise BadRequest("before: must be the id of a delivery of this subscription")
    items, more = found
    answer = {"deliveries": items, "limit": limit, "next": more}
    response = add_digest(object_response(msgspec.json.encode(answer)))
    if more is not None:
        add_links(call, response, {"next": {"before": more}})
    return with_position(response, row)


async def one(call: RequestContext) -> web.Response:
    """`GET /subscriptions/:id/deliveries/:delivery_id`."""
    number, intent_id = call.id(), _intent_id(call)
    row = await _subscription(call, number)
    async with call.parts.database.connection() as connection:
        found = _found(await history.get_delivery(connection, call.tenant_id, number, intent_id))
    return with_position(add_digest(object_response(msgspec.json.encode(found))), row)


async def redeliver(call: RequestContext) -> web.Response:
    """`POST /subscriptions/:id/deliveries/:delivery_id/redeliver`."""
    number, intent_id = call.id(), _intent_id(call)
    row = await _subscription(call, number)
    send = history.redeliver if row["status"] == "active" else history.get_delivery
    async with call.parts.database.transaction() as connection:
        found = _found(await send(connection, call.tenant_id, number, intent_id))
    if found.state == "merged":
        raise IllegalTransition(f"it was told by {found.merged_into}: have that one sent again")
    if row["status"] != "active":
        raise IllegalTransition(f"only to an active subscription is anything sent; this one is {row['status']}")
    return with_position(object_response(msgspec.json.encode(found), status=202), row)


async def _subscription(call: RequestContext, number: int) -> asyncpg.Record:
    """Return the row of the subscription that the path names; raises `NotFound`."""
    row = await call.read(lambda connection: subscriptions.select_subscription(connection, call.tenant_id, number))
    if row["body"] is None:
        raise NotFound
    return row


def _intent_id(call: RequestContext) -> UUID:
    found = history.intent_id(call.request.match_info["delivery_id"])
    if found is None:
        raise NotFound
    return found


def _found(delivery: history.Delivery | None) -> history.Delivery:
    if delivery is None:
        raise NotFound
    return delivery

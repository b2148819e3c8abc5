"""`/api/v1/subscriptions/{id}/deliveries`."""

from collections.abc import Sequence
from typing import Literal

import msgspec
from aiohttp import web

from opsentry.application import deliveries
from opsentry.application.caller import Permission
from opsentry.application.deliveries import FoundDelivery
from opsentry.http.body import NoBody
from opsentry.http.context import RequestContext
from opsentry.http.operation import operation
from opsentry.http.params import Limit, NoQuery
from opsentry.http.responses import add_links, encoded_response
from opsentry.notifications.delivery.history import Delivery
from opsentry.notifications.delivery.states import STATES

_TAG = "Deliveries"
_SCOPES: tuple[Permission, ...] = ("write:subscriptions",)

DeliveryState = Literal[STATES]  # type: ignore[valid-type]


class ListDeliveriesQuery(msgspec.Struct, kw_only=True):
    """A page of deliveries behind another one."""

    state: DeliveryState | None = None
    before: str | None = None
    limit: Limit = 50


class DeliveryList(msgspec.Struct):
    """Deliveries, the newest first. `next` is the `before` of the next page; null at the end."""

    deliveries: Sequence[Delivery]
    limit: int
    next: str | None


@operation(
    "GET", "/api/v1/subscriptions/{id}/deliveries", tag=_TAG, scopes=_SCOPES, result=DeliveryList, conditional=True
)
async def list_deliveries(context: RequestContext[ListDeliveriesQuery, NoBody]) -> web.StreamResponse:
    """List the messages to a subscription, the newest first."""
    query = context.query
    page = await deliveries.list_deliveries(
        context.application,
        context.caller,
        context.id,
        state=query.state,
        before=query.before,
        limit=query.limit,
    )
    body = DeliveryList(page.items, query.limit, page.next_id)
    response = encoded_response(body, position=page.position, lag_events=page.lag_events)
    if page.next_id is not None:
        add_links(context.request, response, {"next": {"before": page.next_id}})
    return response


@operation(
    "GET",
    "/api/v1/subscriptions/{id}/deliveries/{delivery_id}",
    tag=_TAG,
    scopes=_SCOPES,
    result=Delivery,
    conditional=True,
)
async def get_delivery(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Get a message to a subscription with its attempts."""
    return _response(
        await deliveries.get_delivery(context.application, context.caller, context.id, _delivery_id(context))
    )


@operation(
    "POST",
    "/api/v1/subscriptions/{id}/deliveries/{delivery_id}/redeliver",
    tag=_TAG,
    scopes=_SCOPES,
    status=202,
    result=Delivery,
    errors=(409,),
)
async def redeliver(context: RequestContext[NoQuery, NoBody]) -> web.StreamResponse:
    """Send a finished message again."""
    found = await deliveries.redeliver(context.application, context.caller, context.id, _delivery_id(context))
    return _response(found, status=202)


def _delivery_id(context: RequestContext[NoQuery, NoBody]) -> str:
    return str(context.request.match_info["delivery_id"])


def _response(found: FoundDelivery, *, status: int = 200) -> web.Response:
    response = encoded_response(found.delivery, position=found.position, lag_events=found.lag_events)
    response.set_status(status)
    return response


OPERATIONS = (list_deliveries, get_delivery, redeliver)

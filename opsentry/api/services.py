"""`/services…`: the registry."""

from aiohttp import web

from opsentry.api.context import RequestContext
from opsentry.api.responses import (
    add_digest,
    list_response,
    one_as_of,
    one_response,
    page_as_of,
)
from opsentry.domain.service import STATUSES, VISIBILITIES
from opsentry.projections import services
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import ServiceFilter


async def listing(call: RequestContext) -> web.Response:
    """`GET /services`."""
    filter_ = ServiceFilter(
        call.choice("status", STATUSES), call.choice("visibility", VISIBILITIES), call.text("search")
    )
    limit, offset = call.page(default=100)
    page = PageRequest(limit, offset)
    if (position := await call.as_of()) is not None:
        found = await call.parts.as_of_queries.list_services(call.tenant_id, position, filter_, page)
        return page_as_of(call, "services", found, (limit, offset))
    row = await call.read(lambda connection: services.select_services(connection, call.tenant_id, filter_, page))
    return list_response(call, "services", row, (limit, offset))


async def one(call: RequestContext) -> web.Response:
    """`GET /services/:id`."""
    service_id = call.id()
    if (position := await call.as_of()) is not None:
        found = await call.parts.as_of_queries.get_service(call.tenant_id, service_id, position)
        return add_digest(one_as_of(found, position))
    return one_response(
        await call.read(lambda connection: services.select_service(connection, call.tenant_id, service_id))
    )

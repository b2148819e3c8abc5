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
from opsentry.projections.as_of import One
from opsentry.projections.services import ServiceView


async def listing(call: RequestContext) -> web.Response:
    """`GET /services`."""
    status = call.choice("status", STATUSES)
    visibility = call.choice("visibility", VISIBILITIES)
    search = call.text("search")
    limit, offset = call.page(default=100)
    if (position := await call.as_of()) is not None:
        sought = (search or "").lower()

        def wanted(view: ServiceView) -> bool:
            return (
                status in {None, view.current_status}
                and visibility in {None, view.visibility}
                and (sought in view.name.lower() or sought in view.slug)
            )

        found = await call.parts.as_of_queries.services(call.tenant_id, position, wanted, limit, offset)
        return page_as_of(call, "services", found, (limit, offset))
    row = await call.read(
        lambda connection: services.select_services(
            connection,
            call.tenant_id,
            status=status,
            visibility=visibility,
            search=search,
            limit=limit,
            offset=offset,
        )
    )
    return list_response(call, "services", row, (limit, offset))


async def one(call: RequestContext) -> web.Response:
    """`GET /services/:id`."""
    service_id = call.id()
    if (position := await call.as_of()) is not None:
        found = await call.parts.as_of_queries.services(
            call.tenant_id, position, lambda view: view.id == service_id, 1, 0
        )
        return add_digest(one_as_of(One(found["items"], None) if found["total"] else None, position))
    return one_response(
        await call.read(lambda connection: services.select_service(connection, call.tenant_id, service_id))
    )

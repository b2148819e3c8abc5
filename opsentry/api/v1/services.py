"""`/api/v1/services`."""

from aiohttp import web

from opsentry.api.v1.schemas import Service, ServiceList
from opsentry.application import services
from opsentry.domain.service import ServiceStatus
from opsentry.domain.visibility import Visibility
from opsentry.http.body import NoBody
from opsentry.http.context import RequestContext
from opsentry.http.operation import operation
from opsentry.http.params import AsOf, AsOfQuery, Limit, PageQuery
from opsentry.http.responses import list_response, resource_response
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import ServiceFilter


class ListServicesQuery(PageQuery, kw_only=True):
    """Filters and page of the service list."""

    limit: Limit = 100
    status: ServiceStatus | None = None
    visibility: Visibility | None = None
    search: str | None = None
    as_of: AsOf | None = None


@operation("GET", "/api/v1/services", tag="Services", scopes=("read:status",), result=ServiceList, conditional=True)
async def list_services(context: RequestContext[ListServicesQuery, NoBody]) -> web.StreamResponse:
    """List services by name.

    `search` finds a part of the name or of the slug.
    """
    query = context.query
    page = PageRequest(query.limit, query.offset)
    service_filter = ServiceFilter(query.status, query.visibility, query.search or None)
    listing = await services.list_services(context.application, context.caller, service_filter, page, query.as_of)
    return list_response(context.request, "services", listing, page)


@operation("GET", "/api/v1/services/{id}", tag="Services", scopes=("read:status",), result=Service, conditional=True)
async def get_service(context: RequestContext[AsOfQuery, NoBody]) -> web.StreamResponse:
    """Get a service with its status."""
    found = await services.get_service(context.application, context.caller, context.id, context.query.as_of)
    return resource_response(found)


OPERATIONS = (list_services, get_service)

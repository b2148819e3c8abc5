"""`/api/v1/uptime` and `/api/v1/services/{id}/uptime`."""

from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from opsentry.application import uptime
from opsentry.application.uptime import (
    MAX_DAYS,
    DailyUptime,
    ServiceTrailingUptime,
    ServiceUptime,
    TenantTrailingUptime,
    TenantUptime,
    UptimeAnswer,
)
from opsentry.http.body import NoBody
from opsentry.http.context import RequestContext
from opsentry.http.operation import operation
from opsentry.http.params import Timestamp
from opsentry.http.responses import encoded_response

_TAG = "Uptime"


class WindowQuery(msgspec.Struct, kw_only=True, rename={"from_": "from"}):
    """One window; trailing windows without it."""

    from_: Timestamp | None = None
    to: Timestamp | None = None


class ServiceUptimeQuery(WindowQuery, kw_only=True, rename={"from_": "from"}):
    """The same, with the parts of the percentage."""

    explain: bool = False


class DailyUptimeQuery(msgspec.Struct, kw_only=True):
    """The number of days, today included."""

    days: Annotated[int, Meta(ge=1, le=MAX_DAYS)] = 90


@operation(
    "GET",
    "/api/v1/services/{id}/uptime",
    tag=_TAG,
    scopes=("read:status",),
    result=(ServiceTrailingUptime, ServiceUptime),
    conditional=True,
)
async def get_service_uptime(context: RequestContext[ServiceUptimeQuery, NoBody]) -> web.StreamResponse:
    """Get the uptime of a service.

    Without parameters: of the last 24 hours, 7 days and 30 days. With `from` or `to`: of that window. With `explain`:
    with every incident and window that counts.
    """
    query = context.query
    answer = await uptime.get_service_uptime(
        context.application, context.caller, context.id, query.from_, query.to, is_explained=query.explain
    )
    return _response(answer)


@operation(
    "GET",
    "/api/v1/services/{id}/uptime/daily",
    tag=_TAG,
    scopes=("read:status",),
    result=DailyUptime,
    conditional=True,
)
async def get_daily_uptime(context: RequestContext[DailyUptimeQuery, NoBody]) -> web.StreamResponse:
    """Get the uptime of a service on each day in UTC, the oldest first."""
    answer = await uptime.get_daily_uptime(context.application, context.caller, context.id, context.query.days)
    return _response(answer)


@operation(
    "GET",
    "/api/v1/uptime",
    tag=_TAG,
    scopes=("read:status",),
    result=(TenantTrailingUptime, TenantUptime),
    conditional=True,
)
async def get_tenant_uptime(context: RequestContext[WindowQuery, NoBody]) -> web.StreamResponse:
    """Get the uptime of each service and of all together."""
    query = context.query
    return _response(await uptime.get_tenant_uptime(context.application, context.caller, query.from_, query.to))


def _response(answer: UptimeAnswer) -> web.Response:
    return encoded_response(answer.value, position=answer.position, lag_events=answer.lag_events)


OPERATIONS = (get_service_uptime, get_daily_uptime, get_tenant_uptime)

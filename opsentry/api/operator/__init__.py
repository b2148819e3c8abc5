"""`/ops`: how projections and sending stand, over all tenants, for operators. Nothing here changes anything."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import web

from opsentry.application.operator_queries import OperatorQueries
from opsentry.http.operation import operation
from opsentry.http.responses import NO_STORE, json_response

OPERATOR_QUERIES = web.AppKey("operator_queries", OperatorQueries)

_TAG = "Operators"


class ProjectionStatusList(msgspec.Struct):
    """A row for each projection."""

    projections: Sequence[Mapping[str, Any]]


class HaltedList(msgspec.Struct):
    """A row for each halt."""

    halted: Sequence[Mapping[str, Any]]


class SendingStatusList(msgspec.Struct):
    """A row for each tenant with unfinished deliveries."""

    outbox: Sequence[Mapping[str, Any]]


@operation("GET", "/ops/projections", tag=_TAG, audience="operator", result=ProjectionStatusList)
async def list_projection_status(request: web.Request) -> web.StreamResponse:
    """List projections: tenants that are up to date, behind and halted, and the lag."""
    return _response(ProjectionStatusList(await request.app[OPERATOR_QUERIES].projections()))


@operation("GET", "/ops/projections/halted", tag=_TAG, audience="operator", result=HaltedList)
async def list_halted_projections(request: web.Request) -> web.StreamResponse:
    """List projections that an event halted, and why."""
    return _response(HaltedList(await request.app[OPERATOR_QUERIES].halted()))


@operation("GET", "/ops/outbox", tag=_TAG, audience="operator", result=SendingStatusList)
async def list_sending_status(request: web.Request) -> web.StreamResponse:
    """List tenants with unfinished deliveries: how many are due, pending and exhausted."""
    return _response(SendingStatusList(await request.app[OPERATOR_QUERIES].outbox()))


def _response(body: msgspec.Struct) -> web.Response:
    response = json_response(msgspec.json.encode(body))
    response.headers.update(NO_STORE)
    return response


OPERATIONS = (list_projection_status, list_halted_projections, list_sending_status)

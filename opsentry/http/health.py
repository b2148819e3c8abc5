"""Health: a probe that needs nothing, liveness, and readiness."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from opsentry.application.readiness import Readiness
from opsentry.http.auth import is_operator
from opsentry.http.context import Dependencies
from opsentry.http.operation import operation
from opsentry.http.responses import NO_STORE

READINESS = web.AppKey("readiness", Readiness)
DEPENDENCIES = web.AppKey("dependencies", Dependencies)

_TAG = "Health"
# The fields of a check that anyone sees. The others add up the work of all tenants.
_PUBLIC_FIELDS = ("status", "error", "duration_ms")
# Made once: a load balancer asks every process many times a second.
_PROBE_HEADERS = CIMultiDict({"Content-Type": "text/plain; charset=utf-8", **NO_STORE})


class Liveness(msgspec.Struct):
    """The process runs."""

    status: str


class ReadinessBody(msgspec.Struct):
    """The state of each dependency; `duration_ms` is in milliseconds."""

    status: str
    checks: Mapping[str, Mapping[str, Any]]


@operation("GET", "/health", tag=_TAG, audience="anyone", media_type="text/plain")
async def probe(_: web.Request) -> web.StreamResponse:
    """Answer `OK` while the process can serve.

    For load balancers: touches no dependency.
    """
    return web.Response(body=b"OK", headers=_PROBE_HEADERS)


@operation("GET", "/health/live", tag=_TAG, audience="anyone", result=Liveness)
async def get_liveness(_: web.Request) -> web.StreamResponse:
    """Answer while the process runs, in JSON."""
    return web.Response(body=b'{"status":"ok"}\n', content_type="application/json", charset="utf-8", headers=NO_STORE)


@operation("GET", "/health/ready", tag=_TAG, audience="anyone", result=ReadinessBody, errors=(503,))
async def get_readiness(request: web.Request) -> web.StreamResponse:
    """Answer 200 while PostgreSQL, Redis and the outbox are healthy, else 503.

    With an operator's token the checks also have counts, over all tenants.
    """
    report = await request.app[READINESS].report()
    checks = report.checks
    if not await is_operator(request.app[DEPENDENCIES], request):
        checks = {
            name: {field: check[field] for field in _PUBLIC_FIELDS if field in check} for name, check in checks.items()
        }
    body = ReadinessBody("ready" if report.is_ready else "unavailable", checks)
    return web.Response(
        status=HTTPStatus.OK if report.is_ready else HTTPStatus.SERVICE_UNAVAILABLE,
        body=msgspec.json.encode(body) + b"\n",
        content_type="application/json",
        charset="utf-8",
        headers=NO_STORE,
    )


OPERATIONS = (probe, get_liveness, get_readiness)

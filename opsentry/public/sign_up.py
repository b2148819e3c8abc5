"""Serve the sign-up by email on a tenant's page. A subscription starts only after the recipient confirms it."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from aiohttp import web

from opsentry.application.sign_up import (
    RESEND_AFTER_SECONDS,
    find_public_tenant,
    list_public_services,
    sign_up,
    visitor,
)
from opsentry.domain.subscription import CONFIRMATION_DAYS
from opsentry.http.auth import source_address
from opsentry.http.body import NotJson, read_body
from opsentry.http.context import Dependencies
from opsentry.http.errors import RateLimited
from opsentry.http.server import REQUEST_ID
from opsentry.infrastructure.postgres import Record
from opsentry.infrastructure.rate_limit import RateLimiter
from opsentry.notifications.channel import Channel
from opsentry.notifications.messages.text import severity_choices
from opsentry.projections.services import ServiceLink
from opsentry.public.pages import page
from opsentry.public.sign_up_form import EMAIL, MAX_SERVICES, SignUpForm

# Every sign-up takes at least this long, so that the time does not reveal who is subscribed.
MIN_RESPONSE_SECONDS = 0.3

_FORM_TYPE = "application/x-www-form-urlencoded"


class SignUpPages:
    """Serve `/status/{slug}/subscribe`. The response is the same for every address, so it reveals no subscriber."""

    def __init__(self, dependencies: Dependencies, sign_up_limiter: RateLimiter) -> None:
        self._dependencies = dependencies
        self._sign_up_limiter = sign_up_limiter
        settings = dependencies.settings
        is_configured = bool(settings.smtp_url and settings.encryption_keys)
        self._channel: Channel | None = dependencies.application.channels.get(EMAIL) if is_configured else None

    async def show_form(self, request: web.Request) -> web.Response:
        """`GET /status/{slug}/subscribe`: show the empty form."""
        tenant = await self._tenant(request)
        if self._channel is None:
            return page("unavailable.html", tenant=tenant)
        return _form_page(tenant, await self._offered_services(tenant, request), SignUpForm())

    async def submit_form(self, request: web.Request) -> web.Response:
        """`POST /status/{slug}/subscribe`: create a pending subscription, or show the form with its errors."""
        tenant = await self._tenant(request)
        if self._channel is None:
            return page("unavailable.html", status=503, tenant=tenant)
        if request.content_type != _FORM_TYPE:
            raise NotJson
        timeout_seconds = self._dependencies.settings.request_body_timeout_seconds
        form = SignUpForm.parse(await read_body(request, timeout_seconds))
        offered = await self._offered_services(tenant, request)
        if problems := form.validate(self._channel, offered):
            return _form_page(tenant, offered, form, problems, status=400)
        limit = self._sign_up_limiter.hit(self._address(request))
        if not limit.allowed:
            raise RateLimited(limit)
        started_at = time.monotonic()
        caller = visitor(tenant["tenant_id"], request[REQUEST_ID])
        await sign_up(self._dependencies.application, caller, form.command(self._channel))
        await asyncio.sleep(max(0.0, started_at + MIN_RESPONSE_SECONDS - time.monotonic()))
        # A relative location works under any path at which a proxy serves these pages.
        return web.Response(status=303, headers={"Location": "subscribe/sent"})

    async def show_sent(self, request: web.Request) -> web.Response:
        """`GET /status/{slug}/subscribe/sent`: say that the confirmation email is on its way."""
        tenant = await self._tenant(request)
        return page("sent.html", tenant=tenant, days=CONFIRMATION_DAYS, minutes=RESEND_AFTER_SECONDS // 60)

    async def _tenant(self, request: web.Request) -> Record:
        """Return the row of the tenant in the path.

        Raises:
            RateLimited: The client opened too many pages.
            NotFound: No tenant has this slug.
        """
        dependencies = self._dependencies
        limit = dependencies.request_limiter.hit("page", self._address(request))
        if not limit.allowed:
            raise RateLimited(limit)
        return await find_public_tenant(dependencies.application, request.match_info["slug"])

    def _address(self, request: web.Request) -> str:
        return source_address(request, self._dependencies.settings.trusted_proxies)

    async def _offered_services(self, tenant: Record, request: web.Request) -> Sequence[ServiceLink]:
        caller = visitor(tenant["tenant_id"], request[REQUEST_ID])
        return await list_public_services(self._dependencies.application, caller, MAX_SERVICES)


def _form_page(
    tenant: Record,
    offered: Sequence[ServiceLink],
    form: SignUpForm,
    problems: Mapping[str, str] | None = None,
    *,
    status: int = 200,
) -> web.Response:
    return page(
        "subscribe.html",
        status=status,
        tenant=tenant,
        offered=offered,
        form=form,
        severities=severity_choices(),
        problems=problems or {},
    )

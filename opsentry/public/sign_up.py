"""Serve the sign-up by email on a tenant's page. A subscription starts only after the recipient confirms it."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import msgspec
from aiohttp import web

from opsentry.api.commands import catch_up
from opsentry.api.context import Dependencies
from opsentry.api.errors import NotFound, NotJson, RateLimited
from opsentry.api.request import REQUEST_ID, address, octets
from opsentry.api.subscriptions import removal
from opsentry.domain import subscription
from opsentry.domain.decider import IllegalTransition
from opsentry.domain.subscription import CONFIRMATION_DAYS, CreateSubscription
from opsentry.events.codec import Actor, Meta
from opsentry.identity import tenants
from opsentry.identity.tenants import TenantNotFound
from opsentry.infrastructure.rate_limit import RateLimiter
from opsentry.notifications.channel import Channel
from opsentry.notifications.messages.text import severity_choices
from opsentry.projections import services, subscriptions
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import ServiceFilter, ServiceLink
from opsentry.public.pages import page
from opsentry.public.sign_up_form import EMAIL, MAX_SERVICES, SignUpForm

# A sign-up within this time after the last one sends no second email: the first may still be on its way.
RESEND_AFTER_SECONDS = 600
# Every sign-up takes at least this long, so that the time does not reveal who is subscribed.
MIN_RESPONSE_SECONDS = 0.3

_FORM_TYPE = "application/x-www-form-urlencoded"

_decode_services = msgspec.json.Decoder(list[ServiceLink]).decode


class ExistingSubscription(NamedTuple):
    """A subscription that the address already has.

    Attributes:
        subscription_id: The id within the tenant.
        status: `pending`, `active` or `disabled`.
        age_seconds: The time since its creation.
    """

    subscription_id: int
    status: str
    age_seconds: float


def decide_sign_up(existing: Iterable[ExistingSubscription]) -> Sequence[int] | None:
    """Decide whether a sign-up creates a subscription.

    Args:
        existing: The address's subscriptions to the tenant.

    Returns:
        The ids of the pending subscriptions that the new one replaces, or `None` if none is created: the address is
        subscribed, or a confirmation email was sent less than `RESEND_AFTER_SECONDS` ago.
    """
    replaced = []
    for known in existing:
        if known.status == "active" or (known.status == "pending" and known.age_seconds < RESEND_AFTER_SECONDS):
            return None
        if known.status == "pending":
            replaced.append(known.subscription_id)
    return replaced


class SignUpPages:
    """Serve `/status/{slug}/subscribe`. The response is the same for every address, so it reveals no subscriber."""

    def __init__(self, parts: Dependencies, sign_up_limiter: RateLimiter) -> None:
        self._parts = parts
        self._sign_up_limiter = sign_up_limiter
        is_configured = bool(parts.settings.smtp_url and parts.settings.encryption_keys)
        self._channel: Channel | None = parts.channels.get(EMAIL) if is_configured else None
        # Two requests of one impatient visitor must not create two subscriptions.
        self._locks: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()

    async def show_form(self, request: web.Request) -> web.Response:
        """`GET /status/{slug}/subscribe`: show the empty form."""
        tenant = await self._tenant(request)
        if self._channel is None:
            return page("unavailable.html", tenant=tenant)
        return _form_page(tenant, await self._offered_services(tenant["tenant_id"]), SignUpForm())

    async def submit_form(self, request: web.Request) -> web.Response:
        """`POST /status/{slug}/subscribe`: create a pending subscription, or show the form with its errors."""
        tenant = await self._tenant(request)
        if self._channel is None:
            return page("unavailable.html", status=503, tenant=tenant)
        if request.content_type != _FORM_TYPE:
            raise NotJson
        form = SignUpForm.parse(await octets(request, self._parts.settings.request_body_timeout_seconds))
        offered = await self._offered_services(tenant["tenant_id"])
        if problems := form.validate(self._channel, offered):
            return _form_page(tenant, offered, form, problems, status=400)
        limit = self._sign_up_limiter.hit(address(request, self._parts.settings.trusted_proxies))
        if not limit.allowed:
            raise RateLimited(limit)
        started_at = time.monotonic()
        await self._sign_up(tenant["tenant_id"], form.command(self._channel), request[REQUEST_ID])
        await asyncio.sleep(max(0.0, started_at + MIN_RESPONSE_SECONDS - time.monotonic()))
        # A relative location works under any path at which a proxy serves these pages.
        return web.Response(status=303, headers={"Location": "subscribe/sent"})

    async def show_sent(self, request: web.Request) -> web.Response:
        """`GET /status/{slug}/subscribe/sent`: say that the confirmation email is on its way."""
        tenant = await self._tenant(request)
        return page("sent.html", tenant=tenant, days=CONFIRMATION_DAYS, minutes=RESEND_AFTER_SECONDS // 60)

    async def _sign_up(self, tenant_id: int, command: CreateSubscription, request_id: str) -> None:
        """Create the subscription if `decide_sign_up` says so, and remove those that it replaces."""
        async with self._locks.setdefault((tenant_id, command.target), asyncio.Lock()):
            replaced = decide_sign_up(await self._existing(tenant_id, command.target))
            if replaced is None:
                return
            commands, meta = self._parts.commands, Meta(Actor("visitor"), request_id)
            for subscription_id in replaced:
                with suppress(IllegalTransition):  # removed since it was read
                    await commands.execute(subscription.DECIDER, tenant_id, subscription_id, removal, meta)
            created = await commands.create(subscription.DECIDER, tenant_id, command, meta)
            await catch_up(self._parts.projector, tenant_id, created.position, request_id)

    async def _existing(self, tenant_id: int, target: str) -> Iterable[ExistingSubscription]:
        row = await self._parts.projector.read(
            tenant_id, lambda connection: subscriptions.select_by_target(connection, tenant_id, EMAIL, target)
        )
        found = zip(row["ids"] or (), row["statuses"] or (), row["ages"] or (), strict=True)
        return [ExistingSubscription(*each) for each in found]

    async def _tenant(self, request: web.Request) -> Mapping[str, Any]:
        """Return the row of the tenant in the path.

        Raises:
            RateLimited: The client opened too many pages.
            NotFound: No tenant has this slug.
        """
        limit = self._parts.limiter.hit("page", address(request, self._parts.settings.trusted_proxies))
        if not limit.allowed:
            raise RateLimited(limit)
        try:
            async with self._parts.database.connection() as connection:
                row: Mapping[str, Any] = await tenants.find_tenant(connection, request.match_info["slug"])
        except TenantNotFound:
            raise NotFound from None
        return row

    async def _offered_services(self, tenant_id: int) -> Sequence[ServiceLink]:
        """Return the tenant's public services, which alone a visitor may select."""
        row = await self._parts.projector.read(
            tenant_id,
            lambda connection: services.select_services(
                connection, tenant_id, ServiceFilter(visibility="public"), PageRequest(MAX_SERVICES)
            ),
        )
        return _decode_services(b"[%b]" % (row["items"] or b""))


def _form_page(
    tenant: Mapping[str, Any],
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

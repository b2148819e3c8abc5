"""SignUp by e-mail on a tenant's page: whoever reads the mailbox has to agree before anything else is sent."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qs
from weakref import WeakValueDictionary

import msgspec
from aiohttp import web

from opsentry.api.commands import catch_up
from opsentry.api.context import Dependencies
from opsentry.api.errors import BadRequest, NotFound, NotJson, RateLimited
from opsentry.api.request import REQUEST_ID, address, octets
from opsentry.api.subscriptions import removal
from opsentry.domain import subscription
from opsentry.domain.decider import IllegalTransition
from opsentry.domain.incident import SEVERITIES
from opsentry.domain.subscription import CreateSubscription
from opsentry.events.codec import Actor, Meta
from opsentry.identity import tenants
from opsentry.identity.tenants import TenantNotFound
from opsentry.infrastructure.rate_limit import RateLimiter
from opsentry.notifications.channel import BadTarget
from opsentry.projections import services, subscriptions
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import ServiceFilter, ServiceLink
from opsentry.public.pages import page

CHANNEL = "email"
# Who asks again so soon still has the first e-mail on its way; who asks later is sent another one.
PATIENCE_SECONDS = 600
# No answer comes sooner, whether there was something to do or not: its time does not tell who is subscribed.
ANSWER_SECONDS = 0.3

_FORM = "application/x-www-form-urlencoded"
_MANY = 500
_EVERYTHING, _CHOSEN = "all", "some"

_decode = msgspec.json.Decoder(list[ServiceLink]).decode


class Wish(NamedTuple):
    """The form as it was filled in, right or wrong."""

    email: str = ""
    which: str = _EVERYTHING
    service_ids: Sequence[str] = ()
    severity: str = SEVERITIES[0]


class SignUp:
    """The page `/status/{slug}/subscribe`.

    It answers the same to whoever asks for any address, so it tells nobody who is subscribed.
    """

    def __init__(self, parts: Dependencies, asking: RateLimiter) -> None:
        self._parts = parts
        self._asking = asking
        self._email = parts.channels.get(CHANNEL)
        self._open = self._email is not None and bool(parts.settings.smtp_url and parts.settings.encryption_keys)
        # The form sent twice by one impatient click is one wish.
        self._locks: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()

    async def form(self, request: web.Request) -> web.Response:
        """`GET /status/{slug}/subscribe`."""
        tenant = await self._tenant(request)
        if not self._open:
            return page("closed.html", tenant=tenant["name"])
        return _form(tenant["name"], await self._services(tenant["tenant_id"]), Wish())

    async def ask(self, request: web.Request) -> web.Response:
        """`POST /status/{slug}/subscribe`: a subscription that waits for its confirmation, where there is none yet."""
        tenant = await self._tenant(request)
        tenant_id: int = tenant["tenant_id"]
        if not self._open:
            return page("closed.html", status=503, tenant=tenant["name"])
        wish = await self._wish(request)
        offered = await self._services(tenant_id)
        problems, command = self._understood(wish, offered)
        if problems:
            return _form(tenant["name"], offered, wish, problems, status=400)
        standing = self._asking.hit(address(request, self._parts.settings.trusted_proxies))
        if not standing.allowed:
            raise RateLimited(standing)
        began = time.monotonic()
        async with self._locks.setdefault((tenant_id, command.target), asyncio.Lock()):
            await self._once(tenant_id, command, request[REQUEST_ID])
        await asyncio.sleep(max(0.0, began + ANSWER_SECONDS - time.monotonic()))
        # Relative, so that it holds below whatever path a proxy serves these pages under.
        return web.Response(status=303, headers={"Location": "subscribe/sent"})

    async def sent(self, request: web.Request) -> web.Response:
        """`GET /status/{slug}/subscribe/sent`."""
        return page("sent.html", tenant=(await self._tenant(request))["name"])

    async def _once(self, tenant_id: int, command: CreateSubscription, request_id: str) -> None:
        """Create the subscription, unless the address has one, or one that was asked for just now."""
        row = await self._parts.projector.read(
            tenant_id, lambda connection: subscriptions.select_by_target(connection, tenant_id, CHANNEL, command.target)
        )
        known = list(zip(row["ids"] or (), row["statuses"] or (), row["ages"] or (), strict=True))
        if any(status == "active" or (status == "pending" and age < PATIENCE_SECONDS) for _, status, age in known):
            return
        commands, meta = self._parts.commands, Meta(Actor("visitor"), request_id)
        for number in (number for number, status, _ in known if status == "pending"):
            with suppress(IllegalTransition):  # removed meanwhile
                await commands.execute(subscription.DECIDER, tenant_id, number, removal, meta)
        created = await commands.create(subscription.DECIDER, tenant_id, command, meta)
        await catch_up(self._parts.projector, tenant_id, created.position, request_id)

    async def _tenant(self, request: web.Request) -> Mapping[str, Any]:
        """Return the row of the path's tenant.

        Raises:
            RateLimited: The address opens too many pages.
            NotFound: There is none.
        """
        standing = self._parts.limiter.hit("page", address(request, self._parts.settings.trusted_proxies))
        if not standing.allowed:
            raise RateLimited(standing)
        try:
            async with self._parts.database.connection() as connection:
                row: Mapping[str, Any] = await tenants.find_tenant(connection, request.match_info["slug"])
        except TenantNotFound:
            raise NotFound from None
        return row

    async def _services(self, tenant_id: int) -> list[ServiceLink]:
        """Return the services that may be chosen: public ones."""
        row = await self._parts.projector.read(
            tenant_id,
            lambda connection: services.select_services(
                connection, tenant_id, ServiceFilter(visibility="public"), PageRequest(_MANY)
            ),
        )
        return _decode(b"[%b]" % (row["items"] or b""))

    async def _wish(self, request: web.Request) -> Wish:
        """Return the form as it was sent.

        Raises:
            BadRequest, NotJson, BodyTooLarge, BodyTooSlow, BodyBroken: It cannot be read.
        """
        if request.content_type != _FORM:
            raise NotJson
        body = await octets(request, self._parts.settings.request_body_timeout_seconds)
        try:
            fields = parse_qs(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=2 * _MANY)
        except ValueError:
            raise BadRequest("body: not a form") from None
        first = {name: values[0] for name, values in fields.items()}
        return Wish(
            email=first.get("email", "").strip(),
            which=first.get("which", _EVERYTHING),
            service_ids=fields.get("service", ()),
            severity=first.get("severity", SEVERITIES[0]),
        )

    def _understood(self, wish: Wish, offered: Sequence[ServiceLink]) -> tuple[dict[str, str], CreateSubscription]:
        """Return what is wrong with the wish, by field, and the command that it comes to where nothing is."""
        problems = {}
        target = wish.email
        try:
            if self._email is not None:
                target = self._email.validate_target(wish.email)
        except BadTarget as error:
            problems["email"] = f"This {error}."
        # What is internal, retired or another tenant's is not on offer, and as unknown as what does not exist.
        by_id = {str(ref.id): ref.id for ref in offered}
        chosen = wish.service_ids if wish.which == _CHOSEN else ()
        some = bool(chosen) and by_id.keys() >= set(chosen)
        if not some and wish.which != _EVERYTHING:
            problems["services"] = "Choose at least one service of the list, or all services."
        if wish.severity not in SEVERITIES:
            problems["severity"] = "Choose one of the list."
        command = CreateSubscription(
            channel=CHANNEL,
            target=target,
            audience="public",
            service_ids=tuple(by_id[number] for number in chosen if number in by_id),
            min_severity=wish.severity,
            pending=True,
        )
        return problems, command


def _form(
    tenant: str,
    offered: Sequence[ServiceLink],
    wish: Wish,
    problems: Mapping[str, str] | None = None,
    *,
    status: int = 200,
) -> web.Response:
    return page("subscribe.html", status=status, tenant=tenant, services=offered, wish=wish, problems=problems or {})

"""Serve the pages behind the links in emails: confirm a subscription, and unsubscribe.

Mail programs open links by themselves, so opening a page changes nothing. Only its button does.
"""

from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from aiohttp import web

from opsentry.api.commands import catch_up
from opsentry.api.context import Dependencies
from opsentry.api.errors import NotFound
from opsentry.api.request import REQUEST_ID
from opsentry.api.subscriptions import removal
from opsentry.domain import subscription
from opsentry.domain.decider import IllegalTransition
from opsentry.domain.subscription import CONFIRMATION_DAYS, ConfirmSubscription
from opsentry.events.codec import Actor, Meta
from opsentry.identity import tenants
from opsentry.identity.tenants import TenantNotFound
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, SignedLinks
from opsentry.projections import subscriptions
from opsentry.public.pages import page


class ConfirmationPages:
    """Serve `/confirm/{token}` and `/unsubscribe/{token}`. The token is the only permission that a visitor needs."""

    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts
        self._links = SignedLinks(parts.settings)

    async def show_confirm(self, request: web.Request) -> web.Response:
        """`GET /confirm/{token}`: show a button while the subscription is pending."""
        tenant_id, subscription_id = self._verify(request, CONFIRM)
        tenant = await self._tenant(tenant_id)
        status = await self._status(tenant_id, subscription_id)
        return page("confirm.html", tenant=tenant) if status == "pending" else _confirmed(tenant, status)

    async def confirm(self, request: web.Request) -> web.Response:
        """`POST /confirm/{token}`: confirm the subscription. A repetition changes nothing."""
        tenant_id, subscription_id = self._verify(request, CONFIRM)
        tenant = await self._tenant(tenant_id)
        try:
            result = await self._parts.commands.execute(
                subscription.DECIDER, tenant_id, subscription_id, ConfirmSubscription(), _meta(request)
            )
        except IllegalTransition:
            return _confirmed(tenant, None)
        await catch_up(self._parts.projector, tenant_id, result.position, request[REQUEST_ID])
        return _confirmed(tenant, result.state.status)

    async def show_unsubscribe(self, request: web.Request) -> web.Response:
        """`GET /unsubscribe/{token}`: show a button while the subscription exists."""
        tenant_id, subscription_id = self._verify(request, UNSUBSCRIBE)
        tenant = await self._tenant(tenant_id)
        status = await self._status(tenant_id, subscription_id)
        return page("unsubscribed.html" if status is None else "unsubscribe.html", tenant=tenant)

    async def unsubscribe(self, request: web.Request) -> web.Response:
        """`POST /unsubscribe/{token}`: remove the subscription. A repetition changes nothing.

        The page's button and one-click unsubscribe (RFC 8058) both send this request. Its body is not read.
        """
        tenant_id, subscription_id = self._verify(request, UNSUBSCRIBE)
        tenant = await self._tenant(tenant_id)
        with suppress(IllegalTransition):  # the subscription is removed already
            result = await self._parts.commands.execute(
                subscription.DECIDER,
                tenant_id,
                subscription_id,
                lambda history: removal(history, unsubscribed=True),
                _meta(request),
            )
            await catch_up(self._parts.projector, tenant_id, result.position, request[REQUEST_ID])
        return page("unsubscribed.html", tenant=tenant)

    def _verify(self, request: web.Request, purpose: str) -> tuple[int, int]:
        """Return the tenant id and the subscription id of the path's token.

        Raises:
            NotFound: The token is not valid for `purpose`.
        """
        ids = self._links.verify(purpose, request.match_info["token"])
        if ids is None:
            raise NotFound
        return ids

    async def _tenant(self, tenant_id: int) -> Mapping[str, Any]:
        """Return the tenant's row.

        Raises:
            NotFound: No tenant has this id.
        """
        try:
            async with self._parts.database.connection() as connection:
                row: Mapping[str, Any] = await tenants.find_tenant_by_id(connection, tenant_id)
        except TenantNotFound:
            raise NotFound from None
        return row

    async def _status(self, tenant_id: int, subscription_id: int) -> str | None:
        """Return the subscription's status, or `None` if it was removed."""
        row = await self._parts.projector.read(
            tenant_id, lambda connection: subscriptions.select_subscription(connection, tenant_id, subscription_id)
        )
        status: str | None = row["status"]
        return status


def _confirmed(tenant: Mapping[str, Any], status: str | None) -> web.Response:
    """Return the page after a confirmation, or, if the subscription has ended, that its link is no longer valid."""
    if status == "active":
        return page("confirmed.html", tenant=tenant)
    return page("link_invalid.html", status=HTTPStatus.GONE, tenant=tenant, days=CONFIRMATION_DAYS)


def _meta(request: web.Request) -> Meta:
    return Meta(Actor("visitor"), request[REQUEST_ID])

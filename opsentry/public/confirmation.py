"""Serve the pages behind the links in emails: confirm a subscription, and unsubscribe.

Mail programs open links by themselves, so opening a page changes nothing. Only its button does.
"""

from http import HTTPStatus

from aiohttp import web

from opsentry.application.caller import Caller
from opsentry.application.errors import NotFound
from opsentry.application.sign_up import (
    confirm,
    get_public_tenant,
    get_subscription_status,
    unsubscribe,
    visitor,
)
from opsentry.domain.subscription import CONFIRMATION_DAYS
from opsentry.http.context import Dependencies
from opsentry.http.server import REQUEST_ID
from opsentry.infrastructure.postgres import Record
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, SignedLinks
from opsentry.public.pages import page


class ConfirmationPages:
    """Serve `/confirm/{token}` and `/unsubscribe/{token}`. The token is the only permission that a visitor needs."""

    def __init__(self, dependencies: Dependencies) -> None:
        self._application = dependencies.application
        self._links = SignedLinks(dependencies.settings)

    async def show_confirm(self, request: web.Request) -> web.Response:
        """`GET /confirm/{token}`: show a button while the subscription is pending."""
        caller, subscription_id = self._verify(request, CONFIRM)
        tenant = await get_public_tenant(self._application, caller.tenant_id)
        status = await get_subscription_status(self._application, caller, subscription_id)
        return page("confirm.html", tenant=tenant) if status == "pending" else _confirmed(tenant, status)

    async def confirm(self, request: web.Request) -> web.Response:
        """`POST /confirm/{token}`: confirm the subscription. A repetition changes nothing."""
        caller, subscription_id = self._verify(request, CONFIRM)
        tenant = await get_public_tenant(self._application, caller.tenant_id)
        return _confirmed(tenant, await confirm(self._application, caller, subscription_id))

    async def show_unsubscribe(self, request: web.Request) -> web.Response:
        """`GET /unsubscribe/{token}`: show a button while the subscription exists."""
        caller, subscription_id = self._verify(request, UNSUBSCRIBE)
        tenant = await get_public_tenant(self._application, caller.tenant_id)
        status = await get_subscription_status(self._application, caller, subscription_id)
        return page("unsubscribed.html" if status is None else "unsubscribe.html", tenant=tenant)

    async def unsubscribe(self, request: web.Request) -> web.Response:
        """`POST /unsubscribe/{token}`: remove the subscription. A repetition changes nothing.

        The page's button and one-click unsubscribe (RFC 8058) both send this request. Its body is not read.
        """
        caller, subscription_id = self._verify(request, UNSUBSCRIBE)
        tenant = await get_public_tenant(self._application, caller.tenant_id)
        await unsubscribe(self._application, caller, subscription_id)
        return page("unsubscribed.html", tenant=tenant)

    def _verify(self, request: web.Request, purpose: str) -> tuple[Caller, int]:
        """Return the visitor and the subscription id of the path's token.

        Raises:
            NotFound: The token is not valid for `purpose`.
        """
        ids = self._links.verify(purpose, request.match_info["token"])
        if ids is None:
            raise NotFound
        tenant_id, subscription_id = ids
        return visitor(tenant_id, request[REQUEST_ID]), subscription_id


def _confirmed(tenant: Record, status: str | None) -> web.Response:
    """Return the page after a confirmation, or, if the subscription has ended, that its link is no longer valid."""
    if status == "active":
        return page("confirmed.html", tenant=tenant)
    return page("link_invalid.html", status=HTTPStatus.GONE, tenant=tenant, days=CONFIRMATION_DAYS)

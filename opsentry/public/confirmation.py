"""What the links in e-mails lead to: agreeing to be told, and wanting it no longer.

Opening a page changes nothing, because mail programs open links too. Pressing its button does.
"""

from contextlib import suppress
from http import HTTPStatus

from aiohttp import web

from opsentry.api.commands import catch_up
from opsentry.api.context import Dependencies
from opsentry.api.errors import NotFound
from opsentry.api.request import REQUEST_ID
from opsentry.api.subscriptions import removal
from opsentry.domain import subscription
from opsentry.domain.decider import IllegalTransition
from opsentry.domain.subscription import ConfirmSubscription
from opsentry.events.codec import Actor, Meta
from opsentry.identity import tenants
from opsentry.identity.tenants import TenantNotFound
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, SignedLinks
from opsentry.projections import subscriptions
from opsentry.public.pages import page


class Confirmation:
    """The pages `/confirm/{token}` and `/unsubscribe/{token}`. Whoever has the token may press the button."""

    def __init__(self, parts: Dependencies) -> None:
        self._parts = parts
        self._links = SignedLinks(parts.settings)

    async def confirmation(self, request: web.Request) -> web.Response:
        """`GET /confirm/{token}`: a button, while nobody has pressed it."""
        tenant_id, number = self._read(request, CONFIRM)
        tenant = await self._tenant(tenant_id)
        status = await self._status(tenant_id, number)
        return page("confirm.html", tenant=tenant) if status == "pending" else _confirmed(tenant, status)

    async def confirm(self, request: web.Request) -> web.Response:
        """`POST /confirm/{token}`: the button was pressed. Pressing it again changes nothing."""
        tenant_id, number = self._read(request, CONFIRM)
        tenant = await self._tenant(tenant_id)
        try:
            executed = await self._parts.commands.execute(
                subscription.DECIDER, tenant_id, number, ConfirmSubscription(), _meta(request)
            )
        except IllegalTransition:
            return _confirmed(tenant, None)
        await catch_up(self._parts.projector, tenant_id, executed.position, request[REQUEST_ID])
        return _confirmed(tenant, executed.state.status)

    async def farewell(self, request: web.Request) -> web.Response:
        """`GET /unsubscribe/{token}`: a button, while there is something to unsubscribe from."""
        tenant_id, number = self._read(request, UNSUBSCRIBE)
        tenant = await self._tenant(tenant_id)
        status = await self._status(tenant_id, number)
        return page("unsubscribed.html" if status is None else "unsubscribe.html", tenant=tenant)

    async def unsubscribe(self, request: web.Request) -> web.Response:
        """`POST /unsubscribe/{token}`: the button, or the one click of RFC 8058. Again, it answers the same.

        What the body says is not read: the token says it all.
        """
        tenant_id, number = self._read(request, UNSUBSCRIBE)
        tenant = await self._tenant(tenant_id)
        with suppress(IllegalTransition):  # it was removed before
            executed = await self._parts.commands.execute(
                subscription.DECIDER,
                tenant_id,
                number,
                lambda history: removal(history, unsubscribed=True),
                _meta(request),
            )
            await catch_up(self._parts.projector, tenant_id, executed.position, request[REQUEST_ID])
        return page("unsubscribed.html", tenant=tenant)

    def _read(self, request: web.Request, purpose: str) -> tuple[int, int]:
        """Return tenant id and subscription id of the path's token.

        Raises:
            NotFound: It is none of ours.
        """
        found = self._links.verify(purpose, request.match_info["token"])
        if found is None:
            raise NotFound
        return found

    async def _tenant(self, tenant_id: int) -> str:
        """Return the tenant's name."""
        try:
            async with self._parts.database.connection() as connection:
                name: str = (await tenants.find_tenant_by_id(connection, tenant_id))["name"]
        except TenantNotFound:
            raise NotFound from None
        return name

    async def _status(self, tenant_id: int, number: int) -> str | None:
        """Return how the subscription stands, `None` if it was removed."""
        row = await self._parts.projector.read(
            tenant_id, lambda connection: subscriptions.select_subscription(connection, tenant_id, number)
        )
        status: str | None = row["status"]
        return status


def _confirmed(tenant: str, status: str | None) -> web.Response:
    """Return the page of a subscription that waits for nobody: told, or disabled or removed since."""
    if status == "active":
        return page("confirmed.html", tenant=tenant)
    return page("removed.html", status=HTTPStatus.GONE, tenant=tenant)


def _meta(request: web.Request) -> Meta:
    return Meta(Actor("visitor"), request[REQUEST_ID])

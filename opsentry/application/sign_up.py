"""Use cases of visitors: subscribe by email, confirm, unsubscribe. A visitor sees what is public."""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.errors import NotFound
from opsentry.application.pipeline import run
from opsentry.application.queries import read_row
from opsentry.application.subscriptions import remove_subscription
from opsentry.domain import subscription
from opsentry.domain.decider import IllegalTransition, StreamRemoved
from opsentry.domain.subscription import ConfirmSubscription, CreateSubscription
from opsentry.events.codec import Actor
from opsentry.identity import tenants
from opsentry.identity.tenants import TenantNotFound
from opsentry.infrastructure.postgres import Record
from opsentry.projections import services, subscriptions
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import ServiceFilter, ServiceLink

# A sign-up within this time after the last one sends no second email: the first may still be on its way.
RESEND_AFTER_SECONDS = 600

_decode_services = msgspec.json.Decoder(list[ServiceLink]).decode


def visitor(tenant_id: int, request_id: str) -> Caller:
    """Return the caller for a visitor of a tenant's public pages."""
    return Caller(tenant_id=tenant_id, actor=Actor("visitor"), request_id=request_id)


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


async def find_public_tenant(app: Application, slug: str) -> Record:
    """Return `tenant_id`, `slug` and `name` of the tenant with this slug.

    Raises:
        NotFound: No tenant has it.
        DatabaseUnavailable: The database was lost.
    """
    try:
        async with app.database.connection() as connection:
            return await tenants.find_tenant(connection, slug)
    except TenantNotFound:
        raise NotFound from None


async def get_public_tenant(app: Application, tenant_id: int) -> Record:
    """Return the same of the tenant with this id; raises as `find_public_tenant`."""
    try:
        async with app.database.connection() as connection:
            return await tenants.find_tenant_by_id(connection, tenant_id)
    except TenantNotFound:
        raise NotFound from None


async def list_public_services(app: Application, caller: Caller, limit: int) -> Sequence[ServiceLink]:
    """Return the tenant's public services by name, which alone a visitor may select."""
    row = await read_row(
        app,
        caller,
        lambda connection: services.select_services(
            connection, caller.tenant_id, ServiceFilter(visibility="public"), PageRequest(limit)
        ),
    )
    return _decode_services(b"[%b]" % (row["items"] or b""))


async def sign_up(app: Application, caller: Caller, command: CreateSubscription) -> None:
    """Create a pending subscription if `decide_sign_up` says so, and remove those that it replaces.

    Raises:
        DomainError: The command was refused.
        DatabaseUnavailable, OutcomeUnknown, TenantBusy: See `pipeline.run`.
    """
    async with app.sign_up_locks.setdefault((caller.tenant_id, command.target), asyncio.Lock()):
        row = await read_row(
            app,
            caller,
            lambda connection: subscriptions.select_by_target(
                connection, caller.tenant_id, command.channel, command.target
            ),
        )
        found = zip(row["ids"] or (), row["statuses"] or (), row["ages"] or (), strict=True)
        replaced = decide_sign_up(ExistingSubscription(*each) for each in found)
        if replaced is None:
            return
        for subscription_id in replaced:
            with suppress(IllegalTransition, StreamRemoved, NotFound):  # it was removed since it was read
                await remove_subscription(app, caller, subscription_id)
        await run(app, caller, subscription.DECIDER, command)


async def confirm(app: Application, caller: Caller, subscription_id: int) -> str | None:
    """Confirm a subscription for the owner of its address; return its status, `None` if it was removed.

    A repetition changes nothing.

    Raises:
        NotFound: The tenant has no such subscription.
        DatabaseUnavailable, OutcomeUnknown, TenantBusy: See `pipeline.run`.
    """
    try:
        outcome = await run(app, caller, subscription.DECIDER, ConfirmSubscription(), stream_id=subscription_id)
    except (IllegalTransition, StreamRemoved):
        return None
    status: str = outcome.result.state.status
    return status


async def unsubscribe(app: Application, caller: Caller, subscription_id: int) -> None:
    """Remove a subscription for the owner of its address; raises as `confirm`. A repetition changes nothing."""
    with suppress(IllegalTransition, StreamRemoved):
        await remove_subscription(app, caller, subscription_id, is_unsubscribe=True)


async def get_subscription_status(app: Application, caller: Caller, subscription_id: int) -> str | None:
    """Return a subscription's status, `None` if it was removed."""
    row = await read_row(
        app,
        caller,
        lambda connection: subscriptions.select_subscription(connection, caller.tenant_id, subscription_id),
    )
    status: str | None = row["status"]
    return status

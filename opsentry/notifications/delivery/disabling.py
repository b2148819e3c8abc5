"""Disable subscriptions whose endpoint is gone or has failed for days."""

import asyncio
from collections.abc import Collection
from typing import Protocol

from opsentry.infrastructure.periodic import log_failure
from opsentry.infrastructure.postgres import Database
from opsentry.notifications.delivery import results
from opsentry.notifications.delivery.leases import LeasedEndpoint
from opsentry.notifications.delivery.ordering import TRANSACTION_TIMEOUT_SECONDS


class SubscriptionDisabler(Protocol):
    """Disable a subscription on the tenant's record. The composition root supplies the implementation."""

    async def disable(
        self, tenant_id: int, subscription_id: int, *, reason: str, target: str, encrypted_secret: str | None
    ) -> bool:
        """Disable a subscription, unless it has another endpoint by now. Repeating this changes nothing.

        Args:
            tenant_id: The tenant.
            subscription_id: The subscription, unique within the tenant.
            reason: `endpoint_gone` or `endpoint_failing`.
            target: The target that the failed message was sent to, as the subscription stores it.
            encrypted_secret: The encrypted secret or target that was used.

        Returns:
            True if nothing may be sent to the subscription any more.
        """


class EndpointDisabler:
    """Disable the subscriptions of leased endpoints.

    Args:
        database: The database with the deliveries.
        subscriptions: Disables subscriptions.
    """

    def __init__(self, database: Database, subscriptions: SubscriptionDisabler) -> None:
        self._database = database
        self._subscriptions = subscriptions
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def tasks(self) -> Collection[asyncio.Task[None]]:
        """Return the tasks that `start_disabling` started and that still run."""
        return self._tasks

    async def disable_gone(self, endpoint: LeasedEndpoint) -> bool:
        """Disable the subscription of an endpoint that is gone; return whether it is disabled or removed now."""
        try:
            return await self._disable(endpoint, "endpoint_gone")
        except Exception as error:  # noqa: BLE001 - the next response of the endpoint triggers it again
            log_failure("disable_gone", error)
            return False

    def start_disabling(self, endpoint: LeasedEndpoint) -> None:
        """Disable the subscription of a failing endpoint and end its deliveries, without waiting.

        A command may take long. If a crash loses it, the next probe triggers it again.
        """
        task = asyncio.create_task(self._disable_failing(endpoint))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _disable_failing(self, endpoint: LeasedEndpoint) -> None:
        try:
            if await self._disable(endpoint, "endpoint_failing"):
                async with self._database.transaction(TRANSACTION_TIMEOUT_SECONDS) as connection:
                    await results.disable_pending(connection, endpoint)
        except Exception as error:  # noqa: BLE001 - nobody awaits the task
            log_failure("disable_failing", error)

    async def _disable(self, endpoint: LeasedEndpoint, reason: str) -> bool:
        state = endpoint.subscription
        if state is None:
            return False
        return await self._subscriptions.disable(
            endpoint.tenant_id,
            endpoint.subscription_id,
            reason=reason,
            target=state.target,
            encrypted_secret=state.encrypted_secret,
        )

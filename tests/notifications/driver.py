"""Drive deliveries step by step: enqueue, lease, record."""

from collections.abc import Sequence
from uuid import uuid4

from opsentry.domain import incident, subscription
from opsentry.domain.incident import OpenIncident
from opsentry.domain.subscription import CreateSubscription
from opsentry.notifications.delivery import enqueue, leases, results
from opsentry.notifications.delivery.leases import DueDelivery, LeasedEndpoint
from opsentry.notifications.delivery.results import DeliveryResult, EndpointResults, Release
from opsentry.notifications.delivery.retry_policy import EndpointHealth
from tests import commands
from tests.conftest import META

DELIVERIES = "SELECT * FROM deliveries WHERE tenant_id = $1 ORDER BY position, subscription_id"
# Ages deliveries, so that one that waits for further changes is due now.
AGE = """
UPDATE deliveries SET next_attempt_at = next_attempt_at - $1 * interval '1 second',
    created_at = created_at - $1 * interval '1 second'
"""


class DeliveryDriver:
    """Does each step of a sender for one tenant."""

    def __init__(self, parts, tenant, coalesce_seconds=0.0):
        self.parts = parts
        self.tenant = tenant
        self.coalesce_seconds = coalesce_seconds

    async def subscribe(self, **fields):
        command = CreateSubscription(**{"channel": "webhook", "target": "https://example.com/x", **fields})
        made = await commands.create(self.parts, subscription.DECIDER, self.tenant.id, command, META)
        return made.stream_id

    async def open_incident(self, **fields):
        opened = await commands.create(
            self.parts, incident.DECIDER, self.tenant.id, OpenIncident(**{"title": "Down", **fields}), META
        )
        return opened.stream_id

    async def change_incident(self, incident_id, *changes):
        for command in changes:
            await commands.change(self.parts, incident.DECIDER, self.tenant.id, incident_id, command, META)

    async def enqueue(self, tenants: Sequence[int] | None = None, **options):
        await self.parts.projector.catch_up(self.tenant.id, 0)
        async with self.parts.database.transaction(10) as connection:
            found = await enqueue.tenants_with_backlog(connection, 0, 100) if tenants is None else tenants
            return await enqueue.enqueue_intents(connection, found, self.coalesce_seconds, **options) if found else 0

    async def lease(self, *, lease_seconds=60.0, limit=10, per_endpoint=10, **options):
        async with self.parts.database.transaction(10) as connection:
            leased = await leases.lease_endpoints(
                connection, uuid4(), "webhook", lease_seconds=lease_seconds, limit=limit, **options
            )
            due = await leases.take_deliveries(
                connection, [(each, per_endpoint) for each in leased], self.coalesce_seconds
            )
        return leased, due

    async def record(self, *batch: EndpointResults):
        async with self.parts.database.transaction(10) as connection:
            return await results.record_results(connection, batch, self.coalesce_seconds)

    async def rows(self):
        return await self.parts.database.fetch(DELIVERIES, self.tenant.id)

    async def states(self):
        return [row["state"] for row in await self.rows()]


def delivered(endpoint: LeasedEndpoint, *due: DueDelivery, release=True) -> EndpointResults:
    """Return the results of successful attempts, with the release of the endpoint."""
    done = [DeliveryResult(each, "delivered", None, 200, None, 3) for each in due]
    return EndpointResults(endpoint, done, Release(EndpointHealth(0, 2)) if release else None)

"""A sender's hands, for the tests of what it does step by step."""

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


class Desk:
    """A sender's hands: what it does to the ledger, step by step."""

    def __init__(self, parts, tenant, burst=0.0):
        self.parts = parts
        self.tenant = tenant
        self.burst = burst

    async def subscribe(self, **fields):
        command = CreateSubscription(**{"channel": "webhook", "target": "https://example.com/x", **fields})
        made = await commands.create(self.parts, subscription.DECIDER, self.tenant.id, command, META)
        return made.stream_id

    async def open(self, **fields):
        opened = await commands.create(
            self.parts, incident.DECIDER, self.tenant.id, OpenIncident(**{"title": "Down", **fields}), META
        )
        return opened.stream_id

    async def tell(self, number, *changes):
        for command in changes:
            await commands.change(self.parts, incident.DECIDER, self.tenant.id, number, command, META)

    async def take_over(self, tenants: Sequence[int] | None = None, **options):
        await self.parts.projector.catch_up(self.tenant.id, 0)
        async with self.parts.database.transaction(10) as connection:
            found = await enqueue.tenants_with_backlog(connection, 0, 100) if tenants is None else tenants
            return await enqueue.enqueue_intents(connection, found, self.burst, **options) if found else 0

    async def claim(self, seconds=60.0, at_most=10, passing_over=(), *, each=10, **options):
        async with self.parts.database.transaction(10) as connection:
            options = {"lease_seconds": seconds, "limit": at_most, "skipped_tenants": passing_over, **options}
            claimed = await leases.lease_endpoints(connection, uuid4(), "webhook", **options)
            due = await leases.take_deliveries(connection, [(one, each) for one in claimed], self.burst)
        return claimed, due

    async def record(self, *work: EndpointResults):
        async with self.parts.database.transaction(10) as connection:
            return await results.record_results(connection, work, self.burst)

    async def rows(self):
        return await self.parts.database.fetch(DELIVERIES, self.tenant.id)

    async def states(self):
        return [row["state"] for row in await self.rows()]


def delivered(endpoint: LeasedEndpoint, *due: DueDelivery, release=True) -> EndpointResults:
    done = [DeliveryResult(each, "delivered", None, 200, None, 3) for each in due]
    return EndpointResults(endpoint, done, Release(EndpointHealth(0, 2)) if release else None)

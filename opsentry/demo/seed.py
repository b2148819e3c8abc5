"""A small, believable tenant to try things on, and a second one to see that they do not see each other."""

from datetime import UTC, datetime, timedelta

from opsentry.access import tenants, tokens
from opsentry.access.tenants import NoSuchTenant
from opsentry.domain import incident, maintenance, service
from opsentry.domain.incident import ChangeIncident, IncidentCommand, OpenIncident, PostUpdate, ResolveIncident
from opsentry.domain.maintenance import (
    CompleteMaintenance,
    MaintenanceCommand,
    ScheduleMaintenance,
    StartMaintenance,
)
from opsentry.domain.service import RegisterService
from opsentry.events.codec import Actor, Meta
from opsentry.wiring import Core

META = Meta(Actor("operator"), silent=True)

SLUG, NAME = "acme", "Acme Cloud"
OTHER_SLUG, OTHER_NAME = "globex", "Globex"

TOKENS = {
    "full": tokens.SCOPES,
    "read": ("read:status",),
    "incidents": ("write:incidents",),
    "maintenance": ("write:maintenance",),
}


async def tenant(parts: Core, slug: str, name: str) -> tuple[int, bool]:
    """Return the tenant's id, and whether it is new."""
    async with parts.database.connection(10) as connection:
        try:
            return (await tenants.find(connection, slug))["tenant_id"], False
        except NoSuchTenant:
            return await tenants.create(connection, slug=slug, name=name, meta=META), True


async def seed(parts: Core, tenant_id: int) -> None:
    """Give the first tenant services, a resolved and an active incident, a past, an active and an upcoming window."""
    story = _Story(parts, tenant_id)
    api = await story.service("main-api", "Main API", "The public REST API.", tags=("prod", "customer-facing"))
    portal = await story.service("customer-portal", "Customer Portal", "Where customers sign in.", tags=("prod",))
    hooks = await story.service("webhooks", "Webhooks", "Deliveries to customers' endpoints.", tags=("prod",))
    jobs = await story.service("background-jobs", "Background Jobs", "Imports, exports, invoices.")
    await story.service("admin-tools", "Admin Tools", "For our own staff.", visibility="internal")

    outage = await story.incident(
        timedelta(days=6, hours=3),
        OpenIncident(
            title="API requests fail in eu-west",
            description="A third of requests in eu-west answer 503. We are looking into it.",
            severity="major_outage",
            service_ids=(api, portal),
        ),
    )
    cause = "Stale DNS cache after failover."
    for minutes, command in (
        (9, PostUpdate(status="identified", message="A failover left the resolver with old addresses.")),
        (21, ChangeIncident(severity="partial_outage")),
        (31, PostUpdate(status="monitoring", message="Failover complete. Watching for 15 minutes.")),
        (47, ResolveIncident(root_cause=cause, postmortem="https://internal.notes/inc-2041")),
    ):
        await story.change(outage, timedelta(days=6, hours=3) - timedelta(minutes=minutes), command)

    late = await story.incident(
        timedelta(days=19, hours=8),
        OpenIncident(
            title="Webhooks arrive late",
            description="Deliveries are up to ten minutes late.",
            severity="partial_outage",
            service_ids=(hooks,),
        ),
    )
    done = PostUpdate(status="resolved", message="The queue is empty, deliveries are on time again.")
    await story.change(late, timedelta(days=19, hours=7), done)

    await story.incident(
        timedelta(minutes=25),
        OpenIncident(
            title="Customer Portal is slow",
            description="Pages take several seconds. Data is safe.",
            severity="degraded",
            service_ids=(portal,),
        ),
    )

    await story.window(timedelta(days=12), timedelta(hours=2), "Database upgrade", (api,), over=True)
    await story.window(timedelta(minutes=20), timedelta(hours=2), "Export workers move to new hosts", (jobs,))
    await story.window(-timedelta(days=3), timedelta(hours=2), "Database failover drill", (portal, api))


async def seed_other(parts: Core, tenant_id: int) -> None:
    """Give the second tenant something that the first must never see."""
    story = _Story(parts, tenant_id)
    shop = await story.service("shop", "Globex Shop", "Checkout and catalogue.")
    opened = OpenIncident(title="Globex checkout is down", severity="critical", service_ids=(shop,))
    await story.incident(timedelta(hours=1), opened)


class _Story:
    """Writes history as commands that happened in the past."""

    def __init__(self, parts: Core, tenant_id: int) -> None:
        self._parts = parts
        self._tenant_id = tenant_id
        self._now = datetime.now(UTC)

    async def service(
        self, slug: str, name: str, description: str, *, visibility: str = "public", tags: tuple[str, ...] = ()
    ) -> int:
        executed = await self._parts.commands.create(
            service.DECIDER,
            self._tenant_id,
            RegisterService(slug=slug, name=name, description=description, visibility=visibility, tags=tags),
            META,
            occurred_at=self._now - timedelta(days=60),
            claim=service.claim(slug),
        )
        return executed.stream_id

    async def incident(self, ago: timedelta, command: OpenIncident) -> int:
        executed = await self._parts.commands.create(
            incident.DECIDER, self._tenant_id, command, META, occurred_at=self._now - ago
        )
        return executed.stream_id

    async def change(self, incident_id: int, ago: timedelta, command: IncidentCommand) -> None:
        await self._parts.commands.execute(
            incident.DECIDER, self._tenant_id, incident_id, command, META, occurred_at=self._now - ago
        )

    async def window(
        self, ago: timedelta, length: timedelta, title: str, service_ids: tuple[int, ...], *, over: bool = False
    ) -> None:
        start = (self._now - ago).replace(microsecond=0)
        command = ScheduleMaintenance(
            title=title,
            scheduled_start=start,
            scheduled_end=start + length,
            service_ids=service_ids,
            exclude_from_sla=True,
            suppress_alerts=True,
        )
        executed = await self._parts.commands.create(
            maintenance.DECIDER,
            self._tenant_id,
            command,
            META,
            occurred_at=min(start, self._now) - timedelta(days=2),
        )
        moves: list[tuple[MaintenanceCommand, datetime]] = []
        if start <= self._now:
            moves.append((StartMaintenance(), start))
        if over:
            moves.append((CompleteMaintenance(), start + length))
        for move, moment in moves:
            await self._parts.commands.execute(
                maintenance.DECIDER, self._tenant_id, executed.stream_id, move, META, occurred_at=moment
            )

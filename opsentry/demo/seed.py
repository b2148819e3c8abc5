"""Seed an example tenant, and a second one that shows the isolation of tenants."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from opsentry.application.application import Application
from opsentry.application.backfill import create_past_stream
from opsentry.application.caller import Caller
from opsentry.application.tenants import create_tenant, find_tenant_id
from opsentry.domain import incident, maintenance, service
from opsentry.domain.decider import Decider, Event
from opsentry.domain.incident import ChangeIncident, IncidentCommand, OpenIncident, PostUpdate, ResolveIncident
from opsentry.domain.maintenance import (
    CompleteMaintenance,
    MaintenanceCommand,
    ScheduleMaintenance,
    StartMaintenance,
)
from opsentry.domain.service import RegisterService
from opsentry.events.codec import Actor
from opsentry.identity.scopes import SCOPES
from opsentry.identity.tenants import TenantNotFound

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)

OPERATOR = Actor("operator")

SLUG, NAME = "acme", "Acme Cloud"
OTHER_SLUG, OTHER_NAME = "globex", "Globex"

TOKENS = {
    "full": SCOPES,
    "read": ("read:status",),
    "incidents": ("write:incidents",),
    "maintenance": ("write:maintenance",),
}


async def tenant(app: Application, slug: str, name: str) -> Caller:
    """Return an operator of the tenant, which is created if it does not exist."""
    try:
        tenant_id = await find_tenant_id(app, slug)
    except TenantNotFound:
        tenant_id = await create_tenant(app, OPERATOR, slug=slug, name=name)
    return Caller(tenant_id=tenant_id, actor=OPERATOR)


async def seed(app: Application, caller: Caller) -> None:
    """Seed services, resolved and active incidents, and a past, an active and an upcoming window.

    Existing streams stay as they are, so a second run completes an interrupted one.
    """
    seeder = Seeder(app, caller)
    api = await seeder.service("main-api", "Main API", "The public REST API.", tags=("prod", "customer-facing"))
    portal = await seeder.service("customer-portal", "Customer Portal", "Where customers sign in.", tags=("prod",))
    hooks = await seeder.service("webhooks", "Webhooks", "Deliveries to customers' endpoints.", tags=("prod",))
    jobs = await seeder.service("background-jobs", "Background Jobs", "Imports, exports, invoices.")
    await seeder.service("admin-tools", "Admin Tools", "For our own staff.", visibility="internal")

    cause = "Stale DNS cache after failover."
    await seeder.incident(
        timedelta(days=6, hours=3),
        OpenIncident(
            title="API requests fail in eu-west",
            description="A third of requests in eu-west answer 503. We are looking into it.",
            severity="major_outage",
            service_ids=(api, portal),
        ),
        (9, PostUpdate(status="identified", message="A failover left the resolver with old addresses.")),
        (21, ChangeIncident(severity="partial_outage")),
        (31, PostUpdate(status="monitoring", message="Failover complete. Watching for 15 minutes.")),
        (47, ResolveIncident(root_cause=cause, postmortem="https://internal.notes/inc-2041")),
    )

    await seeder.incident(
        timedelta(days=19, hours=8),
        OpenIncident(
            title="Webhooks arrive late",
            description="Deliveries are up to ten minutes late.",
            severity="partial_outage",
            service_ids=(hooks,),
        ),
        (60, PostUpdate(status="resolved", message="The queue is empty, deliveries are on time again.")),
    )

    await seeder.incident(
        timedelta(minutes=25),
        OpenIncident(
            title="Customer Portal is slow",
            description="Pages take several seconds. Data is safe.",
            severity="degraded",
            service_ids=(portal,),
        ),
    )

    await seeder.window(timedelta(days=12), timedelta(hours=2), "Database upgrade", (api,), is_over=True)
    await seeder.window(timedelta(minutes=20), timedelta(hours=2), "Export workers move to new hosts", (jobs,))
    await seeder.window(-timedelta(days=3), timedelta(hours=2), "Database failover drill", (portal, api))


async def seed_other(app: Application, caller: Caller) -> None:
    """Seed a service and an incident that the first tenant must never see."""
    seeder = Seeder(app, caller)
    shop = await seeder.service("shop", "Globex Shop", "Checkout and catalogue.")
    opened = OpenIncident(title="Globex checkout is down", severity="critical", service_ids=(shop,))
    await seeder.incident(timedelta(hours=1), opened)


class Seeder:
    """Append commands with times in the past, each stream in one transaction."""

    def __init__(self, app: Application, caller: Caller) -> None:
        self._app = app
        self._caller = caller
        self._now = datetime.now(UTC)

    async def service(
        self, slug: str, name: str, description: str, *, visibility: str = "public", tags: tuple[str, ...] = ()
    ) -> int:
        """Register a service two months ago; return its id."""
        command = RegisterService(slug=slug, name=name, description=description, visibility=visibility, tags=tags)
        moment = self._now - timedelta(days=60)
        return await self.create(service.DECIDER, service.slug_reservation(slug), [(command, moment)])

    async def incident(self, ago: timedelta, command: OpenIncident, *later: tuple[int, IncidentCommand]) -> int:
        """Open an incident `ago`, with later commands at minutes after that; return its id."""
        began = self._now - ago
        commands: list[tuple[IncidentCommand, datetime]] = [(command, began)]
        commands += [(change, began + timedelta(minutes=minutes)) for minutes, change in later]
        return await self.create(incident.DECIDER, f"demo:incident:{command.title}", commands)

    async def window(
        self, ago: timedelta, length: timedelta, title: str, service_ids: tuple[int, ...], *, is_over: bool = False
    ) -> int:
        """Schedule a window that starts `ago`, which may be negative; return its id.

        A past window is started. It is also completed if it `is_over`.
        """
        start = (self._now - ago).replace(microsecond=0)
        command = ScheduleMaintenance(
            title=title,
            scheduled_start=start,
            scheduled_end=start + length,
            service_ids=service_ids,
            exclude_from_sla=True,
            suppress_alerts=True,
        )
        commands: list[tuple[MaintenanceCommand, datetime]] = [(command, min(start, self._now) - timedelta(days=2))]
        if start <= self._now:
            commands.append((StartMaintenance(), start))
        if is_over:
            commands.append((CompleteMaintenance(), start + length))
        return await self.create(maintenance.DECIDER, f"demo:maintenance:{title}", commands)

    async def create(self, decider: Decider[S, C, E], reservation: str, commands: Sequence[tuple[C, datetime]]) -> int:
        """Return the id of the stream with this reservation, creating it with `commands` if there is none."""
        return await create_past_stream(self._app, self._caller, decider, commands, reservation=reservation)

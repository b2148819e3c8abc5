"""Use cases of services: register, change, retire, read."""

from datetime import datetime

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.pipeline import run
from opsentry.application.queries import read_listing, read_resource
from opsentry.application.results import Listing, Resource
from opsentry.domain import service
from opsentry.domain.service import ChangeService, RegisterService, RetireService, Service, slug_reservation
from opsentry.events.command_handler import CommandResult
from opsentry.projections import services
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import ServiceFilter


async def register_service(
    app: Application, caller: Caller, command: RegisterService, occurred_at: datetime | None = None
) -> CommandResult[Service]:
    """Register a service under its slug, which it holds alone.

    Raises:
        NameReserved: Another service of the tenant has the slug.
    Further, raises as `pipeline.run`.
    """
    outcome = await run(
        app,
        caller,
        service.DECIDER,
        command,
        occurred_at=occurred_at,
        reservation=slug_reservation(command.slug),
    )
    return outcome.result


async def change_service(
    app: Application, caller: Caller, service_id: int, command: ChangeService | RetireService
) -> CommandResult[Service]:
    """Rename, describe, tag or retire a service; raises as `pipeline.run`."""
    return (await run(app, caller, service.DECIDER, command, stream_id=service_id)).result


async def list_services(
    app: Application, caller: Caller, service_filter: ServiceFilter, page: PageRequest, as_of: int | datetime | None
) -> Listing:
    """Return a page of services by name; raises as `read_listing`."""
    return await read_listing(
        app,
        caller,
        as_of,
        present=lambda connection: services.select_services(connection, caller.tenant_id, service_filter, page),
        past=lambda position: app.as_of_queries.list_services(caller.tenant_id, position, service_filter, page),
    )


async def get_service(
    app: Application, caller: Caller, service_id: int, as_of: int | datetime | None = None
) -> Resource:
    """Return a service with its present or past status; raises as `read_resource`."""
    return await read_resource(
        app,
        caller,
        service_id,
        as_of,
        present=lambda connection: services.select_service(connection, caller.tenant_id, service_id),
        past=lambda position: app.as_of_queries.get_service(caller.tenant_id, service_id, position),
    )

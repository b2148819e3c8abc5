"""`opsentry service`: the services of a tenant."""

import json

import click

from opsentry.cli.common import META, for_tenant, run, tenant_core
from opsentry.cli.output import as_json, show
from opsentry.domain import service
from opsentry.domain.service import RegisterService
from opsentry.events.command_handler import NameReserved
from opsentry.projections import services
from opsentry.projections.page_request import ALL_ITEMS
from opsentry.projections.services import ServiceFilter


@click.group(name="service")
def service_group() -> None:
    """Register and list services."""


@service_group.command(name="create")
@for_tenant
@click.argument("service_slug", metavar="SERVICE")
@click.option("--name", help="Name for people. Default: the slug.")
@click.option("--description", help="Purpose of the service.")
@click.option(
    "--visibility",
    type=click.Choice(service.VISIBILITIES),
    default="public",
    show_default=True,
    help="Readers who see the service.",
)
@click.option("--tag", "tags", multiple=True, help="Tag; repeatable.")
@as_json
def create_service(
    slug: str,
    service_slug: str,
    name: str | None,
    description: str | None,
    visibility: str,
    tags: tuple[str, ...],
    *,
    json_output: bool,
) -> None:
    """Register a service with the slug SERVICE."""
    command = RegisterService(
        slug=service_slug, name=name or service_slug, description=description, visibility=visibility, tags=tags
    )

    async def work() -> int:
        async with tenant_core(slug) as (parts, tenant_id):
            try:
                executed = await parts.commands.create(
                    service.DECIDER, tenant_id, command, META, reservation=service.slug_reservation(command.slug)
                )
            except NameReserved as error:
                raise click.ClickException(f"slug: {command.slug} is taken by service {error.stream_id}") from None
            await parts.projector.catch_up(tenant_id, executed.position)
            return executed.stream_id

    service_id = run(work())
    show([{"service_id": service_id, "slug": service_slug}], ["service_id", "slug"], json_output=json_output)


@service_group.command(name="list")
@for_tenant
@as_json
def list_services(slug: str, *, json_output: bool) -> None:
    """List a tenant's services by name, with their status."""

    async def work() -> None:
        async with tenant_core(slug) as (parts, tenant_id):
            row = await parts.projector.read(
                tenant_id,
                lambda connection: services.select_services(connection, tenant_id, ServiceFilter(), ALL_ITEMS),
            )
        rows = json.loads(b"[%s]" % (row["items"] or b""))
        columns = ["id", "slug", "name", "current_status", "visibility", "tags"]
        show(rows, columns, json_output=json_output)

    run(work())

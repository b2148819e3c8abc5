"""`opsentry service`: the services of a tenant."""

import json

import click

from opsentry.application import services
from opsentry.application.errors import NameReserved
from opsentry.cli.common import application_for, for_tenant, run
from opsentry.cli.output import as_json, show
from opsentry.domain.service import RegisterService
from opsentry.domain.visibility import VISIBILITIES
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
    type=click.Choice(VISIBILITIES),
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
        async with application_for(slug) as (app, caller):
            try:
                return (await services.register_service(app, caller, command)).stream_id
            except NameReserved as error:
                raise click.ClickException(
                    f"slug: {command.slug} is taken by service {error.stream_id}; nothing was registered"
                ) from None

    service_id = run(work())
    show([{"service_id": service_id, "slug": service_slug}], ["service_id", "slug"], json_output=json_output)


@service_group.command(name="list")
@for_tenant
@as_json
def list_services(slug: str, *, json_output: bool) -> None:
    """List a tenant's services by name, with their status."""

    async def work() -> None:
        async with application_for(slug) as (app, caller):
            listed = await services.list_services(app, caller, ServiceFilter(), ALL_ITEMS, None)
        rows = json.loads(b"[%s]" % listed.items)
        columns = ["id", "slug", "name", "current_status", "visibility", "tags"]
        show(rows, columns, json_output=json_output)

    run(work())

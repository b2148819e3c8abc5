"""`opsentry tenant|token|service`: what an API client needs before it can begin."""

import json
from datetime import datetime

import click

from opsentry.cli.common import (
    META,
    as_json,
    connected,
    expiring,
    for_tenant,
    run,
    settings,
    show,
    show_token,
    tenant_core,
)
from opsentry.domain import service
from opsentry.domain.service import RegisterService
from opsentry.events.command_handler import NameReserved
from opsentry.identity import api_tokens, tenants
from opsentry.projections import services
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import ServiceFilter

MAX_SERVICES = 100_000


@click.group(name="tenant")
def tenant_group() -> None:
    """Create and list tenants."""


@tenant_group.command(name="create")
@click.argument("slug")
@click.option("--name", help="What people call it; the slug if left out.")
@as_json
def create_tenant(slug: str, name: str | None, *, json_output: bool) -> None:
    """Create a tenant with its own, empty ledger."""

    async def work() -> int:
        async with connected(settings()) as connection:
            return await tenants.create_tenant(connection, slug=slug, name=name or slug, meta=META)

    tenant_id = run(work())
    show([{"tenant_id": tenant_id, "slug": slug}], ["tenant_id", "slug"], json_output=json_output)


@tenant_group.command(name="list")
@as_json
def list_tenants(*, json_output: bool) -> None:
    """List all tenants."""

    async def work() -> None:
        async with connected(settings()) as connection:
            rows = await tenants.list_tenants(connection)
        show(rows, ["tenant_id", "slug", "name", "created_at"], json_output=json_output)

    run(work())


@click.group(name="token")
def token_group() -> None:
    """Create, list and revoke API tokens."""


@token_group.command(name="create")
@for_tenant
@click.option("--name", required=True, help="What it is for, such as `CI pipeline`.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    help=f"May be given more than once: {', '.join(api_tokens.SCOPES)}.",
)
@expiring
@as_json
def create_token(slug: str, name: str, scopes: tuple[str, ...], expires: datetime | None, *, json_output: bool) -> None:
    """Create an API token. Its value is printed this once and cannot be recovered."""

    async def work() -> str:
        async with connected(settings()) as connection:
            tenant = await tenants.find_tenant(connection, slug)
            return await api_tokens.create_api_token(
                connection,
                tenant["tenant_id"],
                name=name,
                scopes=scopes,
                meta=META,
                expires_at=expires,
            )

    show_token(run(work()), json_output=json_output)


@token_group.command(name="list")
@for_tenant
@as_json
def list_tokens(slug: str, *, json_output: bool) -> None:
    """List a tenant's tokens by their prefixes."""

    async def work() -> None:
        async with connected(settings()) as connection:
            tenant = await tenants.find_tenant(connection, slug)
            rows = await api_tokens.list_api_tokens(connection, tenant["tenant_id"])
        columns = ["prefix", "name", "scopes", "created_at", "expires_at", "revoked_at"]
        show(rows, columns, json_output=json_output)

    run(work())


@token_group.command(name="revoke")
@for_tenant
@click.argument("prefix")
def revoke_token(slug: str, prefix: str) -> None:
    """Revoke the token with this prefix; it stops working everywhere within 5 s."""

    async def work() -> None:
        async with connected(settings()) as connection:
            tenant = await tenants.find_tenant(connection, slug)
            await api_tokens.revoke_api_token(connection, tenant["tenant_id"], prefix, META)

    run(work())
    click.echo(f"revoked {prefix}")


@click.group(name="service")
def service_group() -> None:
    """Register and list services."""


@service_group.command(name="create")
@for_tenant
@click.argument("slug_of_service", metavar="SERVICE")
@click.option("--name", help="What people call it; the slug if left out.")
@click.option("--description", help="What it does.")
@click.option("--visibility", type=click.Choice(service.VISIBILITIES), default="public", show_default=True)
@click.option("--tag", "tags", multiple=True, help="May be given more than once.")
@as_json
def create_service(
    slug: str,
    slug_of_service: str,
    name: str | None,
    description: str | None,
    visibility: str,
    tags: tuple[str, ...],
    *,
    json_output: bool,
) -> None:
    """Register a service under the slug SERVICE."""
    command = RegisterService(
        slug=slug_of_service, name=name or slug_of_service, description=description, visibility=visibility, tags=tags
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
    show([{"service_id": service_id, "slug": slug_of_service}], ["service_id", "slug"], json_output=json_output)


@service_group.command(name="list")
@for_tenant
@as_json
def list_services(slug: str, *, json_output: bool) -> None:
    """List a tenant's services by name, with their status."""

    async def work() -> None:
        async with tenant_core(slug) as (parts, tenant_id):
            row = await parts.projector.read(
                tenant_id,
                lambda connection: services.select_services(
                    connection, tenant_id, ServiceFilter(), PageRequest(MAX_SERVICES)
                ),
            )
        rows = json.loads(b"[%s]" % (row["items"] or b""))
        columns = ["id", "slug", "name", "current_status", "visibility", "tags"]
        show(rows, columns, json_output=json_output)

    run(work())

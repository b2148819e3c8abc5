"""`opsentry tenant`: the owners of ledgers."""

import click

from opsentry.application import tenants
from opsentry.cli.common import OPERATOR, application, run
from opsentry.cli.output import as_json, show


@click.group(name="tenant")
def tenant_group() -> None:
    """Create and list tenants."""


@tenant_group.command(name="create")
@click.argument("slug")
@click.option("--name", help="Name for people. Default: the slug.")
@as_json
def create_tenant(slug: str, name: str | None, *, json_output: bool) -> None:
    """Create a tenant with an empty ledger of its own."""

    async def work() -> int:
        async with application() as app:
            return await tenants.create_tenant(app, OPERATOR, slug=slug, name=name or slug)

    tenant_id = run(work())
    show([{"tenant_id": tenant_id, "slug": slug}], ["tenant_id", "slug"], json_output=json_output)


@tenant_group.command(name="list")
@as_json
def list_tenants(*, json_output: bool) -> None:
    """List all tenants by slug."""

    async def work() -> None:
        async with application() as app:
            rows = await tenants.list_tenants(app)
        show(rows, ["tenant_id", "slug", "name", "created_at"], json_output=json_output)

    run(work())

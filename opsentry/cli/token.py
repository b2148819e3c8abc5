"""`opsentry token`: API tokens of tenants."""

from datetime import datetime

import click

from opsentry.application import api_tokens
from opsentry.cli.common import application_for, expiring, for_tenant, run
from opsentry.cli.output import as_json, show, show_token
from opsentry.identity.scopes import SCOPES


@click.group(name="token")
def token_group() -> None:
    """Create, list and revoke API tokens."""


@token_group.command(name="create")
@for_tenant
@click.option("--name", required=True, help="Purpose of the token, such as `CI pipeline`.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    help=f"Scope of the token; repeatable. One of {', '.join(SCOPES)}.",
)
@expiring
@as_json
def create_token(slug: str, name: str, scopes: tuple[str, ...], expires: datetime | None, *, json_output: bool) -> None:
    """Create an API token. Its value is printed once. It cannot be recovered."""

    async def work() -> str:
        async with application_for(slug) as (app, caller):
            return await api_tokens.create_api_token(app, caller, name=name, scopes=scopes, expires_at=expires)

    show_token(run(work()), json_output=json_output)


@token_group.command(name="list")
@for_tenant
@as_json
def list_tokens(slug: str, *, json_output: bool) -> None:
    """List a tenant's tokens by prefix."""

    async def work() -> None:
        async with application_for(slug) as (app, caller):
            rows = await api_tokens.list_api_tokens(app, caller)
        columns = ["prefix", "name", "scopes", "created_at", "expires_at", "revoked_at"]
        show(rows, columns, json_output=json_output)

    run(work())


@token_group.command(name="revoke")
@for_tenant
@click.argument("prefix")
def revoke_token(slug: str, prefix: str) -> None:
    """Revoke the token with this prefix. All processes reject it within 5 s."""

    async def work() -> None:
        async with application_for(slug) as (app, caller):
            await api_tokens.revoke_api_token(app, caller, prefix)

    run(work())
    click.echo(f"revoked {prefix}")

"""`opsentry operator`: tokens of operators."""

from datetime import datetime

import click

from opsentry.application import operator_tokens
from opsentry.cli.common import application, expiring, run
from opsentry.cli.output import as_json, show, show_token


@click.group(name="operator")
def operator_group() -> None:
    """Manage access of operators to the operator API."""


@operator_group.group(name="token")
def token_group() -> None:
    """Create, list and revoke operator tokens, which belong to no tenant."""


@token_group.command(name="create")
@click.argument("name")
@expiring
@as_json
def create_token(name: str, expires: datetime | None, *, json_output: bool) -> None:
    """Create an operator token for the person or program NAME.

    Its value is printed once. It cannot be recovered.
    """

    async def work() -> str:
        async with application() as app:
            return await operator_tokens.create_operator_token(app, name=name, expires_at=expires)

    show_token(run(work()), json_output=json_output)


@token_group.command(name="list")
@as_json
def list_tokens(*, json_output: bool) -> None:
    """List operator tokens by prefix."""

    async def work() -> None:
        async with application() as app:
            rows = await operator_tokens.list_operator_tokens(app)
        show(rows, ["prefix", "name", "created_at", "expires_at", "revoked_at"], json_output=json_output)

    run(work())


@token_group.command(name="revoke")
@click.argument("prefix")
def revoke_token(prefix: str) -> None:
    """Revoke the operator token with this prefix. All processes reject it within 5 s."""

    async def work() -> None:
        async with application() as app:
            await operator_tokens.revoke_operator_token(app, prefix)

    run(work())
    click.echo(f"revoked {prefix}")

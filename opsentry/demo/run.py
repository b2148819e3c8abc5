"""The demo's life: servers up, schema, tenants, API and worker, until Ctrl-C; then everything down again."""

import asyncio
import fcntl
import json
import os
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import click
import uvloop

from opsentry.bootstrap import Core, base_url_of, core, serving, until_stopped, working
from opsentry.demo import seed, subscribers
from opsentry.demo.embedded import APP_USER, DATABASE, EmbeddedPostgres, EmbeddedValkey
from opsentry.demo.sink import Sink, sink
from opsentry.identity import api_tokens, operator_tokens
from opsentry.identity.scopes import SCOPES
from opsentry.identity.tokens import InvalidToken
from opsentry.infrastructure.encryption import generate_key
from opsentry.infrastructure.postgres import migrate, migrations
from opsentry.settings import Settings


def run_demo(settings: Settings) -> None:
    """Run the demo in the folder `OPSENTRY_DEMO_DIR` on port `PORT`, until SIGINT or SIGTERM.

    `OPSENTRY_DATABASE_URL` and `OPSENTRY_REDIS_URL`, where set, are used instead of embedded servers.
    """
    folder = Path(os.environ.get("OPSENTRY_DEMO_DIR") or ".opsentry").resolve()
    port = os.environ.get("PORT") or "8080"
    if not port.isdigit() or int(port) > 65535:  # noqa: PLR2004 - the highest port
        raise click.UsageError("PORT: must be a port number")
    folder.mkdir(parents=True, exist_ok=True)
    # Like Ctrl-C from the beginning, also before the loop listens: what was started is stopped again.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        lock = stack.enter_context((folder / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.ClickException(f"another demo runs in {folder}") from None
        owner_url = settings.migration_database_url or settings.database_url
        if "OPSENTRY_DATABASE_URL" not in os.environ:
            click.echo("starting PostgreSQL …")
            postgres = EmbeddedPostgres(folder / "postgres")
            with _signals_later():
                postgres.start()
                stack.callback(postgres.stop)
            owner_url = postgres.url()
            settings = replace(settings, database_url=postgres.url(user=APP_USER))
            uvloop.run(_create_database(postgres.url("postgres")))
        if "OPSENTRY_REDIS_URL" not in os.environ:
            click.echo("starting Valkey …")
            valkey = EmbeddedValkey(folder / "valkey")
            with _signals_later():
                valkey.start()
                stack.callback(valkey.stop)
            settings = replace(settings, redis_url=valkey.url)
        uvloop.run(_migrate(owner_url))
        settings = replace(
            settings,
            port=int(port) or _free_port(),
            encryption_keys=(*settings.encryption_keys, _secret_key(folder / "secret-key")),
            webhook_allowed_networks=(
                *settings.webhook_allowed_networks,
                ip_network("127.0.0.0/8"),
                ip_network("::1/128"),
            ),
        )
        uvloop.run(_live(settings, folder))
        click.echo("\nstopping …")
    click.echo("stopped")


@contextmanager
def _signals_later() -> Iterator[None]:
    """Let signals wait until what is being started has started, and can be stopped."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    except Exception:
        # Ctrl-C reaches those that start the server too.
        if not came:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


async def _create_database(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", DATABASE):
            await connection.execute(f"CREATE DATABASE {DATABASE}")
    finally:
        await connection.close()


async def _migrate(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await migrate(connection, migrations())
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", APP_USER):
            await connection.execute(f"CREATE ROLE {APP_USER} LOGIN IN ROLE opsentry_app")
    finally:
        await connection.close()


async def _live(settings: Settings, folder: Path) -> None:
    stopped = asyncio.create_task(until_stopped())
    if "OPSENTRY_PUBLIC_URL" not in os.environ:
        settings = replace(settings, public_url=base_url_of(settings.host, settings.port))
    # Where it was before, so that subscriptions that people pointed there go on arriving.
    port = urlsplit(str(_before(folder / "demo.json").get("sink", {}).get("url", ""))).port or 0
    async with sink(mailbox=not settings.smtp_url, port=port) as arriving, core(_told(settings, arriving)) as parts:
        settings = parts.settings
        note = folder / "demo.json"
        facts = await _prepare(parts, _before(note), arriving)
        async with working(parts), serving(settings, parts) as base_url:
            facts = {
                "base_url": base_url,
                "pid": os.getpid(),
                "tenant_id": facts["tenant_id"],
                "tenant_slug": seed.SLUG,
                "database_url": settings.database_url,
                "redis_url": settings.redis_url,
                "tokens": facts["tokens"],
                "other": facts["other"],
                "operator": facts["operator"],
                "sink": {"url": arriving.url, "smtp_url": arriving.smtp_url},
            }
            _write(note, json.dumps(facts, indent=2))
            _welcome(facts, note)
            await stopped


def _told(settings: Settings, arriving: Sink) -> Settings:
    """Return the settings with which e-mails go to the sink, if it takes them."""
    return replace(settings, smtp_url=arriving.smtp_url or settings.smtp_url)


def _free_port() -> int:
    """Return a port that is free: links in e-mails need its number before anything listens there."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _secret_key(path: Path) -> str:
    """Return the demo's own key to seal with, the same in every run."""
    if not path.exists():
        _write(path, generate_key())
    return path.read_text().strip()


def _before(note: Path) -> dict[str, Any]:
    try:
        before = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return before if isinstance(before, dict) else {}


async def _prepare(parts: Core, before: dict[str, Any], arriving: Sink) -> dict[str, Any]:
    """Make sure of tenants, what is in them, and tokens; those of an earlier run are kept where they still work."""
    tenant_id = await seed.tenant(parts, seed.SLUG, seed.NAME)
    await seed.seed(parts, tenant_id)
    await subscribers.seed(parts, tenant_id, arriving)
    other_id = await seed.tenant(parts, seed.OTHER_SLUG, seed.OTHER_NAME)
    await seed.seed_other(parts, other_id)
    for tenant in (tenant_id, other_id):
        await parts.projector.catch_up(tenant, 0)
    kept = before.get("tokens", {})
    values = {
        name: await _token(parts, tenant_id, kept.get(name), f"demo {name}", scopes)
        for name, scopes in seed.TOKENS.items()
    }
    other_before = before.get("other", {}).get("token")
    other = await _token(parts, other_id, other_before, "demo other", SCOPES)
    return {
        "tenant_id": tenant_id,
        "tokens": values,
        "other": {"tenant_id": other_id, "token": other},
        "operator": {"token": await _operator(parts, before.get("operator", {}).get("token"))},
    }


async def _token(parts: Core, tenant_id: int, value: object, name: str, scopes: Iterable[str]) -> str:
    """Return `value` if it is a token that works for the tenant, else a new one."""
    if isinstance(value, str):
        try:
            token = await api_tokens.ApiTokens(parts.database).authenticate(value)
        except InvalidToken:
            pass
        else:
            if token.tenant_id == tenant_id and token.scopes == frozenset(scopes):
                return value
    async with parts.database.connection() as connection:
        return await api_tokens.create_api_token(connection, tenant_id, name=name, scopes=scopes, meta=seed.META)


async def _operator(parts: Core, value: object) -> str:
    """Return `value` if it is an operator's token that works, else a new one."""
    if isinstance(value, str):
        try:
            await operator_tokens.OperatorTokens(parts.database).authenticate(value)
        except InvalidToken:
            pass
        else:
            return value
    async with parts.database.connection() as connection:
        return await operator_tokens.create_operator_token(connection, name="demo operator")


def _write(path: Path, text: str) -> None:
    """Write the file whole or not at all, for the owner's eyes: it holds secrets."""
    draft = path.with_suffix(".tmp")
    draft.touch(mode=0o600)
    draft.write_text(f"{text}\n")
    draft.replace(path)


def _welcome(facts: dict[str, Any], note: Path) -> None:
    base_url, tokens_, arrived = facts["base_url"], facts["tokens"], facts["sink"]["url"]
    click.echo(f"""
Opsentry runs at {base_url}   (Ctrl-C stops it)

Try, in another terminal:

  curl {base_url}/health/ready
  export TOKEN={tokens_["full"]}
  curl -H "Authorization: Bearer $TOKEN" {base_url}/api/v1/services
  curl -H "Authorization: Bearer $TOKEN" {base_url}/api/v1/incidents/active
  export OPERATOR={facts["operator"]["token"]}
  curl -H "Authorization: Bearer $OPERATOR" {base_url}/ops/projections

Open an incident, and see the webhook, the Slack message and the e-mail arrive at {arrived}

  curl -X POST {base_url}/api/v1/incidents -H "Authorization: Bearer $TOKEN" \\
    -H "Content-Type: application/json" -d '{{"title": "Deploy failed", "severity": "degraded"}}'

Subscribe by e-mail, and find the link to confirm there too: {base_url}/status/{facts["tenant_slug"]}/subscribe

All tokens, and where the servers are: {note}
""")

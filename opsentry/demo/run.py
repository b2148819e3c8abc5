"""Run the demo: embedded servers, schema, example tenants, API and worker, until Ctrl-C."""

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

import click
import uvloop

from opsentry.application.api_tokens import create_api_token
from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.operator_tokens import create_operator_token
from opsentry.bootstrap import base_url_of, core, serving, until_stopped, working
from opsentry.demo import seed, subscribers
from opsentry.demo.embedded import APP_USER, DATABASE, EmbeddedPostgres, EmbeddedValkey
from opsentry.demo.sink import Sink, sink
from opsentry.identity.api_tokens import ApiTokens
from opsentry.identity.operator_tokens import OperatorTokens
from opsentry.identity.scopes import SCOPES
from opsentry.identity.tokens import InvalidToken
from opsentry.infrastructure.encryption import generate_key
from opsentry.infrastructure.provisioning import create_database, prepare_database
from opsentry.settings import Settings

MAX_PORT = 65535
# A request gives up earlier, but a new database on a slow disk takes its time.
SEED_TIMEOUT_MS = 30_000


def run_demo(settings: Settings) -> None:
    """Run the demo in the folder `OPSENTRY_DEMO_DIR` on port `PORT`, until SIGINT or SIGTERM.

    `OPSENTRY_DATABASE_URL` and `OPSENTRY_REDIS_URL` replace the embedded servers if they are set.

    Raises:
        click.ClickException: Another demo runs in the folder.
        click.UsageError: `PORT` is no port number.
    """
    folder = Path(os.environ.get("OPSENTRY_DEMO_DIR") or ".opsentry").resolve()
    port = os.environ.get("PORT") or "8080"
    if not port.isdigit() or int(port) > MAX_PORT:
        raise click.UsageError("PORT: must be a port number")
    folder.mkdir(parents=True, exist_ok=True)
    # SIGTERM acts like Ctrl-C even before the event loop handles signals, so started servers are always stopped.
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
            with _signals_deferred():
                postgres.start()
                stack.callback(postgres.stop)
            owner_url = postgres.url()
            settings = replace(settings, database_url=postgres.url(user=APP_USER))
            uvloop.run(create_database(postgres.url("postgres"), DATABASE))
        if "OPSENTRY_REDIS_URL" not in os.environ:
            click.echo("starting Valkey …")
            valkey = EmbeddedValkey(folder / "valkey")
            with _signals_deferred():
                valkey.start()
                stack.callback(valkey.stop)
            settings = replace(settings, redis_url=valkey.url)
        uvloop.run(prepare_database(owner_url, APP_USER))
        settings = replace(
            settings,
            port=int(port) or _free_port(),
            encryption_keys=(*settings.encryption_keys, _encryption_key(folder / "encryption-key")),
            webhook_allowed_networks=(
                *settings.webhook_allowed_networks,
                ip_network("127.0.0.0/8"),
                ip_network("::1/128"),
            ),
        )
        uvloop.run(_serve(settings, folder))
        click.echo("\nstopping …")
    click.echo("stopped")


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer signals until the starting server can be stopped."""
    deferred: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: deferred.append(number)) for number in numbers}
    try:
        yield
    except Exception:
        # Ctrl-C also reaches the child process that starts the server, which then fails.
        if not deferred:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if deferred:
        raise KeyboardInterrupt


async def _serve(settings: Settings, folder: Path) -> None:
    stopped = asyncio.create_task(until_stopped())
    if "OPSENTRY_PUBLIC_URL" not in os.environ:
        settings = replace(settings, public_url=base_url_of(settings.host, settings.port))
    # The sink keeps its port, so that subscriptions of an earlier run still reach it.
    port = urlsplit(str(_earlier_facts(folder / "demo.json").get("sink", {}).get("url", ""))).port or 0
    async with sink(mailbox=not settings.smtp_url, port=port) as running_sink:
        settings = _with_sink(settings, running_sink)
        note = folder / "demo.json"
        async with core(replace(settings, database_timeout_ms=SEED_TIMEOUT_MS)) as parts:
            facts = await _prepare(parts.application, _earlier_facts(note), running_sink)
        async with core(settings) as parts, working(parts), serving(settings, parts) as base_url:
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
                "sink": {"url": running_sink.url, "smtp_url": running_sink.smtp_url},
            }
            _write(note, json.dumps(facts, indent=2))
            _welcome(facts, note)
            await stopped


def _with_sink(settings: Settings, running_sink: Sink) -> Settings:
    """Return settings that send e-mails to the sink, if it has a mailbox."""
    return replace(settings, smtp_url=running_sink.smtp_url or settings.smtp_url)


def _free_port() -> int:
    """Return a free port. Links in e-mails need its number before the server listens on it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _encryption_key(path: Path) -> str:
    """Return the encryption key of the demo, the same in every run."""
    if not path.exists():
        _write(path, generate_key())
    return path.read_text().strip()


def _earlier_facts(note: Path) -> dict[str, Any]:
    """Return the facts of the last run; empty if there are none."""
    try:
        facts = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


async def _prepare(app: Application, earlier: dict[str, Any], running_sink: Sink) -> dict[str, Any]:
    """Create the tenants, their content and tokens that are missing. Working tokens of an earlier run stay."""
    acme = await seed.tenant(app, seed.SLUG, seed.NAME)
    await seed.seed(app, acme)
    await subscribers.seed(app, acme, running_sink)
    other = await seed.tenant(app, seed.OTHER_SLUG, seed.OTHER_NAME)
    await seed.seed_other(app, other)
    for caller in (acme, other):
        await app.projector.catch_up(caller.tenant_id, 0)
    kept = earlier.get("tokens", {})
    values = {
        name: await _token(app, acme, kept.get(name), f"demo {name}", scopes) for name, scopes in seed.TOKENS.items()
    }
    other_token = await _token(app, other, earlier.get("other", {}).get("token"), "demo other", SCOPES)
    return {
        "tenant_id": acme.tenant_id,
        "tokens": values,
        "other": {"tenant_id": other.tenant_id, "token": other_token},
        "operator": {"token": await _operator_token(app, earlier.get("operator", {}).get("token"))},
    }


async def _token(app: Application, caller: Caller, value: object, name: str, scopes: Iterable[str]) -> str:
    """Return `value` if it is a working token of the tenant with these scopes, else a new token."""
    if isinstance(value, str):
        try:
            token = await ApiTokens(app.database).authenticate(value)
        except InvalidToken:
            pass
        else:
            if token.tenant_id == caller.tenant_id and token.scopes == frozenset(scopes):
                return value
    return await create_api_token(app, caller, name=name, scopes=scopes)


async def _operator_token(app: Application, value: object) -> str:
    """Return `value` if it is a working operator token, else a new token."""
    if isinstance(value, str):
        try:
            await OperatorTokens(app.database).authenticate(value)
        except InvalidToken:
            pass
        else:
            return value
    return await create_operator_token(app, name="demo operator")


def _write(path: Path, text: str) -> None:
    """Write the file atomically, readable by its owner only, because it holds secrets."""
    draft = path.with_suffix(".tmp")
    draft.touch(mode=0o600)
    draft.write_text(f"{text}\n")
    draft.replace(path)


def _welcome(facts: dict[str, Any], note: Path) -> None:
    base_url, tokens, sink_url = facts["base_url"], facts["tokens"], facts["sink"]["url"]
    click.echo(f"""
Opsentry runs at {base_url}   (Ctrl-C stops it)

Try, in another terminal:

  curl {base_url}/health/ready
  export TOKEN={tokens["full"]}
  curl -H "Authorization: Bearer $TOKEN" {base_url}/api/v1/services
  curl -H "Authorization: Bearer $TOKEN" {base_url}/api/v1/incidents/active
  export OPERATOR={facts["operator"]["token"]}
  curl -H "Authorization: Bearer $OPERATOR" {base_url}/ops/projections

Open an incident. Its webhook, Slack message and e-mail arrive at {sink_url}

  curl -X POST {base_url}/api/v1/incidents -H "Authorization: Bearer $TOKEN" \\
    -H "Content-Type: application/json" -d '{{"title": "Deploy failed", "severity": "degraded"}}'

Subscribe by e-mail at {base_url}/status/{facts["tenant_slug"]}/subscribe and find the confirmation there too.

All tokens, and the addresses of the servers: {note}
""")

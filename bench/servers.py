"""Servers and processes to measure: an embedded PostgreSQL as durable as in production, and `opsentry serve`."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from opsentry.demo.embedded import APP_USER, EmbeddedPostgres, EmbeddedValkey
from opsentry.infrastructure.postgres import migrate, migrations

ROOT = Path(__file__).parent.parent
# The bench measures how long the database takes: a slow machine must show it as a figure, not as a timeout.
DATABASE_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Servers:
    """A PostgreSQL with its defaults (fsync and synchronous_commit on), and a Valkey."""

    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey

    @property
    def host(self) -> str:
        """The folder of the server's socket."""
        return self.postgres.url().rpartition("host=")[2]

    def database(self, name: str, *, schema: bool = True) -> str:
        """Make a database anew; return its owner's URL."""
        asyncio.run(self._create(name, schema=schema))
        return self.postgres.url(name)

    async def _create(self, name: str, *, schema: bool) -> None:
        connection = await asyncpg.connect(self.postgres.url("postgres"))
        await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        if schema:
            connection = await asyncpg.connect(self.postgres.url(name))
            await migrate(connection, migrations())
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", APP_USER):
                await connection.execute(f"CREATE ROLE {APP_USER} LOGIN IN ROLE opsentry_app")
            await connection.close()


@contextmanager
def servers() -> Iterator[Servers]:
    with tempfile.TemporaryDirectory(prefix="opsentry-bench-", ignore_cleanup_errors=True) as folder:
        postgres, valkey = EmbeddedPostgres(Path(folder) / "postgres"), EmbeddedValkey(Path(folder) / "valkey")
        postgres.start()
        valkey.start()
        try:
            yield Servers(postgres, valkey)
        finally:
            valkey.stop()
            postgres.stop()


@contextmanager
def process(arguments: Sequence[str], **environment: str) -> Iterator[str]:
    """Run a Python module that prints its URL as the last word of its first line; yields the URL."""
    env = {**os.environ, **environment}
    running = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        if running.stdout is None:
            raise RuntimeError("no pipe")
        line = running.stdout.readline()
        if not line:
            raise RuntimeError(f"{arguments[0]} did not start")
        yield line.split()[-1]
    finally:
        running.terminate()
        running.wait(10)


@contextmanager
def running(arguments: Sequence[str], **environment: str) -> Iterator[int]:
    """Run a Python module beside what is measured; yields its process id."""
    env = {**os.environ, **environment}
    process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


def opsentry(found: Servers, database: str, *arguments: str) -> Any:
    """Run an `opsentry` command with `--json` and return what it prints."""
    env = environment(found, database)
    command = [sys.executable, "-m", "opsentry", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def environment(found: Servers, database: str) -> dict[str, str]:
    return {
        "OPSENTRY_DATABASE_URL": found.postgres.url(database, APP_USER),
        "OPSENTRY_REDIS_URL": found.valkey.url,
        "OPSENTRY_RATE_LIMIT": "100000000/minute",
        "OPSENTRY_DATABASE_TIMEOUT_MS": f"{1000 * DATABASE_TIMEOUT_SECONDS:.0f}",
        "OPSENTRY_PORT": "0",
        "OPSENTRY_LOG_LEVEL": "warning",
    }

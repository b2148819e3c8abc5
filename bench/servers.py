"""Servers and processes to measure: an embedded PostgreSQL as durable as in production, and `opsentry serve`."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from opsentry.demo.embedded import APP_USER, EmbeddedPostgres, EmbeddedValkey
from opsentry.infrastructure.migrations import migrate, migrations

ROOT = Path(__file__).parent.parent
# The bench measures how long the database takes: a slow machine must show it as a figure, not as a timeout.
DATABASE_TIMEOUT_SECONDS = 60.0
NO_SETTINGS: Mapping[str, str] = {}
_STOP_SECONDS = 60.0


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
        """Create a database, in the place of one that exists; return its owner's URL."""
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
            await connection.close()
            await self._create_login()

    def database_of(self, root: Path, name: str) -> None:
        """Create a database with the schema of the checkout in `root`."""
        url = self.database(name, schema=False)
        run_opsentry(["migrate"], {"OPSENTRY_DATABASE_URL": url}, root=root)
        asyncio.run(self._create_login())

    async def _create_login(self) -> None:
        connection = await asyncpg.connect(self.postgres.url("postgres"))
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", APP_USER):
            await connection.execute(f"CREATE ROLE {APP_USER} LOGIN IN ROLE opsentry_app")
        await connection.close()


@contextmanager
def servers() -> Iterator[Servers]:
    """Start both servers in a temporary folder; stop them at the end."""
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
def process(
    arguments: Sequence[str], environment: Mapping[str, str] = NO_SETTINGS, *, root: Path = ROOT
) -> Iterator[str]:
    """Run a Python module of the checkout in `root` that prints its URL; yield the URL.

    The URL is the last word of the first line that the module prints.
    """
    with _started(arguments, root, environment, stdout=subprocess.PIPE) as started:
        if started.stdout is None:
            raise RuntimeError("no pipe")
        line = started.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(arguments)} did not start")
        yield line.split()[-1]


@contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str], *, root: Path = ROOT) -> Iterator[int]:
    """Run a Python module of the checkout in `root` beside the measurement; yield its process id."""
    with _started(arguments, root, environment, stdout=subprocess.DEVNULL) as started:
        yield started.pid


@contextmanager
def _started(
    arguments: Sequence[str], root: Path, environment: Mapping[str, str], *, stdout: int
) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", *arguments]
    started = subprocess.Popen(command, cwd=root, env=_inherited(root, environment), stdout=stdout, text=True)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def opsentry(found: Servers, database: str, *arguments: str, root: Path = ROOT, **more: str) -> Any:
    """Run an `opsentry` command of the checkout in `root` with `--json` and return the decoded output."""
    return json.loads(run_opsentry([*arguments, "--json"], {**environment(found, database), **more}, root=root))


def run_opsentry(arguments: Sequence[str], environment: Mapping[str, str], *, root: Path) -> str:
    """Run an `opsentry` command of the checkout in `root` and return its output.

    Raises:
        CalledProcessError: It failed; `stderr` says why.
    """
    command = [sys.executable, "-m", "opsentry", *arguments]
    env = _inherited(root, environment)
    return subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, text=True).stdout


def _inherited(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    # The package of the checkout comes before one that is installed.
    return {**os.environ, "PYTHONPATH": str(root), **environment}


def environment(found: Servers, database: str) -> dict[str, str]:
    """Return the settings of every process that works on `database`."""
    return {
        "OPSENTRY_DATABASE_URL": found.postgres.url(database, APP_USER),
        "OPSENTRY_REDIS_URL": found.valkey.url,
        "OPSENTRY_RATE_LIMIT": "100000000/minute",
        "OPSENTRY_DATABASE_TIMEOUT_MS": f"{1000 * DATABASE_TIMEOUT_SECONDS:.0f}",
        "OPSENTRY_PORT": "0",
        "OPSENTRY_LOG_LEVEL": "warning",
    }

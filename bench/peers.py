"""Other event stores on the same PostgreSQL. Each is installed from its package on first use, in its own folder."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.servers import ROOT, Servers

_EMMETT = ROOT / "bench" / "emmett"
_PYTHON = ROOT / ".venv-bench"

Rate = tuple[float | None, str]


def emmett(servers: Servers, waiting: int, seconds: float) -> Rate:
    """Return appends a second of one event to new streams, or the reason why there is no figure."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return None, "needs Node and npm"
    try:
        if not (_EMMETT / "node_modules").exists():
            _run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], _EMMETT)
        servers.database("emmett", schema=False)
        connection = f"postgresql://postgres@localhost/emmett?host={servers.host}"
        return _rate(["node", "append.mjs", connection, str(waiting), str(seconds)], _EMMETT), ""
    except subprocess.CalledProcessError as error:
        return None, f"failed: {error.stderr.strip()[-200:]}"


def eventsourcing(servers: Servers, waiting: int, seconds: float) -> Rate:
    """Return saves a second of one new aggregate, or the reason why there is no figure."""
    return _in_python(servers, "peer_eventsourcing.py", str(waiting), str(seconds))


def projection(servers: Servers, file: Path) -> Rate:
    """Return events a second that pyeventsourcing projects into one table, or the reason why there is no figure.

    `file` holds the streams in the form that `peer_projection.py` reads.
    """
    return _in_python(servers, "peer_projection.py", str(file))


def _in_python(servers: Servers, script: str, *arguments: str) -> Rate:
    python = _PYTHON / "bin" / "python"
    try:
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(_PYTHON)], ROOT)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _run([*install, "--require-hashes", "-r", "requirements/bench.txt"], ROOT)
        servers.database("eventsourcing", schema=False)
        command = [str(python), str(ROOT / "bench" / script), servers.host, "eventsourcing", *arguments]
        return _rate(command, ROOT), ""
    except subprocess.CalledProcessError as error:
        return None, f"failed: {error.stderr.strip()[-200:]}"


def _rate(command: Sequence[str], folder: Path) -> float:
    return float(json.loads(_run(command, folder).splitlines()[-1])["rate"])


def _run(command: Sequence[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout

"""`python -m bench`: measures everything, shows one table. `--only NAME` for a part, `--json` for machines."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from bench import appends, http, ledger, rebuild, scale, sending, worker
from bench.figure import Figure, table
from bench.servers import Servers, servers


def _history(found: Servers) -> list[Figure]:
    path = os.environ.get("OPSENTRY_REAL_HISTORY")
    return http.history(found, Path(path)) if path else []


PARTS: dict[str, Callable[[Servers], list[Figure]]] = {
    "appends": appends.measure,
    "http": http.measure,
    "history": _history,
    "ledger": ledger.measure,
    "scale": scale.measure,
    "rebuild": rebuild.measure,
    "worker": worker.measure,
    "sending": sending.measure,
}


@click.command()
@click.option("--only", type=click.Choice(list(PARTS)), help="Measure this part alone.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON instead of a table.")
def main(only: str | None, *, json_output: bool) -> None:
    """Measure Opsentry beside its peers, on one embedded PostgreSQL."""
    figures: list[Figure] = []
    progress = Console(stderr=True)
    with servers() as found:
        for name in [only] if only else list(PARTS):
            with progress.status(f"measuring {name} …"):
                figures += PARTS[name](found)
    if json_output:
        click.echo(json.dumps([figure.as_json() for figure in figures], indent=2))
    else:
        Console(width=None if os.isatty(1) else 160).print(table(figures))


if __name__ == "__main__":
    main()

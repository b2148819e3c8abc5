"""Measure every part and print one table.

`python -m bench --only http` measures one part. `--against DIR` measures this checkout beside another one. `--json`
prints the figures for machines.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import click
from rich.console import Console

from bench import against, appends, http, ledger, rebuild, scale, sending, worker
from bench.figure import Figure, table
from bench.servers import Servers, servers

Part: TypeAlias = Callable[[Servers], Iterable[Figure]]


def _history(found: Servers) -> Iterable[Figure]:
    path = os.environ.get("OPSENTRY_REAL_HISTORY")
    return http.history(found, Path(path)) if path else ()


PARTS: dict[str, Part] = {
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
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Measure this part; repeatable.")
@click.option(
    "--against",
    "other",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure beside the checkout in this folder, in turn: the parts http, rebuild and sending.",
)
@click.option(
    "--against-env",
    "variables",
    multiple=True,
    metavar="NAME=VALUE",
    help="Setting that only the other checkout needs, under its own name; repeatable.",
)
@click.option("--json", "json_output", is_flag=True, help="Print JSON instead of a table.")
def main(only: tuple[str, ...], other: Path | None, variables: tuple[str, ...], *, json_output: bool) -> None:
    """Measure Opsentry beside its peers, on one embedded PostgreSQL. Exit with 1 if a part fails."""
    parts: Mapping[str, Part] = PARTS
    if other is not None:
        settings = dict(variable.split("=", 1) for variable in variables)
        parts = {name: partial(part, other=other, settings=settings) for name, part in against.PARTS.items()}
    if unknown := sorted(set(only) - set(parts)):
        raise click.UsageError(f"--against does not measure {', '.join(unknown)}")
    figures: list[Figure] = []
    progress = Console(stderr=True)
    with servers() as found:
        for name in only or parts:
            with progress.status(f"Measuring {name} …"):
                for figure in measured(name, parts[name], found):
                    figures.append(figure)
                    progress.print(f"{figure.name}: {figure.error or 'measured'}", markup=False, emoji=False)
    if json_output:
        click.echo(json.dumps([figure.as_json() for figure in figures], indent=2))
    else:
        Console(width=None if os.isatty(1) else 160).print(table(figures))
    sys.exit(any(figure.error for figure in figures))


def measured(name: str, part: Part, found: Servers) -> Iterator[Figure]:
    """Yield the figures of a part; if it fails, yield a row with the error instead of the figures that are missing."""
    try:
        yield from part(found)
    except Exception as error:  # noqa: BLE001 - one part that fails must not hide the figures of the others
        yield Figure.failed(name, error)


if __name__ == "__main__":
    main()

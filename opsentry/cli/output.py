"""Print rows, tokens and progress: tables for people, JSON for programs."""

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from opsentry.identity import tokens
from opsentry.infrastructure.postgres import Record

# A pipe has no width. Programs that read tables from one expect a row per line.
PIPE_WIDTH_COLUMNS = 240

_UNBROKEN_COLUMNS = {"projection", "id", "prefix"}

as_json = click.option("--json", "json_output", is_flag=True, help="Print JSON instead of a table.")


def table(*columns: str) -> Table:
    """Return an empty table that fits a terminal of 80 columns.

    Cells fold instead of losing characters. Names, ids and prefixes stay whole, so that they can be copied.
    """
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        header = column.replace("_", " ")  # wraps between words
        made.add_column(header, no_wrap=column in _UNBROKEN_COLUMNS, overflow="fold")
    return made


def print_table(made: Table) -> None:
    """Print a table, as wide as the terminal or `PIPE_WIDTH_COLUMNS`."""
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH_COLUMNS).print(made)


def print_json(value: object) -> None:
    """Print `value` as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def show(rows: Sequence[Mapping[str, Any] | Record], columns: Sequence[str], *, json_output: bool) -> None:
    """Print these columns of `rows` as a table or as a JSON array."""
    if json_output:
        print_json([{column: row[column] for column in columns} for row in rows])
        return
    made = table(*columns)
    for row in rows:
        made.add_row(*(Text(cell(row[column])) for column in columns))
    print_table(made)


def show_token(value: str, *, json_output: bool) -> None:
    """Print the value of a new token. No later command can print it."""
    if json_output:
        show([{"token": value, "prefix": tokens.public_prefix(value)}], ["token", "prefix"], json_output=True)
    else:
        click.echo(value)


def cell(value: Any) -> str:
    """Return a value as the text of a table cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds").replace("+00:00", "Z")
    return str(value)


class EventRate(ProgressColumn):
    """Show the events per second of a task."""

    def render(self, task: Task) -> Text:
        """Return the text of the column; empty until the first events are done."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} events/s")


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Return a progress bar on standard error with additional `columns`; hidden where that is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )

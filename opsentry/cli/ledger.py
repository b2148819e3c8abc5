"""`opsentry events|verify`: the ledger, what comes into it, and the proof that it is whole."""

import asyncio
import gzip
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opsentry.cli.common import PATIENCE, as_json, connected, for_tenant, opened, run, settings
from opsentry.domain.events import EVENT_TYPES
from opsentry.events import audit, export
from opsentry.events.audit import Entry
from opsentry.events.verification import Anchor, Verdict, verify_export
from opsentry.events.verification import verify as verify_ledgers
from opsentry.identity import tenants
from opsentry.infrastructure.postgres import Connection

_BATCH = 1000
_FOLLOW_SECONDS = 0.5
# What is worth a line of an event, the first that it has.
_TELLING = ("title", "message", "status", "severity", "name", "reason", "prefix")


@click.group(name="events")
def events_group() -> None:
    """Read a tenant's ledger."""


@events_group.command(name="tail")
@for_tenant
@click.option(
    "-n", "count", type=click.IntRange(0, 10_000), default=20, show_default=True, help="How many to begin with."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--type", "type_", type=click.Choice(sorted(EVENT_TYPES)), metavar="TYPE", help="Of one type only.")
@as_json
def tail(slug: str, count: int, type_: str | None, *, follow: bool, json_output: bool) -> None:
    """Print the last events, one a line; `--json` prints a JSON object a line."""

    async def work() -> None:
        async with opened(settings()) as database:
            async with database.connection(PATIENCE) as connection:
                tenant_id = (await tenants.find_tenant(connection, slug))["tenant_id"]
                last = (await audit.read_ledger_head(connection, tenant_id)).position
                entries = await _last(connection, tenant_id, last, count, type_)
            _print(entries, json_output=json_output)
            more: int | None = None
            while follow:
                if more is None:
                    await asyncio.sleep(_FOLLOW_SECONDS)
                async with database.connection(PATIENCE) as connection:
                    entries, more = await audit.read_ledger_page(
                        connection, tenant_id, after=last, limit=_BATCH, type_=type_
                    )
                last = more or max([last, *(entry.position for entry in entries)])
                _print(entries, json_output=json_output)

    run(work())


async def _last(connection: Connection, tenant_id: int, last: int, count: int, type_: str | None) -> Sequence[Entry]:
    """Return the last `count` entries, of one type if given, looking back further and further."""
    span = count
    while True:
        after, found = max(0, last - span), []
        more: int | None = after
        while more is not None and more < last:
            entries, more = await audit.read_ledger_page(connection, tenant_id, after=more, limit=_BATCH, type_=type_)
            found += entries
        if after == 0 or len(found) >= count:
            return found[-count:] if count else []
        span *= 4


def _print(entries: Sequence[Entry], *, json_output: bool) -> None:
    for entry in entries:
        if json_output:
            click.echo(msgspec.json.encode(entry))
            continue
        told = next((str(entry.data[name]) for name in _TELLING if entry.data.get(name)), "")
        who = entry.actor.name or entry.actor.kind
        when = entry.recorded_at.isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")
        told = " ".join(told.split())
        click.echo(
            f"{entry.position:>8}  {when}  {entry.type:<26} {entry.stream_kind} {entry.stream_id:<6} {who}:"
            f" {told[:100]}"
        )


@events_group.command(name="export")
@for_tenant
@click.option("--from-position", type=click.IntRange(1), default=1, show_default=True, help="The first position.")
@click.option("--to-position", type=click.IntRange(0), help="The last position; where the ledger ends if left out.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file, instead of standard output."
)
@click.option("--gzip", "packed", is_flag=True, help="Compress it.")
@click.option("--resume", is_flag=True, help="Go on after the last whole line of the file.")
def export_command(
    slug: str, from_position: int, to_position: int | None, output: Path | None, *, packed: bool, resume: bool
) -> None:
    """Write the ledger as lines of JSON, which `opsentry verify --from-file` verifies without a database."""
    if resume and (output is None or packed):
        raise click.UsageError("--resume needs --output, without --gzip")

    begin = from_position
    if resume and output is not None and output.exists():
        begin = max(begin, _cut_to_whole_lines(output) + 1)

    async def work() -> None:
        async with opened(settings()) as database:
            async with database.connection(PATIENCE) as connection:
                tenant_id = (await tenants.find_tenant(connection, slug))["tenant_id"]
                ends = (await audit.read_ledger_head(connection, tenant_id)).position
            last = ends if to_position is None else min(to_position, ends)
            with _target(output, packed=packed, append=resume) as file, _progress() as progress:
                task = progress.add_task(f"{slug}: events", total=max(0, last - begin + 1))
                for after in range(begin - 1, last, _BATCH):
                    until = min(after + _BATCH, last)
                    async with database.connection(PATIENCE) as connection:
                        chunk = await export.chunk(connection, tenant_id, after, until)
                    file.write(chunk)
                    progress.advance(task, until - after)

    run(work())


def _cut_to_whole_lines(file: Path) -> int:
    """Cut what a break has left of a last line; return the position of the last whole one, 0 if there is none."""
    position = whole = 0
    with file.open("r+b") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            position = msgspec.json.decode(line, type=export.Line).position
        lines.truncate(whole)
    return position


@contextmanager
def _target(output: Path | None, *, packed: bool, append: bool) -> Iterator[IO[bytes]]:
    if output is None:
        if packed:
            with gzip.open(sys.stdout.buffer, "wb") as file:
                yield cast("IO[bytes]", file)
        else:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
    elif packed:
        with gzip.open(output, "wb") as file:
            yield cast("IO[bytes]", file)
    else:
        with output.open("ab" if append else "wb") as file:
            yield file


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


class _AnchorType(click.ParamType[Anchor]):
    name = "SEQ:HASH"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> Anchor:
        if isinstance(value, Anchor):
            return value
        position, _, digest = str(value).partition(":")
        if not position.isdecimal() or len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef"):  # noqa: PLR2004
            self.fail("must be a position and its hash, such as 120:9f86d0…", param, context)
        return Anchor(int(position), digest.lower())


@click.command()
@click.option("--tenant", "slug", metavar="SLUG", help="One tenant; all if left out.")
@click.option(
    "--anchor", "anchors", type=_AnchorType(), multiple=True, help="A position and its hash that must be found."
)
@click.option(
    "--from-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="An export, plain or gzip."
)
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes at once; as many as processors if left out.")
@as_json
def verify(
    slug: str | None, anchors: tuple[Anchor, ...], from_file: Path | None, jobs: int | None, *, json_output: bool
) -> None:
    """Recompute the hash chain of ledgers, and name the first event that is not what was recorded.

    Exit code 1 if there is one.
    """
    if from_file is not None and (slug or jobs):
        raise click.UsageError("--from-file needs no --tenant and no --jobs: a file has one tenant")
    if anchors and slug is None and from_file is None:
        raise click.UsageError("--anchor needs --tenant, or --from-file")

    async def work() -> list[Verdict]:
        with _progress() as progress:
            task = progress.add_task("verifying", total=None)

            def advance(done: int) -> None:
                progress.advance(task, done)

            if from_file is not None:
                return [verify_export(from_file, anchors=anchors, advance=advance)]
            found = settings()
            tenant_id = None
            if slug is not None:
                async with connected(found) as connection:
                    tenant_id = (await tenants.find_tenant(connection, slug))["tenant_id"]
            return await verify_ledgers(
                found.database_url,
                tenant_id=tenant_id,
                anchors=anchors,
                jobs=jobs,
                begin=lambda total: progress.update(task, total=total),
                advance=advance,
            )

    verdicts = run(work())
    if json_output:
        click.echo(msgspec.json.format(msgspec.json.encode([_plain(verdict) for verdict in verdicts])).decode())
    else:
        _show(verdicts)
    if any(verdict.violation is not None for verdict in verdicts):
        raise SystemExit(1)


def _plain(verdict: Verdict) -> dict[str, object]:
    violation = verdict.violation
    return {
        **msgspec.structs.asdict(verdict),
        "anchor": f"{verdict.last}:{verdict.hash}",
        "violation": None if violation is None else violation._asdict(),
    }


def _show(verdicts: Sequence[Verdict]) -> None:
    table = Table("tenant", "events", "anchor", "erased", "verdict")
    for verdict in verdicts:
        says = "[green]whole[/]"
        if verdict.violation is not None:
            says = (
                f"[red]event {verdict.violation.position} {verdict.violation.kind.replace('_', ' ')}[/]:"
                f" {verdict.violation.says}"
            )
        events = f"{verdict.events:,}" if verdict.first <= 1 else f"{verdict.events:,} from {verdict.first}"
        table.add_row(
            verdict.slug or str(verdict.tenant_id), events, f"{verdict.last}:{verdict.hash}", str(verdict.erased), says
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)

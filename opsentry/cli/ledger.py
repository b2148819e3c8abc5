"""`opsentry ledger`: read, export and verify the ledgers."""

import asyncio
import gzip
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import click
import msgspec

from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.ledger import export_events, get_ledger_head, list_events
from opsentry.cli.common import application_for, for_any_tenant, for_tenant, run, settings
from opsentry.cli.ledger_history import history
from opsentry.cli.ledger_redact import redact
from opsentry.cli.output import as_json, print_json, print_table, progress_bar, table
from opsentry.domain.events import EVENT_TYPES
from opsentry.events import export
from opsentry.events.audit import Entry
from opsentry.events.export_verification import verify_export
from opsentry.events.verdict import Anchor, Verdict
from opsentry.events.verification import verify as verify_ledgers

_BATCH_EVENTS = 1000
_FOLLOW_INTERVAL_SECONDS = 0.5
# A line of `tail` shows the first of these fields that an event has.
_SUMMARY_FIELDS = ("title", "message", "status", "severity", "name", "reason", "prefix")
_SUMMARY_CHARACTERS = 100
_SHA256_HEX_DIGITS = 64


@click.group(name="ledger")
def ledger_group() -> None:
    """Read, export, verify and redact the ledgers of tenants."""


ledger_group.add_command(history)
ledger_group.add_command(redact)


@ledger_group.command(name="tail")
@for_tenant
@click.option("-n", "count", type=click.IntRange(0, 10_000), default=20, show_default=True, help="Number of events.")
@click.option("-f", "--follow", is_flag=True, help="Print new events until Ctrl-C.")
@click.option("--type", "type_", type=click.Choice(sorted(EVENT_TYPES)), metavar="TYPE", help="Only events of a type.")
@as_json
def tail(slug: str, count: int, type_: str | None, *, follow: bool, json_output: bool) -> None:
    """Print the last events, one per line. `--json` prints one JSON object per line."""

    async def work() -> None:
        async with application_for(slug) as (app, caller):
            last = (await get_ledger_head(app, caller)).position
            _print(await _last(app, caller, last, count, type_), json_output=json_output)
            while follow:
                page = await list_events(app, caller, after=last, limit=_BATCH_EVENTS, event_type=type_)
                _print(page.entries, json_output=json_output)
                if page.next_position is None:
                    last = max([page.head_position, *(entry.position for entry in page.entries)])
                    await asyncio.sleep(_FOLLOW_INTERVAL_SECONDS)
                else:
                    last = page.next_position

    run(work())


async def _last(app: Application, caller: Caller, last: int, count: int, type_: str | None) -> Sequence[Entry]:
    """Return the last `count` entries of a type, reading a wider range of positions until there are enough."""
    span = count
    while True:
        after = max(0, last - span)
        found: list[Entry] = []
        more: int | None = after
        while more is not None and more < last:
            page = await list_events(app, caller, after=more, limit=_BATCH_EVENTS, event_type=type_)
            found += page.entries
            more = page.next_position
        if after == 0 or len(found) >= count:
            return found[-count:] if count else []
        span *= 4


def _print(entries: Sequence[Entry], *, json_output: bool) -> None:
    for entry in entries:
        if json_output:
            click.echo(msgspec.json.encode(entry))
            continue
        text = next((str(entry.data[name]) for name in _SUMMARY_FIELDS if entry.data.get(name)), "")
        summary = " ".join(text.split())[:_SUMMARY_CHARACTERS]
        actor = entry.actor.name or entry.actor.kind
        when = entry.recorded_at.isoformat(sep=" ", timespec="seconds").replace("+00:00", "Z")
        click.echo(
            f"{entry.position:>8}  {when}  {entry.type:<26} {entry.stream_kind} {entry.stream_id:<6} {actor}: {summary}"
        )


@ledger_group.command(name="export")
@for_tenant
@click.option("--from-position", type=click.IntRange(1), default=1, show_default=True, help="First position.")
@click.option("--to-position", type=click.IntRange(0), help="Last position. Default: the end of the ledger.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File. Default: standard output.")
@click.option("--gzip", "is_gzip", is_flag=True, help="Compress the export.")
@click.option("--resume", is_flag=True, help="Append to the file after its last whole line.")
def export_command(
    slug: str, from_position: int, to_position: int | None, output: Path | None, *, is_gzip: bool, resume: bool
) -> None:
    """Write a ledger as lines of JSON.

    `opsentry ledger verify --from-file` verifies an export without a database.
    """
    if resume and (output is None or is_gzip):
        raise click.UsageError("--resume needs --output, without --gzip")

    begin = from_position
    if resume and output is not None and output.exists():
        begin = max(begin, _truncate_to_whole_lines(output) + 1)

    async def work() -> None:
        async with application_for(slug) as (app, caller):
            ledger = await export_events(app, caller, first=begin, last=to_position)
            with _target(output, is_gzip=is_gzip, append=resume) as file, progress_bar() as progress:
                task = progress.add_task(f"{slug}: events", total=ledger.last - ledger.first + 1)
                async for chunk in ledger.chunks:
                    file.write(chunk)
                    progress.advance(task, chunk.count(b"\n"))

    run(work())


def _truncate_to_whole_lines(file: Path) -> int:
    """Cut an incomplete last line off; return the position of the last whole line, or 0."""
    position = whole_bytes = 0
    with file.open("r+b") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            whole_bytes += len(line)
            position = msgspec.json.decode(line, type=export.Line).position
        lines.truncate(whole_bytes)
    return position


@contextmanager
def _target(output: Path | None, *, is_gzip: bool, append: bool) -> Iterator[IO[bytes]]:
    if output is None:
        if is_gzip:
            with gzip.open(sys.stdout.buffer, "wb") as file:
                yield cast("IO[bytes]", file)
        else:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
    elif is_gzip:
        with gzip.open(output, "wb") as file:
            yield cast("IO[bytes]", file)
    else:
        with output.open("ab" if append else "wb") as file:
            yield file


class _AnchorType(click.ParamType[Anchor]):
    name = "POSITION:HASH"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> Anchor:
        if isinstance(value, Anchor):
            return value
        position, _, digest = str(value).partition(":")
        is_hash = len(digest) == _SHA256_HEX_DIGITS and set(digest.lower()) <= set("0123456789abcdef")
        if not position.isdecimal() or not is_hash:
            self.fail("must be a position and its hash, such as 120:9f86d0…", param, context)
        return Anchor(int(position), digest.lower())


@ledger_group.command(name="verify")
@for_any_tenant
@click.option("--anchor", "anchors", type=_AnchorType(), multiple=True, help="Position and hash to find; repeatable.")
@click.option(
    "--from-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Export to verify, plain or gzip."
)
@click.option("--jobs", type=click.IntRange(1, 1024), help="Number of processes. Default: one per processor.")
@as_json
def verify(
    slug: str | None, anchors: tuple[Anchor, ...], from_file: Path | None, jobs: int | None, *, json_output: bool
) -> None:
    """Recompute the hash chains of ledgers and name the first damaged event of each.

    Exit code 1 if a ledger is damaged.
    """
    if from_file is not None and (slug or jobs):
        raise click.UsageError("--from-file excludes --tenant and --jobs: a file holds one tenant's ledger")
    if anchors and slug is None and from_file is None:
        raise click.UsageError("--anchor needs --tenant, or --from-file")

    async def work() -> list[Verdict]:
        with progress_bar() as progress:
            task = progress.add_task("verifying", total=None)

            def advance(events: int) -> None:
                progress.advance(task, events)

            if from_file is not None:
                return [verify_export(from_file, anchors=anchors, advance=advance)]
            found = settings()
            tenant_id = None
            if slug is not None:
                async with application_for(slug) as (_, caller):
                    tenant_id = caller.tenant_id
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
        print_json([_plain(verdict) for verdict in verdicts])
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
    shown = table("slug", "events", "redacted", "verdict")
    for verdict in verdicts:
        summary = "[green]intact[/]"
        if verdict.violation is not None:
            summary = (
                f"[red]event {verdict.violation.position} {verdict.violation.kind.replace('_', ' ')}[/]:"
                f" {verdict.violation.message}"
            )
        events = f"{verdict.events:,}" if verdict.first <= 1 else f"{verdict.events:,} from {verdict.first}"
        shown.add_row(
            verdict.slug or str(verdict.tenant_id),
            events,
            str(verdict.redacted),
            summary,
        )
    print_table(shown)
    if intact := [verdict for verdict in verdicts if verdict.violation is None]:
        # Outside of the table, whose cells would fold: an anchor is there to be copied.
        click.echo("\nAnchors, to keep where nobody can change them:")
        for verdict in intact:
            click.echo(f"{verdict.slug or verdict.tenant_id} {verdict.last}:{verdict.hash}")

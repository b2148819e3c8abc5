"""Proving a ledger: the chain recomputed from the stored columns, or from an export with no database at all."""

import asyncio
import gzip
import json
import multiprocessing
import os
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import asyncpg
import msgspec

from opsentry.events import audit, export
from opsentry.events.hash_chain import GENESIS, Link, Violation, check
from opsentry.infrastructure.postgres import Connection, Database

# A piece of a ledger that one process verifies at a time, and how much of it is read at once.
SEGMENT = 50_000
_BATCH = 2_000
# So much after a violation is looked at to say of what kind it is.
_IN_VIEW = 100_000

Erased = tuple[str, int, int]


class Anchor(NamedTuple):
    """A position and the hash that it had, from `/events/head`, kept where whoever holds the database cannot reach."""

    position: int
    hash: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What verifying a ledger came to.

    Attributes:
        tenant_id: Whose it is.
        slug: The tenant's; `None` where only an export is known.
        events: How many events were verified.
        first: Position of the first of them.
        last: Position of the last of them.
        hash: Its hash, hex: to be pinned.
        erased: How many had their erasable erased, each with its record.
        violation: The first violation, `None` if there is none.
    """

    tenant_id: int
    slug: str | None
    events: int
    first: int
    last: int
    hash: str
    erased: int
    violation: Violation | None


class _Segment(NamedTuple):
    tenant_id: int
    after: int
    until: int


class _Checked(NamedTuple):
    segment: _Segment
    sound: bool
    erased: dict[Erased, int]


# ------------------------------------------------------------------------------------------------ from the database


async def verify(
    url: str,
    *,
    tenant_id: int | None = None,
    anchors: Sequence[Anchor] = (),
    jobs: int | None = None,
    begin: Callable[[int], None] = lambda _total: None,
    advance: Callable[[int], None] = lambda _done: None,
) -> list[Verdict]:
    """Verify the ledgers in a database as they are when this begins, in processes of their own.

    Args:
        url: The database.
        tenant_id: One tenant; all if left out.
        anchors: Positions and hashes that the tenant's ledger must have; only with `tenant_id`.
        jobs: Processes at once; as many as the machine has processors if left out.
        begin: Called with the number of events to verify.
        advance: Called with the number of events that were verified just now.

    Raises:
        DatabaseUnavailable: The database was lost.
    """
    async with _connected(url) as connection:
        ledger_heads = await audit.read_ledger_heads(connection, tenant_id)
        begin(sum(head["position"] for head in ledger_heads))
        segments = [
            _Segment(head["tenant_id"], after, min(after + SEGMENT, head["position"]))
            for head in ledger_heads
            for after in range(0, head["position"], SEGMENT)
        ]
        broken: set[int] = set()
        erased: dict[int, dict[Erased, int]] = {}
        async for checked in _check_all(url, segments, jobs or os.cpu_count() or 1):
            segment = checked.segment
            advance(segment.until - segment.after)
            if not checked.sound:
                broken.add(segment.tenant_id)
            if checked.erased:
                erased.setdefault(segment.tenant_id, {}).update(checked.erased)
        verdicts = []
        for head in ledger_heads:
            lost = erased.get(head["tenant_id"], {})
            found = [
                await _locate(connection, head) if head["tenant_id"] in broken else None,
                await _ending(connection, head),
                await _unrecorded(connection, head["tenant_id"], lost),
                *[await _anchored(connection, head["tenant_id"], head["position"], anchor) for anchor in anchors],
            ]
            verdicts.append(
                Verdict(
                    tenant_id=head["tenant_id"],
                    slug=head["slug"],
                    events=head["position"],
                    first=min(1, head["position"]),
                    last=head["position"],
                    hash=head["hash"].hex(),
                    erased=len(lost),
                    violation=_first(found),
                )
            )
        return verdicts


def _first(found: Sequence[Violation | None]) -> Violation | None:
    return min(
        (violation for violation in found if violation is not None),
        key=lambda violation: violation.position,
        default=None,
    )


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Connection]:
    # Hours, not seconds: no request waits for a verification.
    database = Database(url, size=1, timeout_seconds=24 * 3600)
    await database.open()
    try:
        async with database.connection() as connection:
            yield connection
    finally:
        await database.close()


async def _check_all(url: str, segments: Sequence[_Segment], jobs: int) -> AsyncIterator[_Checked]:
    if jobs == 1 or len(segments) <= 1:
        for segment in segments:
            yield await _check_segment(url, segment)
        return
    # Spawned, not forked: a child must not inherit connections, nor an event loop.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(segments)), mp_context=context) as pool:
        waiting: set[Future[_Checked]] = set()
        for segment in segments:
            waiting.add(pool.submit(_in_process, url, segment))
            if len(waiting) > 4 * jobs:  # what has to wait anyway need not be queued
                async for checked in _some(waiting):
                    yield checked
        while waiting:
            async for checked in _some(waiting):
                yield checked


async def _some(waiting: set[Future[_Checked]]) -> AsyncIterator[_Checked]:
    """Yield what is ready, at least one, and take it away."""
    wrapped = {asyncio.wrap_future(future): future for future in waiting}
    done, _ = await asyncio.wait(wrapped, return_when=asyncio.FIRST_COMPLETED)
    for future in done:
        waiting.discard(wrapped[future])
        yield future.result()


def _in_process(url: str, segment: _Segment) -> _Checked:
    return asyncio.run(_check_segment(url, segment))


async def _check_segment(url: str, segment: _Segment) -> _Checked:
    erased: dict[Erased, int] = {}
    async with _connected(url) as connection:
        tenant_id, after, until = segment
        previous = GENESIS if after == 0 else await audit.read_hash(connection, tenant_id, after)
        while after < until:
            rows = await audit.read_hash_links(connection, tenant_id, after, min(after + _BATCH, until))
            if previous is None or check(rows, previous, after) or len(rows) < min(_BATCH, until - after):
                return _Checked(segment, sound=False, erased=erased)
            erased |= {(row[2], row[3], row[4]): row[1] for row in rows if row[11] is None and row[13] is not None}
            after, previous = after + len(rows), rows[-1][14]
    return _Checked(segment, sound=True, erased=erased)


async def _locate(connection: Connection, head: asyncpg.Record) -> Violation | None:
    """Return the first violation of a ledger that is known to have one, with what follows it in view."""
    tenant_id, last = head["tenant_id"], head["position"]
    after, previous = 0, GENESIS
    while after < last:
        rows = await audit.read_hash_links(connection, tenant_id, after, after + _BATCH)
        if check(rows, previous, after) or len(rows) < min(_BATCH, last - after):
            break
        after, previous = after + len(rows), rows[-1][14]
    rest = await audit.read_hash_links(connection, tenant_id, after, after + _IN_VIEW)
    violation = check(rest, previous, after)
    position = after + len(rest) + 1
    if violation is not None or position > last:
        return violation
    if head["last"] > position:
        return Violation(position, "missing", "it and many after it are gone")
    return Violation(position, "truncated", f"the ledger ends before it; its head says that it has {last} events")


async def _ending(connection: Connection, head: asyncpg.Record) -> Violation | None:
    """Return what is wrong with where the ledger says that it ends."""
    if before := await audit.read_hash_links(connection, head["tenant_id"], -(2**63), 0):
        return Violation(before[0][1], "inserted", "ledgers begin with position 1")
    if head["last"] > head["position"]:
        return Violation(
            head["position"] + 1, "inserted", f"the ledger's head says that it has {head['position']} events"
        )
    if head["last"] == head["position"]:
        ends = await audit.read_hash(connection, head["tenant_id"], head["position"]) if head["position"] else GENESIS
        if ends != head["hash"]:
            return Violation(head["position"], "changed", "the ledger's head has another hash")
    return None


async def _unrecorded(connection: Connection, tenant_id: int, erased: dict[Erased, int]) -> Violation | None:
    """Return the first event whose erasable are gone without an event that says so."""
    if not erased:
        return None
    recorded = {
        (row["stream_kind"], row["stream_id"], version)
        for row in await audit.read_redactions(connection, tenant_id)
        for version in _versions(row["data"])
    }
    return _not_recorded(erased, recorded)


def _not_recorded(erased: dict[Erased, int], recorded: Collection[Erased]) -> Violation | None:
    position = min((position for key, position in erased.items() if key not in recorded), default=None)
    return (
        None
        if position is None
        else Violation(position, "erased", "its erasable were erased, and no event says by whom")
    )


def _versions(data: str) -> Sequence[int]:
    try:
        return [int(version) for version in json.loads(data)["versions"]]
    except (ValueError, LookupError, TypeError):
        return ()


async def _anchored(connection: Connection, tenant_id: int, last: int, anchor: Anchor) -> Violation | None:
    if anchor.position > last:
        return Violation(
            last + 1, "truncated", f"the ledger ends before it; the anchor names position {anchor.position}"
        )
    found = await audit.read_hash(connection, tenant_id, anchor.position) if anchor.position else GENESIS
    if found is None or found.hex() != anchor.hash:
        return Violation(anchor.position, "changed", "it, or an event before it, is not the one that the anchor names")
    return None


# ------------------------------------------------------------------------------------------------ from an export


class BadExport(Exception):
    """A file that is no export, from its first line on."""


def verify_export(
    path: Path, *, anchors: Sequence[Anchor] = (), advance: Callable[[int], None] = lambda _done: None
) -> Verdict:
    """Verify an export of one tenant, whole or in part, in constant memory.

    A part proves that it is whole in itself, and follows from the hash that its first line names.

    Raises:
        BadExport: It has no line that can be read.
        OSError: The file cannot be read.
    """
    with export.opened(path) as file:
        lines = _Lines(export.Reader(file).links(), {anchor.position: anchor.hash for anchor in anchors}, advance)
        if lines.first is None:
            raise BadExport(f"{path.name}: {lines.broken or 'is empty'}")
        violation = check(lines, lines.previous, lines.first - 1)
    advance(lines.count % _BATCH)
    if lines.broken is not None:
        violation = _first([violation, Violation(lines.last + 1, "changed", lines.broken)])
    beyond = min((position for position in lines.anchors if position > lines.last), default=None)
    if beyond is not None:
        cut = Violation(lines.last + 1, "truncated", f"the export ends before it; the anchor names position {beyond}")
        lines.violations.append(cut)
    lines.violations.append(_not_recorded(lines.erased, lines.recorded))
    return Verdict(
        tenant_id=lines.tenant_id,
        slug=None,
        events=lines.count,
        first=lines.first,
        last=lines.last,
        hash=lines.hash.hex(),
        erased=len(lines.erased),
        violation=_first([violation, *lines.violations]),
    )


class _Lines:
    """The rows of an export, noting on the way what the chain alone does not show."""

    def __init__(
        self, links: Iterator[tuple[Link, bytes]], anchors: dict[int, str], advance: Callable[[int], None]
    ) -> None:
        self.anchors = anchors
        self.erased: dict[Erased, int] = {}
        self.recorded: set[Erased] = set()
        self.violations: list[Violation | None] = []
        self.broken: str | None = None
        self.count = self.last = 0
        self.hash = GENESIS
        self._links = self._readable(links)
        self._advance = advance
        beginning = next(self._links, None)
        self.first = None
        if beginning is not None:
            self._links = _after(beginning, self._links)
            self.tenant_id, self.first, self.previous = beginning[0].tenant_id, beginning[0].position, beginning[1]
            if self.first == 1 and self.previous != GENESIS:
                self.violations.append(Violation(1, "changed", "a first event goes on from 32 zero octets"))

    def _readable(self, links: Iterator[tuple[Link, bytes]]) -> Iterator[tuple[Link, bytes]]:
        try:
            yield from links
        except export.Unreadable as error:
            self.broken = str(error)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self.broken = f"the file breaks off, or is not what was packed: {error}"

    def __iter__(self) -> Iterator[Link]:
        previous = self.previous
        for link, named in self._links:
            if link.tenant_id != self.tenant_id:
                self.violations.append(Violation(link.position, "inserted", f"it belongs to tenant {link.tenant_id}"))
            if named != previous:
                self.violations.append(Violation(link.position, "changed", "its line names another previous hash"))
            if (hash_ := self.anchors.get(link.position)) is not None and hash_ != link.hash.hex():
                says = "it, or an event before it, is not the one that the anchor names"
                self.violations.append(Violation(link.position, "changed", says))
            if link.erasable is None and link.erasable_digest is not None:
                self.erased[link.stream_kind, link.stream_id, link.version] = link.position
            if link.type.endswith(".redacted"):
                self.recorded |= {(link.stream_kind, link.stream_id, version) for version in _versions(link.data)}
            previous = self.hash = link.hash
            self.last = max(self.last, link.position)
            self.count += 1
            if self.count % _BATCH == 0:
                self._advance(_BATCH)
            yield link


def _after(first: tuple[Link, bytes], rest: Iterator[tuple[Link, bytes]]) -> Iterator[tuple[Link, bytes]]:
    yield first
    yield from rest

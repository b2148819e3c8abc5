"""Verify ledgers: recompute the hash chain from the stored columns."""

import asyncio
import json
import multiprocessing
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple

import asyncpg
import msgspec

from opsentry.events import audit
from opsentry.events.hash_chain import GENESIS, Violation, check
from opsentry.infrastructure.postgres import Connection, Database

# Events of a ledger that one process verifies at a time, and events that it reads at a time.
SEGMENT = 50_000
BATCH = 2_000
# Events after a violation that are read to tell its kind.
_IN_VIEW = 100_000

Erased = tuple[str, int, int]
"""An erased event: stream kind, stream id and version."""


class Anchor(NamedTuple):
    """A position and its hash, from `/events/head`. Keep it outside of the database."""

    position: int
    hash: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result of verifying a ledger.

    Attributes:
        tenant_id: The tenant.
        slug: The tenant's slug; `None` for an export.
        events: The number of verified events.
        first: Position of the first of them.
        last: Position of the last of them.
        hash: The hash of the last event, in hexadecimal.
        erased: The number of redacted events.
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


async def verify(
    url: str,
    *,
    tenant_id: int | None = None,
    anchors: Sequence[Anchor] = (),
    jobs: int | None = None,
    begin: Callable[[int], None] = lambda _total: None,
    advance: Callable[[int], None] = lambda _done: None,
) -> list[Verdict]:
    """Verify the ledgers of a database up to their present heads, in separate processes.

    Args:
        url: The database.
        tenant_id: One tenant; all by default.
        anchors: Positions and hashes that the tenant's ledger must have; only with `tenant_id`.
        jobs: The number of processes; by default that of processors.
        begin: Called with the number of events to verify.
        advance: Called with the number of events verified since the last call.

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
                    violation=first_violation(found),
                )
            )
        return verdicts


def first_violation(found: Sequence[Violation | None]) -> Violation | None:
    """Return the violation with the lowest position."""
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
            if len(waiting) > 4 * jobs:  # bounds the queue
                async for checked in _some(waiting):
                    yield checked
        while waiting:
            async for checked in _some(waiting):
                yield checked


async def _some(waiting: set[Future[_Checked]]) -> AsyncIterator[_Checked]:
    """Yield the results that are ready, at least one, and remove them from `waiting`."""
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
            rows = await audit.read_hash_links(connection, tenant_id, after, min(after + BATCH, until))
            if previous is None or check(rows, previous, after) or len(rows) < min(BATCH, until - after):
                return _Checked(segment, sound=False, erased=erased)
            erased |= {(row[2], row[3], row[4]): row[1] for row in rows if row[11] is None and row[13] is not None}
            after, previous = after + len(rows), rows[-1][14]
    return _Checked(segment, sound=True, erased=erased)


async def _locate(connection: Connection, head: asyncpg.Record) -> Violation | None:
    """Return the first violation of a ledger that has one. Later events tell its kind."""
    tenant_id, last = head["tenant_id"], head["position"]
    after, previous = 0, GENESIS
    while after < last:
        rows = await audit.read_hash_links(connection, tenant_id, after, after + BATCH)
        if check(rows, previous, after) or len(rows) < min(BATCH, last - after):
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
    """Return a violation at the beginning or at the head."""
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
    """Return the first event that was erased without a recorded redaction."""
    if not erased:
        return None
    recorded = {
        (row["stream_kind"], row["stream_id"], version)
        for row in await audit.read_redactions(connection, tenant_id)
        for version in redacted_versions(row["data"])
    }
    return unrecorded_erasure(erased, recorded)


def unrecorded_erasure(erased: Mapping[Erased, int], recorded: Collection[Erased]) -> Violation | None:
    """Return the first erased event without a recorded redaction. `erased` has positions by event."""
    position = min((position for key, position in erased.items() if key not in recorded), default=None)
    return (
        None
        if position is None
        else Violation(position, "erased", "its texts were erased, and no event records by whom")
    )


def redacted_versions(data: str) -> Sequence[int]:
    """Return the versions that the data of a redaction names; none if it is malformed."""
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

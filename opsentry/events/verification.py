"""Verify the ledgers in a database: recompute each hash chain from the stored columns, in several processes."""

import asyncio
import multiprocessing
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple

from opsentry.events import audit
from opsentry.events.hash_chain import GENESIS, Violation, check
from opsentry.events.verdict import (
    Anchor,
    EventKey,
    Verdict,
    find_unrecorded_erasure,
    first_violation,
    redacted_versions,
)
from opsentry.infrastructure.postgres import Connection, Database, Record

SEGMENT_EVENTS = 50_000  # verified by one process at a time
_BATCH_EVENTS = 2_000
# The events after a violation that are read to find its kind.
_DIAGNOSED_EVENTS = 100_000


class _Segment(NamedTuple):
    tenant_id: int
    after: int
    until: int


class _Checked(NamedTuple):
    segment: _Segment
    sound: bool
    erased: dict[EventKey, int]


async def verify(
    url: str,
    *,
    tenant_id: int | None = None,
    anchors: Sequence[Anchor] = (),
    jobs: int | None = None,
    begin: Callable[[int], None] = lambda _total: None,
    advance: Callable[[int], None] = lambda _done: None,
) -> list[Verdict]:
    """Verify the ledgers of a database up to their heads at the start of this call.

    Args:
        url: The database.
        tenant_id: The tenant; `None` verifies all tenants.
        anchors: Positions and hashes that the tenant's ledger must contain; only with `tenant_id`.
        jobs: The number of processes; `None` starts one per processor.
        begin: Receives the number of events to verify.
        advance: Receives the number of events verified since its last call.

    Raises:
        DatabaseUnavailable: The connection was lost.
    """
    async with _connected(url) as connection:
        ledger_heads = await audit.read_ledger_heads(connection, tenant_id)
        begin(sum(head["position"] for head in ledger_heads))
        segments = [
            _Segment(head["tenant_id"], after, min(after + SEGMENT_EVENTS, head["position"]))
            for head in ledger_heads
            for after in range(0, head["position"], SEGMENT_EVENTS)
        ]
        broken: set[int] = set()
        erased: dict[int, dict[EventKey, int]] = {}
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
                    redacted=len(lost),
                    violation=first_violation(found),
                )
            )
        return verdicts


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
    # Spawned, not forked: a child must inherit neither connections nor the event loop.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(segments)), mp_context=context) as pool:
        waiting: set[Future[_Checked]] = set()
        for segment in segments:
            waiting.add(pool.submit(_in_process, url, segment))
            if len(waiting) > 4 * jobs:  # a bounded queue is enough to keep all processes busy
                async for checked in _some(waiting):
                    yield checked
        while waiting:
            async for checked in _some(waiting):
                yield checked


async def _some(waiting: set[Future[_Checked]]) -> AsyncIterator[_Checked]:
    """Wait for at least one future; remove all finished ones from `waiting` and yield their results."""
    wrapped = {asyncio.wrap_future(future): future for future in waiting}
    done, _ = await asyncio.wait(wrapped, return_when=asyncio.FIRST_COMPLETED)
    for future in done:
        waiting.discard(wrapped[future])
        yield future.result()


def _in_process(url: str, segment: _Segment) -> _Checked:
    return asyncio.run(_check_segment(url, segment))


async def _check_segment(url: str, segment: _Segment) -> _Checked:
    erased: dict[EventKey, int] = {}
    async with _connected(url) as connection:
        tenant_id, after, until = segment
        previous = GENESIS if after == 0 else await audit.read_hash(connection, tenant_id, after)
        while after < until:
            rows = await audit.read_hash_links(connection, tenant_id, after, min(after + _BATCH_EVENTS, until))
            if previous is None or check(rows, previous, after) or len(rows) < min(_BATCH_EVENTS, until - after):
                return _Checked(segment, sound=False, erased=erased)
            erased |= {(row[2], row[3], row[4]): row[1] for row in rows if row[11] is None and row[13] is not None}
            after, previous = after + len(rows), rows[-1][14]
    return _Checked(segment, sound=True, erased=erased)


async def _locate(connection: Connection, head: Record) -> Violation | None:
    """Return the first violation of a ledger that has one, diagnosed with the events after it."""
    tenant_id, last = head["tenant_id"], head["position"]
    after, previous = 0, GENESIS
    while after < last:
        rows = await audit.read_hash_links(connection, tenant_id, after, after + _BATCH_EVENTS)
        if check(rows, previous, after) or len(rows) < min(_BATCH_EVENTS, last - after):
            break
        after, previous = after + len(rows), rows[-1][14]
    rest = await audit.read_hash_links(connection, tenant_id, after, after + _DIAGNOSED_EVENTS)
    violation = check(rest, previous, after)
    position = after + len(rest) + 1
    if violation is not None or position > last:
        return violation
    if head["last"] > position:
        return Violation(position, "missing", "it and many events after it are missing")
    return Violation(position, "truncated", f"the ledger ends before it, but its head counts {last} events")


async def _ending(connection: Connection, head: Record) -> Violation | None:
    """Return a violation at the ledger's ends: events outside 1 … head, or a head with another hash."""
    if before := await audit.read_hash_links(connection, head["tenant_id"], -(2**63), 0):
        return Violation(before[0][1], "inserted", "ledgers begin with position 1")
    if head["last"] > head["position"]:
        return Violation(head["position"] + 1, "inserted", f"the ledger's head counts only {head['position']} events")
    if head["last"] == head["position"]:
        ends = await audit.read_hash(connection, head["tenant_id"], head["position"]) if head["position"] else GENESIS
        if ends != head["hash"]:
            return Violation(head["position"], "changed", "the ledger's head has another hash")
    return None


async def _unrecorded(connection: Connection, tenant_id: int, erased: dict[EventKey, int]) -> Violation | None:
    """Return the first event whose erasable text is gone although no redaction event names it."""
    if not erased:
        return None
    recorded = {
        (row["stream_kind"], row["stream_id"], version)
        for row in await audit.read_redactions(connection, tenant_id)
        for version in redacted_versions(row["data"])
    }
    return find_unrecorded_erasure(erased, recorded)


async def _anchored(connection: Connection, tenant_id: int, last: int, anchor: Anchor) -> Violation | None:
    if anchor.position > last:
        return Violation(
            last + 1, "truncated", f"the ledger ends before it; the anchor names position {anchor.position}"
        )
    found = await audit.read_hash(connection, tenant_id, anchor.position) if anchor.position else GENESIS
    if found is None or found.hex() != anchor.hash:
        return Violation(
            anchor.position, "changed", "it, or an event before it, differs from the one that the anchor names"
        )
    return None

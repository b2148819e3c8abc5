"""Rebuilding in processes of their own, one for each core that is to be used."""

import asyncio
import ctypes
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import uvloop

from opsentry.infrastructure.postgres import Database, DatabaseUnavailable
from opsentry.projections.engine.projection import Projection
from opsentry.projections.engine.rebuild import Rebuilder

# As many tenants as there may be.
_ALL = 2**31 - 1
_LOOK_SECONDS = 0.1
_WAIT_SECONDS = 0.5
# No request waits for a rebuild, so the database may take its time.
_TIMEOUT_SECONDS = 60.0


class RebuildProcessFailed(Exception):
    """A process that rebuilds has ended before it was done; what it was at is as it was."""


class Job(NamedTuple):
    """One of the processes: job `number` of `jobs`."""

    url: str
    projections: Sequence[Projection]
    tenant_id: int | None
    number: int
    jobs: int
    prepare: Callable[[], None]


async def rebuild(
    url: str,
    projections: Sequence[Projection],
    *,
    tenant_id: int | None = None,
    jobs: int,
    prepare: Callable[[], None],
    begin: Callable[[int, int], None] = lambda _tenants, _events: None,
    advance: Callable[[int], None] = lambda _events: None,
) -> None:
    """Derive the rows of all tenants, or of one, anew; go on with what is under way already.

    Args:
        url: The database.
        projections: Those whose rows are meant.
        tenant_id: One tenant; all if left out.
        jobs: Processes at once.
        prepare: Called in each of them, at its beginning; a function that can be pickled.
        begin: Called with the numbers of tenants and of events that are to be done.
        advance: Called with the number of events that were folded since it was last called.

    Raises:
        DatabaseUnavailable: The database was lost; what is not done is as it was.
        RebuildProcessFailed: A process was killed; what it was at is as it was.
    """
    database = Database(url, size=1, timeout_seconds=_TIMEOUT_SECONDS)
    await database.open()
    try:
        rebuilder = Rebuilder(database, projections)
        await rebuilder.begin(tenant_id)
        left = _of(await rebuilder.left(_ALL), tenant_id)
        begin(len(left), sum(left.values()))
        numbered = [Job(url, projections, tenant_id, number, jobs, prepare) for number in range(jobs)]
        if left and (codes := await _run(numbered, advance)):
            # Where the database is lost, this says so itself.
            undone = len(_of(await rebuilder.left(_ALL), tenant_id))
            ended = ", ".join(f"by signal {-code}" if code < 0 else f"with exit code {code}" for code in codes)
            raise RebuildProcessFailed(
                f"ended early: {ended}; {undone} tenants are left, and the same command goes on with them"
            )
    finally:
        await database.close()


def _of(left: dict[int, int], tenant_id: int | None) -> dict[int, int]:
    return left if tenant_id is None else {t: events for t, events in left.items() if t == tenant_id}


async def _run(jobs: Sequence[Job], advance: Callable[[int], None]) -> list[int]:
    """Run a process for each job; return the exit codes of those that failed."""
    # Spawned, not forked: a child must not inherit connections, nor an event loop.
    context = multiprocessing.get_context("spawn")
    # Each counts for itself, without a lock that one that is killed could take along.
    folded = [context.RawValue("q", 0) for _ in jobs]
    processes = [
        context.Process(target=_in_process, args=(job, count), daemon=True)
        for job, count in zip(jobs, folded, strict=True)
    ]
    try:
        # Ctrl-C reaches all processes of a terminal: the first one ends the others, which are born deaf to it.
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for process in processes:
                process.start()
        finally:
            signal.signal(signal.SIGINT, heard)
        told, running = 0, True
        while running:
            running = any(process.is_alive() for process in processes)
            now = sum(count.value for count in folded)
            advance(now - told)
            told = now
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
    return [process.exitcode for process in processes if process.exitcode]


def _in_process(job: Job, folded: "ctypes.c_longlong") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Whoever has to be answered goes first.
    os.nice(10)
    # Rows by the ten thousand, none of which refers to another: looking for cycles among them finds nothing.
    gc.set_threshold(100_000)
    job.prepare()

    def advance(events: int) -> None:
        folded.value += events

    try:
        uvloop.run(_work(job, advance))
    except DatabaseUnavailable:
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


async def _work(job: Job, advance: Callable[[int], None]) -> None:
    """Rebuild every so many-th tenant that is left, until none is: then the others' share too; each at most once."""
    database = Database(job.url, size=2, timeout_seconds=_TIMEOUT_SECONDS)
    await database.open()
    rebuilder = Rebuilder(database, job.projections)
    done: set[int] = set()
    while left := [t for t in _of(await rebuilder.left(_ALL), job.tenant_id) if t not in done]:
        before = len(done)
        for tenant_id in left[job.number % len(left) :: job.jobs]:
            try:
                if await rebuilder.rebuild(tenant_id, advance=advance):
                    done.add(tenant_id)
            except DatabaseUnavailable:
                raise
            except Exception:  # noqa: BLE001 - it is on record, among what is halted; the other tenants go on
                done.add(tenant_id)
        if len(done) == before:
            await asyncio.sleep(_WAIT_SECONDS)  # somebody else is at what is left
    await database.close()

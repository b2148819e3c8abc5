"""Rebuilding in processes of their own, one for each core that is to be used."""

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.sharedctypes import Synchronized
from typing import NamedTuple

import uvloop

from opsentry.postgres import Database, DatabaseUnavailable
from opsentry.projections.projection import Projection
from opsentry.projections.rebuild import Rebuilder

# As many tenants as there may be.
_ALL = 2**31 - 1
_LOOK_SECONDS = 0.1
_WAIT_SECONDS = 0.5


class JobFailed(Exception):
    """A process that rebuilds has died; what it was at is as it was."""


class Job(NamedTuple):
    """One of the processes: job `number` of `jobs`."""

    url: str
    projections: Sequence[Projection]
    tenant_id: int | None
    number: int
    jobs: int


async def rebuild(
    url: str,
    projections: Sequence[Projection],
    *,
    tenant_id: int | None = None,
    jobs: int = 1,
    begin: Callable[[int, int], None] = lambda _tenants, _events: None,
    advance: Callable[[int], None] = lambda _events: None,
) -> None:
    """Derive the rows of all tenants, or of one, anew; go on with what is under way already.

    Args:
        url: The database.
        projections: Those whose rows are meant.
        tenant_id: One tenant; all if left out.
        jobs: Processes at once.
        begin: Called with the numbers of tenants and of events that are to be done.
        advance: Called with the number of events that were folded since it was last called.

    Raises:
        DatabaseUnavailable: The database was lost; what is not done is as it was.
        JobFailed: A process was killed; what it was at is as it was.
    """
    database = Database(url, size=1)
    await database.open()
    try:
        rebuilder = Rebuilder(database, projections)
        await rebuilder.begin(tenant_id)
        left = _of(await rebuilder.left(_ALL), tenant_id)
        begin(len(left), sum(left.values()))
        if left:
            await _run([Job(url, projections, tenant_id, number, jobs) for number in range(jobs)], advance)
        # Here it is told why, where a process has failed because the database is lost.
        if _of(await rebuilder.left(_ALL), tenant_id):
            raise JobFailed("a process that rebuilds has died; the same command goes on where it was")
    finally:
        await database.close()


def _of(left: dict[int, int], tenant_id: int | None) -> dict[int, int]:
    return left if tenant_id is None else {t: events for t, events in left.items() if t == tenant_id}


async def _run(jobs: Sequence[Job], advance: Callable[[int], None]) -> None:
    # Spawned, not forked: a child must not inherit connections, nor an event loop.
    context = multiprocessing.get_context("spawn")
    folded: Synchronized[int] = context.Value("q", 0)
    processes = [context.Process(target=_in_process, args=(job, folded), daemon=True) for job in jobs]
    for process in processes:
        process.start()
    try:
        told = 0
        while told < folded.value or any(process.is_alive() for process in processes):
            now = folded.value
            advance(now - told)
            told = now
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        for process in processes:
            process.kill()


def _in_process(job: Job, folded: "Synchronized[int]") -> None:
    # Ctrl-C reaches all processes of a terminal: the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Whoever has to be answered goes first.
    os.nice(10)
    # Rows by the ten thousand, none of which refers to another: looking for cycles among them finds nothing.
    gc.set_threshold(100_000)

    def advance(events: int) -> None:
        with folded.get_lock():
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
    """Rebuild every so many-th tenant that is left, until none is: then the others' share too."""
    database = Database(job.url, size=2)
    await database.open()
    rebuilder = Rebuilder(database, job.projections)
    while left := _of(await rebuilder.left(_ALL), job.tenant_id):
        tenants = list(left)
        share = tenants[job.number % len(tenants) :: job.jobs]
        done = [await rebuilder.rebuild(tenant_id, advance=advance) for tenant_id in share]
        if not any(done):
            await asyncio.sleep(_WAIT_SECONDS)  # somebody else is at what is left
    await database.close()

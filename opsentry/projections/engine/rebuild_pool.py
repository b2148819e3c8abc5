"""Rebuild in several processes at once, one for each CPU core to be used."""

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

_NO_LIMIT = 2**31 - 1
PROGRESS_POLL_SECONDS = 0.1
BUSY_TENANTS_POLL_SECONDS = 0.5
# No request waits for a rebuild, so the database may take its time.
DATABASE_TIMEOUT_SECONDS = 60.0


class RebuildProcessFailed(Exception):
    """A rebuild process ended early; the rows of the tenants that it was rebuilding are unchanged."""


class RebuildJob(NamedTuple):
    """The share of one process: job `number` of `jobs`, counted from 0; `niceness` yields to other processes."""

    url: str
    projections: Sequence[Projection]
    tenant_id: int | None
    number: int
    jobs: int
    niceness: int
    prepare: Callable[[], None]


async def rebuild(
    url: str,
    projections: Sequence[Projection],
    *,
    tenant_id: int | None = None,
    jobs: int,
    niceness: int,
    prepare: Callable[[], None],
    on_start: Callable[[int, int], None] = lambda _tenants, _events: None,
    on_progress: Callable[[int], None] = lambda _events: None,
) -> None:
    """Rebuild projections of all tenants, or of one; an unfinished rebuild continues.

    Args:
        url: The database.
        projections: The projections to rebuild.
        tenant_id: One tenant; all if `None`.
        jobs: The number of processes.
        niceness: How far each process yields to others, from 0 to 19 (`nice(2)`).
        prepare: Called once in each process before it starts; a function that can be pickled.
        on_start: Called with the numbers of tenants and of events to rebuild.
        on_progress: Called with the number of events that were replayed since the previous call.

    Raises:
        DatabaseUnavailable: The database was lost; tenants that are not finished are unchanged.
        RebuildProcessFailed: A process ended early; tenants that are not finished are unchanged.
    """
    database = Database(url, size=1, timeout_seconds=DATABASE_TIMEOUT_SECONDS)
    await database.open()
    try:
        rebuilder = Rebuilder(database, projections)
        await rebuilder.request(tenant_id)
        pending = _of(await rebuilder.pending_tenants(_NO_LIMIT), tenant_id)
        on_start(len(pending), sum(pending.values()))
        shares = [RebuildJob(url, projections, tenant_id, number, jobs, niceness, prepare) for number in range(jobs)]
        if pending and (codes := await _run(shares, on_progress)):
            # If the database is lost, this query raises the better error.
            unfinished = len(_of(await rebuilder.pending_tenants(_NO_LIMIT), tenant_id))
            ended = ", ".join(f"by signal {-code}" if code < 0 else f"with exit code {code}" for code in codes)
            raise RebuildProcessFailed(
                f"a rebuild process ended {ended}; {unfinished} tenants are not rebuilt yet and keep their rows;"
                " run the same command again to continue"
            )
    finally:
        await database.close()


def _of(pending: dict[int, int], tenant_id: int | None) -> dict[int, int]:
    return pending if tenant_id is None else {t: events for t, events in pending.items() if t == tenant_id}


async def _run(jobs: Sequence[RebuildJob], on_progress: Callable[[int], None]) -> list[int]:
    """Run one process for each job; return the exit codes of those that failed."""
    # Spawned, not forked: a child process must not inherit connections nor an event loop.
    context = multiprocessing.get_context("spawn")
    # One counter for each process, without a lock: a killed process would keep the lock.
    counters = [context.RawValue("q", 0) for _ in jobs]
    processes = [
        context.Process(target=_run_job, args=(job, counter), daemon=True)
        for job, counter in zip(jobs, counters, strict=True)
    ]
    try:
        # A terminal sends Ctrl-C to all its processes. Children inherit the blocked signal; this process kills them.
        # A signal that arrives here meanwhile stays pending: ignoring it would lose it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for process in processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        reported, is_running = 0, True
        while is_running:
            is_running = any(process.is_alive() for process in processes)
            replayed = sum(counter.value for counter in counters)
            on_progress(replayed - reported)
            reported = replayed
            await asyncio.sleep(PROGRESS_POLL_SECONDS)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
    return [process.exitcode for process in processes if process.exitcode]


def _run_job(job: RebuildJob, replayed: "ctypes.c_longlong") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.nice(job.niceness)
    # Tens of thousands of rows without references to each other: a search for cycles finds nothing.
    gc.set_threshold(100_000)
    job.prepare()

    def on_progress(events: int) -> None:
        replayed.value += events

    try:
        uvloop.run(_rebuild_share(job, on_progress))
    except DatabaseUnavailable:
        raise SystemExit(1) from None


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


async def _rebuild_share(job: RebuildJob, on_progress: Callable[[int], None]) -> None:
    """Rebuild the job's share of the pending tenants, then help with the others'; each tenant at most once."""
    database = Database(job.url, size=2, timeout_seconds=DATABASE_TIMEOUT_SECONDS)
    await database.open()
    rebuilder = Rebuilder(database, job.projections)
    done: set[int] = set()
    while pending := [t for t in _of(await rebuilder.pending_tenants(_NO_LIMIT), job.tenant_id) if t not in done]:
        done_before = len(done)
        for tenant_id in pending[job.number % len(pending) :: job.jobs]:
            try:
                if await rebuilder.rebuild(tenant_id, on_progress=on_progress):
                    done.add(tenant_id)
            except DatabaseUnavailable:
                raise
            except Exception:  # noqa: BLE001 - the checkpoint records it; the other tenants continue
                done.add(tenant_id)
        if len(done) == done_before:
            await asyncio.sleep(BUSY_TENANTS_POLL_SECONDS)  # other processes are rebuilding the pending tenants
    await database.close()

"""Run background tasks so that a failure is logged and never ends the process or the tasks beside it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

from opsentry.infrastructure.postgres import is_transient

_log = structlog.get_logger()


def log_failure(task: str, error: Exception, **fields: object) -> None:
    """Log a failure that a later run may make good.

    The event is `task_deferred` with the error's text if the failure is transient, and `task_failed` with a traceback
    if it is a defect.

    Args:
        task: The task's name: stable, in snake case.
        error: Its failure.
        fields: More fields of the event, such as `tenant_id`.
    """
    if is_transient(error):
        _log.warning("task_deferred", task=task, error=str(error) or type(error).__name__, **fields)
    else:
        _log.error("task_failed", task=task, exc_info=error, **fields)


async def run_logged(task: Callable[..., Awaitable[None]], *arguments: object) -> bool:
    """Run a task once and log its failure. Returns whether it succeeded; a cancellation passes through."""
    try:
        await task(*arguments)
    except Exception as error:  # noqa: BLE001 - a defect of one task must not stop the others
        log_failure(_name_of(task), error)
        return False
    return True


async def run_forever(task: Callable[[], Awaitable[None]], *, pause_seconds: float) -> NoReturn:
    """Run a task until cancelled: log each failure, and start again after a pause whenever the task ends."""
    while True:
        await run_logged(task)
        await asyncio.sleep(pause_seconds)


def _name_of(task: Callable[..., Awaitable[None]]) -> str:
    return getattr(task, "__name__", type(task).__name__).lstrip("_")

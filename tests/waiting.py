"""Wait for events instead of sleeping, under one deadline for the whole suite."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# The deadline of everything that a test waits for, unless the test is about a timeout. It ends a test that hangs; a
# machine that is busy with other work must never reach it.
GENEROUS_SECONDS = 180.0

_POLL_SECONDS = 0.01


def stretched(seconds: float) -> float:
    """Return the bound of a promise about time: `seconds` on an idle machine, and longer on a busy one.

    The factor is the number of runnable tasks per core, now or averaged over the last minute.
    """
    runnable = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    return seconds * max(1.0, max(os.getloadavg()[0], runnable) / (os.cpu_count() or 1))


class Clock:
    """Stand in for the module `time` in a module under test; it moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the seconds that the test has set."""
        return self.now


async def until(condition: Callable[[], Awaitable[T]], seconds: float = GENEROUS_SECONDS) -> T:
    """Poll `condition` and return its first true result.

    Raises:
        TimeoutError: It was false for `seconds`.
    """
    async with asyncio.timeout(seconds):
        while not (result := await condition()):  # noqa: ASYNC110 - another process cannot set an event of this loop
            await asyncio.sleep(_POLL_SECONDS)
    return result

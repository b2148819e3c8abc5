"""Wait for events instead of sleeping, under one deadline for the whole suite."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

# The deadline of everything that a test waits for, unless the test is about a timeout. It ends a test that hangs; a
# machine that is busy with other work must never reach it.
GENEROUS_SECONDS = 180.0

_POLL_SECONDS = 0.01


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

"""What was looked up a moment ago, for the many who ask at once."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Keeps what was looked up for `seconds`, of the last `most` keys. Who asks meanwhile waits for the same."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._most = most
        self._kept: OrderedDict[K, tuple[float, asyncio.Task[V]]] = OrderedDict()

    async def get(self, key: K, look_up: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """Return what `look_up` gave within the last seconds, or gives now; raises as it does, and keeps no failure."""
        now = time.monotonic()
        until, task = self._kept.get(key, (0.0, None))
        if task is None or until <= now:
            # A task of its own: whoever asked first may be cancelled, the others still want to know.
            task = asyncio.create_task(look_up())
            # What is looked up is as old as the question, not as the answer.
            self._kept[key] = now + self._seconds, task
            self._kept.move_to_end(key)
            task.add_done_callback(lambda done: self._forget_failed(key, done))
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return task.result() if task.done() else await asyncio.shield(task)

    def _forget_failed(self, key: K, done: asyncio.Task[V]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._kept.get(key, (0.0, None))[1] is done:
            del self._kept[key]

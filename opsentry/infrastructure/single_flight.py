"""Share one answer among the callers that need it: a TTL cache with single flight, and a batch loader."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Iterable
from typing import Any, Generic, TypeAlias, TypeVar

G = TypeVar("G", bound=Hashable)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
D = TypeVar("D")

Load: TypeAlias = Callable[[K], Coroutine[Any, Any, V]]
LoadBatch: TypeAlias = Callable[[G, set[K]], Coroutine[Any, Any, V]]


class _Missing:
    """The type of `_MISSING`, since `None` may be a cached value."""


_MISSING = _Missing()


class TtlCache(Generic[K, V]):
    """Load each key at most once per TTL, however many callers ask for it.

    A caller joins the load of its key that is under way. A load is a task of its own, so a cancelled caller does not
    cancel it for the others. Its failure reaches all callers that joined and is not cached.

    Args:
        load: Returns the value of a key.
        ttl_seconds: A value's lifetime. It counts from the start of the load, since the value may be that old.
        max_entries: Number of values kept. Beyond it, the cache drops the value that was loaded first: it expires
            first too, and a hit need not move its entry, as it would in an LRU cache.
        ttl_of: Returns the lifetime of one value in seconds, counted from the end of its load. It can only shorten
            `ttl_seconds`.
    """

    def __init__(
        self,
        load: Load[K, V],
        *,
        ttl_seconds: float,
        max_entries: int,
        ttl_of: Callable[[V], float] | None = None,
    ) -> None:
        self._load = load
        self._ttl_seconds = ttl_seconds
        self._max_entries = max_entries
        self._ttl_of = ttl_of
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()  # with the time at which each expires
        self._loads: dict[K, asyncio.Task[V]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def peek(self, key: K, default: D) -> V | D:
        """Return the cached value, or `default` if there is none that is fresh. Loads nothing."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] > time.monotonic() else default

    async def get(self, key: K) -> V:
        """Return the cached value, or the one that a load returns; raises the load's error."""
        value = self.peek(key, _MISSING)
        if not isinstance(value, _Missing):
            return value
        task = self._loads.get(key)
        if task is None:
            task = asyncio.create_task(self._load_and_keep(key))
            self._loads[key] = task
            task.add_done_callback(lambda done: self._end_load(key, done))
        return await asyncio.shield(task)

    async def _load_and_keep(self, key: K) -> V:
        asked_at = time.monotonic()
        value = await self._load(key)
        expires_at = asked_at + self._ttl_seconds
        if self._ttl_of is not None:
            expires_at = min(expires_at, time.monotonic() + self._ttl_of(value))
        self._entries[key] = expires_at, value
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)
        return value

    def _end_load(self, key: K, task: asyncio.Task[V]) -> None:
        del self._loads[key]
        _mark_retrieved(task)


MAX_GATHERING_SECONDS = 0.05
"""How long a batch waits for the end of the group's load before it."""


class BatchLoader(Generic[G, K, V]):
    """Gather the keys that callers of one group ask for at the same time, and load them together.

    The calls that come while the group's load runs, for a short time at most, share the next one. It begins after all
    of them, so each sees every change that was committed before its call. A cancelled caller does not cancel the load
    for the others.

    Args:
        load: Returns the answer for a group and all keys gathered for it.
    """

    def __init__(self, load: LoadBatch[G, K, V]) -> None:
        self._load = load
        self._gathering: dict[G, tuple[set[K], asyncio.Task[V]]] = {}
        self._loading: dict[G, asyncio.Task[V]] = {}

    async def get(self, group: G, keys: Iterable[K]) -> V:
        """Return the answer for a batch that has at least these keys of the group; raises the load's error."""
        batch = self._gathering.get(group)
        if batch is None:
            gathered: set[K] = set()
            batch = gathered, asyncio.create_task(self._load_gathered(group, gathered))
            self._gathering[group] = batch
            batch[1].add_done_callback(lambda task: self._end_load(group, task))
        batch[0].update(keys)
        return await asyncio.shield(batch[1])

    async def _load_gathered(self, group: G, gathered: set[K]) -> V:
        # A new task starts in the loop's next turn, so the calls of one turn share it even if nothing runs.
        if (earlier := self._loading.get(group)) is not None:
            await asyncio.wait([earlier], timeout=MAX_GATHERING_SECONDS)
        # Later calls open the next batch.
        _, self._loading[group] = self._gathering.pop(group)
        return await self._load(group, gathered)

    def _end_load(self, group: G, task: asyncio.Task[V]) -> None:
        if self._loading.get(group) is task:
            del self._loading[group]
        _mark_retrieved(task)


def _mark_retrieved(task: "asyncio.Task[Any]") -> None:
    """Keep asyncio from logging a failure that no caller waits for any more."""
    if not task.cancelled():
        task.exception()

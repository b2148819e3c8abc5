import asyncio
from typing import Any

import pytest

from opsentry.infrastructure.single_flight import BatchLoader, TtlCache
from tests.waiting import GENEROUS_SECONDS


class Source:
    """Counts its loads, and ends each when the test releases it."""

    def __init__(self):
        self.loads: list[Any] = []
        self.released = asyncio.Event()
        self.released.set()
        self.fails = False

    async def load(self, *key):
        self.loads.append(key)
        number = len(self.loads)
        await self.released.wait()
        if self.fails:
            raise LookupError
        return number


@pytest.fixture
def source():
    return Source()


def make_cache(source, **options) -> TtlCache[Any, int]:
    return TtlCache(source.load, **{"ttl_seconds": 10, "max_entries": 10, **options})


async def started(source, count=1):
    """Return once this many loads are under way."""
    async with asyncio.timeout(GENEROUS_SECONDS):
        while len(source.loads) < count:  # noqa: ASYNC110 - the load itself must not signal
            await asyncio.sleep(0)


async def test_concurrent_callers_share_one_load(source):
    cache = make_cache(source)
    assert await asyncio.gather(*(cache.get("a") for _ in range(50))) == [1] * 50
    assert await cache.get("a") == 1
    assert await cache.get("b") == 2
    assert source.loads == [("a",), ("b",)]


async def test_a_caller_joins_a_load_that_outlasts_the_ttl(source, clock):
    cache = make_cache(source)
    source.released.clear()
    first = asyncio.create_task(cache.get("a"))
    await started(source)
    clock.now += 60
    second = asyncio.create_task(cache.get("a"))
    await asyncio.sleep(0)
    source.released.set()
    assert (await first, await second) == (1, 1)
    assert await cache.get("a") == 2


async def test_a_values_age_counts_from_the_start_of_its_load(source, clock):
    cache = make_cache(source)
    source.released.clear()
    first = asyncio.create_task(cache.get("a"))
    await started(source)
    clock.now += 4
    source.released.set()
    assert await first == 1
    clock.now += 5.9
    assert await cache.get("a") == 1
    clock.now += 0.2
    assert await cache.get("a") == 2


async def test_a_value_may_expire_before_the_ttl_but_not_after_it(source, clock):
    cache = make_cache(source, ttl_of={1: 3.0, 2: 99.0, 3: 0.0}.get)
    assert await cache.get("a") == 1
    clock.now += 3
    assert await cache.get("a") == 2
    clock.now += 10
    assert await cache.get("a") == 3
    assert cache.peek("a", None) is None


async def test_a_failure_reaches_every_caller_and_is_not_cached(source):
    cache = make_cache(source)
    source.fails = True
    answers = await asyncio.gather(*(cache.get("a") for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [LookupError] * 5
    source.fails = False
    assert await cache.get("a") == 2


async def test_a_cancelled_caller_does_not_cancel_the_load(source):
    cache = make_cache(source)
    source.released.clear()
    first, second = (asyncio.create_task(cache.get("a")) for _ in range(2))
    await started(source)
    first.cancel()
    source.released.set()
    assert await second == 1


async def test_a_load_without_callers_is_cached_and_its_failure_logs_nothing(source, caplog):
    cache = make_cache(source)
    for fails in (True, False):
        source.fails = fails
        source.released.clear()
        only = asyncio.create_task(cache.get("a"))
        await started(source, len(source.loads) + 1)
        only.cancel()
        await asyncio.wait([only])
        source.released.set()
        await asyncio.gather(*cache._loads.values(), return_exceptions=True)
    assert cache.peek("a", None) == 2
    assert not caplog.records


async def test_none_is_a_value(clock):
    asked = []

    async def load(key):
        asked.append(key)

    cache: TtlCache[str, None] = TtlCache(load, ttl_seconds=10, max_entries=10)
    assert cache.peek("a", "missing") == "missing"
    await cache.get("a")
    assert cache.peek("a", "missing") is None
    await cache.get("a")
    assert asked == ["a"]


async def test_the_cache_is_bounded_and_drops_the_oldest_load(source):
    cache = make_cache(source, max_entries=3)
    for number in range(10):
        await cache.get(number)
    assert len(cache) == 3
    assert [cache.peek(number, None) for number in range(6, 10)] == [None, 8, 9, 10]


async def test_calls_during_a_load_share_the_next_one(source):
    loader: BatchLoader[str, int, int] = BatchLoader(source.load)
    source.released.clear()
    first = [asyncio.create_task(loader.get("acme", [number, number + 1])) for number in range(3)]
    other = asyncio.create_task(loader.get("globex", [7]))
    await started(source, 2)
    later = []
    for number in (9, 10):
        later.append(asyncio.create_task(loader.get("acme", [number])))
        await asyncio.sleep(0)
    source.released.set()
    assert [await call for call in (*first, other, *later)] == [1, 1, 1, 2, 3, 3]
    assert source.loads == [("acme", {0, 1, 2, 3}), ("globex", {7}), ("acme", {9, 10})]


async def test_a_failed_load_is_followed_by_the_next():
    under_way = asyncio.Event()

    async def load(_group, keys):
        under_way.set()
        await asyncio.sleep(0)
        if 1 in keys:
            raise LookupError
        return len(keys)

    loader: BatchLoader[str, int, int] = BatchLoader(load)
    first = asyncio.create_task(loader.get("acme", [1]))
    await under_way.wait()
    assert await loader.get("acme", [2]) == 1
    with pytest.raises(LookupError):
        await first


async def test_a_batchs_failure_reaches_its_callers_alone(source):
    loader: BatchLoader[str, int, int] = BatchLoader(source.load)
    source.fails = True
    answers = await asyncio.gather(loader.get("acme", [1]), loader.get("acme", [2]), return_exceptions=True)
    assert [type(answer) for answer in answers] == [LookupError] * 2
    source.fails = False
    assert await loader.get("acme", [1]) == 2


async def test_a_cancelled_caller_does_not_cancel_the_batch(source):
    loader: BatchLoader[str, int, int] = BatchLoader(source.load)
    source.released.clear()
    first, second = (asyncio.create_task(loader.get("acme", [number])) for number in (1, 2))
    await started(source)
    first.cancel()
    source.released.set()
    assert await second == 1

import asyncio
from typing import Any

import pytest

from opsentry.infrastructure.single_flight import Recent


class Source:
    """Is asked, and counts how often."""

    def __init__(self):
        self.asked = 0
        self.fails = False

    async def ask(self):
        self.asked += 1
        answer = self.asked
        await asyncio.sleep(0.02)
        if self.fails:
            raise LookupError
        return answer


@pytest.fixture
def source():
    return Source()


async def test_many_who_ask_at_once_share_one_look_up(source):
    recent: Recent[Any, int] = Recent(10, 10)
    assert await asyncio.gather(*(recent.get("a", source.ask) for _ in range(50))) == [1] * 50
    assert await recent.get("a", source.ask) == 1
    assert await recent.get("b", source.ask) == 2


async def test_what_is_too_old_is_looked_up_again(source):
    recent: Recent[Any, int] = Recent(0.05, 10)
    assert await recent.get("a", source.ask) == 1
    await asyncio.sleep(0.05)
    assert await recent.get("a", source.ask) == 2


async def test_a_failure_is_told_to_all_and_not_kept(source):
    recent: Recent[Any, int] = Recent(10, 10)
    source.fails = True
    told = await asyncio.gather(*(recent.get("a", source.ask) for _ in range(5)), return_exceptions=True)
    assert [type(each) for each in told] == [LookupError] * 5
    source.fails = False
    assert await recent.get("a", source.ask) == 2


async def test_who_gives_up_does_not_take_the_answer_from_others(source):
    recent: Recent[Any, int] = Recent(10, 10)
    first = asyncio.create_task(recent.get("a", source.ask))
    second = asyncio.create_task(recent.get("a", source.ask))
    await asyncio.sleep(0.001)
    first.cancel()
    assert await second == 1


async def test_no_more_is_kept_than_said(source):
    recent: Recent[Any, int] = Recent(10, 3)
    for number in range(10):
        await recent.get(number, source.ask)
    assert len(recent._kept) == 3
    assert await recent.get(9, source.ask) == 10
    assert await recent.get(0, source.ask) == 11

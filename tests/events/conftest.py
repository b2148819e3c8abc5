from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import asyncpg
import pytest

from opsentry.settings import Settings
from tests.events import ledger

pytest.register_assert_rewrite("tests.events.store_contract")

Connect: TypeAlias = Callable[[], Awaitable[Any]]


@pytest.fixture
async def connect(settings: Settings) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def one_more() -> Any:
            connection = await asyncpg.connect(settings.database_url)
            stack.push_async_callback(connection.close, timeout=2)
            return connection

        yield one_more


@pytest.fixture
async def tenant(owner: Any) -> int:
    return await ledger.new_tenant(owner, "first")


@pytest.fixture
async def neighbour(owner: Any) -> int:
    return await ledger.new_tenant(owner, "second")

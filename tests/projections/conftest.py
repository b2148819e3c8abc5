from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from opsentry.settings import Settings
from tests.events.ledger import new_tenant
from tests.projections.histories import History


@pytest.fixture
async def history(owner: Any) -> History:
    """An empty history of a tenant that exists."""
    return History(await new_tenant(owner, "tenant"))


@pytest.fixture
async def other_history(owner: Any, history: History) -> History:
    return History(await new_tenant(owner, "other"))


@pytest.fixture
async def holder(settings: Settings) -> AsyncIterator[Any]:
    """One more connection of the application, to hold locks with."""
    connection = await asyncpg.connect(settings.database_url)
    yield connection
    await connection.close()

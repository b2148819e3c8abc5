from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import asyncpg
import pytest

from opsentry.domain import incident
from opsentry.domain.incident import OpenIncident, PostUpdate, RedactIncident
from opsentry.domain.redaction import RedactionPlan
from opsentry.settings import Settings
from tests import commands
from tests.conftest import META, make_tenant
from tests.events import ledger
from tests.events.tampering import (
    filled,
    unconstrained,
)

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


@pytest.fixture
async def tenant_id(owner, parts):
    return (await make_tenant(parts, "first")).id


@pytest.fixture
async def sound(owner, tenant_id):
    await filled(owner, tenant_id, 20)
    return tenant_id


@pytest.fixture
async def loose(owner):
    await unconstrained(owner)


@pytest.fixture
async def erased(parts, tenant_id):
    """A ledger with a recorded redaction of an incident's first message."""
    made = await commands.create(parts, incident.DECIDER, tenant_id, OpenIncident(title="T", description="D"), META)
    await commands.change(parts, incident.DECIDER, tenant_id, made.stream_id, PostUpdate(message="M"), META)
    plan = RedactionPlan(versions=(2,), fields=(), restated={})
    await commands.change(
        parts,
        incident.DECIDER,
        tenant_id,
        made.stream_id,
        RedactIncident(plan=plan, reason="Asked to"),
        META,
    )
    return tenant_id

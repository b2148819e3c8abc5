import json

import aiohttp
import pytest

from opsentry.bootstrap import core, serving
from tests.conftest import Client, make_tenant
from tests.importing.pages import load


@pytest.fixture
def file(real_history):
    return json.loads(real_history.read_text())


@pytest.fixture
async def page(settings, real_history):
    """Import the real history; return the core, the tenant, its client and the result."""
    async with core(settings) as parts, serving(settings, parts) as url, aiohttp.ClientSession() as session:
        tenant = await make_tenant(parts, "page")
        result = await load(parts, tenant.id, real_history)
        yield parts, tenant, Client(session, url, tenant.token), result

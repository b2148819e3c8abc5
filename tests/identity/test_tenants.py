import asyncio

import pytest

from opsentry.domain.decider import InvalidField
from opsentry.domain.identity import TenantCreated
from opsentry.events import store
from opsentry.identity import tenants
from opsentry.identity.tenants import SlugTaken, TenantNotFound
from tests.conftest import META


async def create(parts, slug, name="Initech"):
    async with parts.database.connection() as connection:
        return await tenants.create_tenant(connection, slug=slug, name=name, meta=META)


async def test_a_tenants_ledger_begins_with_its_creation(parts):
    tenant_id = await create(parts, "initech")
    async with parts.database.connection() as connection:
        (first,) = await store.read_after(connection, tenant_id, 0, 10)
        assert (await tenants.find_tenant(connection, "initech"))["tenant_id"] == tenant_id
        assert [row["slug"] for row in await tenants.list_tenants(connection)] == ["initech"]
    assert (first.position, first.event) == (1, TenantCreated(slug="initech", name="Initech"))


async def test_concurrent_creations_share_no_slug(parts, owner):
    answers = await asyncio.gather(*(create(parts, "initech") for _ in range(8)), return_exceptions=True)
    assert [type(answer) for answer in answers if not isinstance(answer, int)] == [SlugTaken] * 7
    assert await owner.fetchval("SELECT count(*) FROM events") == 1


@pytest.mark.parametrize("slug", ["", "-a", "a-", "A", "a b", "a_b", "é", "a\n", "a" * 64, "a/b"])
async def test_an_invalid_slug_is_refused(parts, owner, slug):
    with pytest.raises(InvalidField, match=r"^slug: "):
        await create(parts, slug)
    assert await owner.fetchval("SELECT count(*) FROM tenants") == 0


@pytest.mark.parametrize("name", ["", " ", "a\x00b", "x" * 301])
async def test_an_invalid_name_is_refused(parts, owner, name):
    with pytest.raises(InvalidField, match=r"^name: "):
        await create(parts, "initech", name)
    assert await owner.fetchval("SELECT count(*) FROM tenants") == 0


async def test_an_unknown_tenant_is_not_found(parts):
    async with parts.database.connection() as connection:
        with pytest.raises(TenantNotFound):
            await tenants.find_tenant(connection, "nobody")

"""Two tenants with equal ids never appear on each other's pages, and their links do not work for each other."""

import pytest

from opsentry.domain import subscription
from opsentry.domain.subscription import CreateSubscription
from opsentry.events.codec import Actor, Meta
from tests import commands
from tests.conftest import make_service
from tests.public.conftest import head, list_subscriptions, types_of

PURPOSES = ("confirm", "unsubscribe")


def canary(tenant):
    return f"canary-of-{tenant.slug}"


@pytest.fixture
async def pending(parts, acme, globex, owner):
    """The ids of one pending subscription of each tenant, by tenant id."""
    found = {}
    for tenant in (acme, globex):
        await owner.execute("UPDATE tenants SET name = $2 WHERE tenant_id = $1", tenant.id, canary(tenant))
        await make_service(parts, tenant.id, canary(tenant), name=f"Service {canary(tenant)}")
        command = CreateSubscription(channel="email", target=f"{canary(tenant)}@example.org", pending=True)
        result = await commands.create(parts, subscription.DECIDER, tenant.id, command, Meta(Actor("visitor")))
        await parts.projector.catch_up(tenant.id, result.position)
        found[tenant.id] = result.stream_id
    return found


async def test_no_page_contains_another_tenants_texts(browser, acme, globex, links, pending):
    assert pending[acme.id] == pending[globex.id]
    for own, other in ((acme, globex), (globex, acme)):
        responses = [
            await browser.get(f"/status/{own.slug}/subscribe"),
            await browser.get(f"/status/{own.slug}/subscribe/sent"),
            await browser.sign_up(own.slug, email="nobody"),
            *[
                await browser.send(method, f"/{purpose}/{links.token(purpose, own.id, pending[own.id])}")
                for purpose in PURPOSES
                for method in ("GET", "POST")
            ],
        ]
        for status, text, headers in responses:
            assert status in {200, 400}
            assert canary(own) in text
            assert canary(other) not in text + str(headers)


async def test_subscriptions_of_two_tenants_have_different_links(acme, globex, links, pending):
    for purpose in PURPOSES:
        assert links.token(purpose, acme.id, pending[acme.id]) != links.token(purpose, globex.id, pending[globex.id])


async def test_a_link_changes_only_its_own_tenant(browser, parts, acme, globex, links, pending):
    for own, other in ((acme, globex), (globex, acme)):
        before = await head(parts, other.id)
        for purpose in PURPOSES:
            status, _, _ = await browser.post(f"/{purpose}/{links.token(purpose, own.id, pending[own.id])}")
            assert status == 200
        assert await types_of(parts, own.id, pending[own.id]) == ["created", "confirmed", "removed", "redacted"]
        assert await head(parts, other.id) == before


async def test_a_sign_up_ignores_subscriptions_of_other_tenants(browser, api, parts, acme, globex, pending):
    before = await head(parts, globex.id)
    status, _, headers = await browser.sign_up(acme.slug, email=f"{canary(globex)}@example.org")
    assert (status, headers["Location"]) == (303, "subscribe/sent")
    targets = [subscription["target"] for subscription in await list_subscriptions(api)]
    assert targets == [f"{canary(globex)}@example.org", f"{canary(acme)}@example.org"]
    assert await head(parts, globex.id) == before

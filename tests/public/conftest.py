"""Give tests of the public pages a configured mail relay and a browser that follows no redirect."""

import re
from dataclasses import replace

import pytest

from opsentry.events import store
from opsentry.notifications.messages.links import SignedLinks
from tests.conftest import make_service

RELAY = "smtp://127.0.0.1:9"


@pytest.fixture
def settings(settings):
    """The usual settings with a mail relay, to which no test connects."""
    return replace(settings, smtp_url=RELAY)


class Browser:
    """Open pages; each method returns (status, text, headers)."""

    def __init__(self, http, base_url):
        self.http = http
        self.base_url = base_url

    async def send(self, method, path, **options):
        async with self.http.request(method, self.base_url + path, allow_redirects=False, **options) as response:
            return response.status, await response.text(), response.headers

    async def get(self, path, **options):
        return await self.send("GET", path, **options)

    async def post(self, path, data=None, **options):
        return await self.send("POST", path, data=data, **options)

    async def sign_up(self, slug="acme", email="jo@example.org", **fields):
        return await self.post(f"/status/{slug}/subscribe", {"email": email, **fields})


@pytest.fixture
def browser(http, base_url):
    return Browser(http, base_url)


@pytest.fixture
def links(settings):
    return SignedLinks(settings)


@pytest.fixture
async def portal(parts, acme):
    """A public service of acme."""
    return await make_service(parts, acme.id, "portal", name="Customer Portal")


async def list_subscriptions(api):
    """Return the tenant's subscriptions, newest first."""
    return (await api.get("/subscriptions"))[1]["subscriptions"]


async def history_of(parts, tenant_id, subscription_id):
    """Return the events of a subscription."""
    async with parts.database.connection() as connection:
        return await store.read_stream(connection, tenant_id, "subscription", subscription_id)


async def types_of(parts, tenant_id, subscription_id):
    """Return the types of a subscription's events, without their common prefix."""
    history = await history_of(parts, tenant_id, subscription_id)
    return [recorded.event.TYPE.removeprefix("subscription.") for recorded in history]


async def head(parts, tenant_id):
    async with parts.database.connection() as connection:
        return await store.read_head_position(connection, tenant_id)


def heading(text):
    """Return the text of a page's only `h1`."""
    (found,) = re.findall(r"<h1>(.*?)</h1>", text, re.DOTALL)
    return re.sub("<[^>]*>", "", found)

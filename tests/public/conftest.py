"""What the tests of pages start from: a mail relay that is set up, and a browser that follows nothing."""

import re
from dataclasses import replace

import pytest

from opsentry.events import store
from opsentry.notifications.messages.links import SignedLinks
from tests.conftest import make_service

RELAY = "smtp://127.0.0.1:9"


@pytest.fixture
def settings(settings):
    """The usual settings, with a mail relay: it is never dialled here."""
    return replace(settings, smtp_url=RELAY)


class Browser:
    """Opens pages; answers (status, text, headers)."""

    def __init__(self, http, base_url):
        self.http = http
        self.base_url = base_url

    async def send(self, method, path, **options):
        async with self.http.request(method, self.base_url + path, allow_redirects=False, **options) as answer:
            return answer.status, await answer.text(), answer.headers

    async def get(self, path, **options):
        return await self.send("GET", path, **options)

    async def post(self, path, data=None, **options):
        return await self.send("POST", path, data=data, **options)

    async def ask(self, slug="acme", email="jo@example.org", **fields):
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


async def subscribed(api):
    """The tenant's subscriptions, the newest first."""
    return (await api.get("/subscriptions"))[1]["subscriptions"]


async def told(parts, tenant_id, number):
    """What the ledger has of a subscription."""
    async with parts.database.connection() as connection:
        return await store.read_stream(connection, tenant_id, "subscription", number)


async def types(parts, tenant_id, number):
    return [recorded.event.TYPE.removeprefix("subscription.") for recorded in await told(parts, tenant_id, number)]


async def head(parts, tenant_id):
    async with parts.database.connection() as connection:
        return await store.read_head_position(connection, tenant_id)


def heading(text):
    """What a page says above all."""
    (found,) = re.findall(r"<h1>(.*?)</h1>", text, re.DOTALL)
    return re.sub("<[^>]*>", "", found)

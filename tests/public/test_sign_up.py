import asyncio
import html
from dataclasses import replace
from ipaddress import ip_network

import pytest

from opsentry.application.sign_up import RESEND_AFTER_SECONDS, ExistingSubscription, decide_sign_up
from opsentry.bootstrap import serving
from opsentry.domain import service
from opsentry.domain.service import RetireService
from opsentry.infrastructure.redis import connect
from opsentry.public import sign_up
from tests import commands
from tests.conftest import META, make_service
from tests.public.conftest import Browser, head, heading, history_of, list_subscriptions, types_of
from tests.waiting import GENEROUS_SECONDS

SENT = "subscribe/sent"


async def test_a_subscription_is_pending_until_its_owner_confirms(browser, api, parts, acme, portal, links):
    status, text, _ = await browser.get("/status/acme/subscribe")
    assert (status, heading(text)) == (200, "Get status updates by email")
    assert "Acme" in text
    assert "Customer Portal" in text

    fields = {"services": "selected", "service_id": [str(portal)], "min_severity": "major_outage"}
    status, text, headers = await browser.sign_up(**fields)
    assert (status, text, headers["Location"]) == (303, "", SENT)
    status, text, _ = await browser.get("/status/acme/subscribe/sent")
    assert (status, heading(text)) == (200, "Check your inbox")

    (made,) = await list_subscriptions(api)
    asked = ("channel", "target", "audience", "service_ids", "min_severity", "status")
    assert [made[name] for name in asked] == ["email", "jo@example.org", "public", [portal], "major_outage", "pending"]
    (created,) = await history_of(parts, acme.id, made["id"])
    assert (created.meta.actor.kind, created.meta.actor.id) == ("visitor", None)
    assert created.meta.request_id == headers["X-Request-ID"]
    assert not created.meta.silent

    confirm = f"/confirm/{links.token('confirm', acme.id, made['id'])}"
    status, text, _ = await browser.get(confirm)
    assert (status, '<form method="post">' in text) == (200, True)
    assert (await browser.send("HEAD", confirm))[0] == 200
    assert await types_of(parts, acme.id, made["id"]) == ["created"]
    for _ in range(2):
        status, text, _ = await browser.post(confirm)
        assert (status, heading(text)) == (200, "You are subscribed")
    assert heading((await browser.get(confirm))[1]) == "You are subscribed"
    assert await types_of(parts, acme.id, made["id"]) == ["created", "confirmed"]
    assert [found["status"] for found in await list_subscriptions(api)] == ["active"]


async def test_the_default_is_all_services_and_all_incidents(browser, api, portal):
    assert (await browser.sign_up())[0] == 303
    # Services that stay checked after a change to "all" are ignored.
    assert (await browser.sign_up(email="b@example.org", services="all", service_id=[str(portal)]))[0] == 303
    for created in await list_subscriptions(api):
        assert (created["service_ids"], created["min_severity"]) == ([], "informational")
        assert (created["notify_incidents"], created["notify_maintenance"]) == (True, True)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"email": ""}, "Enter your email address"),
        ({"email": "nobody"}, "Your email address must be in the form name@example.com"),
        ({"email": "a@b\x00.org"}, "Your email address must end with a domain"),
        ({"email": '"><script>alert(1)</script>@example.org'}, "Your email address must be in the form"),
        ({"email": f"{'a' * 300}@example.org"}, "at most 254 characters"),
        ({"services": "selected"}, "Select at least one service"),
        ({"services": "others"}, "Select at least one service"),
        ({"services": "selected", "service_id": "x"}, "Select at least one service"),
        ({"min_severity": "bad"}, "Select which incidents"),
    ],
)
async def test_an_error_is_explained_and_the_other_fields_are_kept(browser, parts, acme, portal, fields, says):
    before = await head(parts, acme.id)
    status, text, _ = await browser.sign_up(**{"email": "kept@example.org", "min_severity": "critical", **fields})
    assert status == 400
    assert says in text
    assert 'role="alert"' in text
    assert f'value="{html.escape(fields.get("email", "kept@example.org"))}"' in text.replace("&#34;", "&quot;")
    assert ('value="critical" selected' in text) == ("min_severity" not in fields)
    assert "<script" not in text
    assert await head(parts, acme.id) == before


async def test_an_error_keeps_the_selected_services(browser, portal):
    status, text, _ = await browser.sign_up(email="nobody", services="selected", service_id=[str(portal)])
    assert status == 400
    assert f'name="service_id" value="{portal}" checked' in text
    assert 'value="selected" checked' in text


async def test_only_public_services_of_the_tenant_can_be_selected(browser, api, parts, acme, globex, portal):
    hidden = await make_service(parts, acme.id, "admin", name="Admin Tools", visibility="internal")
    foreign = [await make_service(parts, globex.id, f"shop-{n}", name="Globex Shop") for n in range(4)][-1]
    gone = await make_service(parts, acme.id, "old", name="Old Thing")
    executed = await commands.change(parts, service.DECIDER, acme.id, gone, RetireService(), META)
    await parts.projector.catch_up(acme.id, executed.position)
    _, text, _ = await browser.get("/status/acme/subscribe")
    assert text.count('name="service_id"') == 1
    said = set()
    for number in (hidden, foreign, gone, 987654321):
        status, text, _ = await browser.sign_up(services="selected", service_id=[str(portal), str(number)])
        assert status == 400
        said.add(text)
    assert len(said) == 1
    assert await list_subscriptions(api) == []


async def test_the_response_does_not_reveal_who_is_subscribed(browser, api, parts, acme, links, monkeypatch):
    await api.post("/subscriptions", {"channel": "email", "target": "told@example.org"})
    answers = set()
    began = asyncio.get_running_loop().time()
    for email in ("told@example.org", "new@example.org", "new@example.org"):
        status, text, headers = await browser.sign_up(email=email)
        shown = {name: value for name, value in headers.items() if name not in {"X-Request-ID", "Date"}}
        answers.add((status, text, tuple(shown.items())))
    assert asyncio.get_running_loop().time() - began >= 3 * sign_up.MIN_RESPONSE_SECONDS
    assert len(answers) == 1
    assert [found["target"] for found in await list_subscriptions(api)] == ["new@example.org", "told@example.org"]

    # A later sign-up sends a new email, and the link of the older one becomes invalid.
    monkeypatch.setattr("opsentry.application.sign_up.RESEND_AFTER_SECONDS", 0)
    (before, _) = await list_subscriptions(api)
    assert (await browser.sign_up(email="new@example.org"))[0] == 303
    (after, _) = await list_subscriptions(api)
    assert (after["target"], after["status"], after["id"] > before["id"]) == ("new@example.org", "pending", True)
    assert await types_of(parts, acme.id, before["id"]) == ["created", "removed", "redacted"]
    status, text, _ = await browser.post(f"/confirm/{links.token('confirm', acme.id, before['id'])}")
    assert (status, heading(text)) == (410, "This link is no longer valid")
    assert (await browser.sign_up(email="told@example.org"))[0] == 303
    assert len(await list_subscriptions(api)) == 2


async def test_simultaneous_sign_ups_create_one_subscription(browser, api):
    answers = await asyncio.gather(*(browser.sign_up() for _ in range(5)))
    assert [status for status, _, _ in answers] == [303] * 5
    assert len(await list_subscriptions(api)) == 1


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        ([], []),
        ([(1, "disabled", 0.0)], []),
        ([(1, "active", 1e9)], None),
        ([(1, "pending", RESEND_AFTER_SECONDS - 1.0)], None),
        ([(1, "pending", float(RESEND_AFTER_SECONDS))], [1]),
        ([(3, "pending", 1e4), (2, "disabled", 1e5), (1, "pending", 1e6)], [3, 1]),
        ([(2, "pending", 1e4), (1, "active", 1e5)], None),
    ],
)
def test_a_sign_up_creates_a_subscription_unless_one_is_active_or_just_requested(existing, expected):
    assert decide_sign_up([ExistingSubscription(*each) for each in existing]) == expected


async def test_a_disabled_subscription_does_not_prevent_a_sign_up(browser, api):
    _, made, _ = await api.post("/subscriptions", {"channel": "email", "target": "jo@example.org"})
    await api.patch(f"/subscriptions/{made['id']}", {"enabled": False})
    await browser.sign_up()
    assert [found["status"] for found in await list_subscriptions(api)] == ["pending", "disabled"]


@pytest.mark.parametrize("slug", ["initech", "ACME", "a b", "%00", "..%2f", "é"])
async def test_an_unknown_tenant_has_no_page(browser, acme, slug):
    for status, text, headers in (
        await browser.get(f"/status/{slug}/subscribe"),
        await browser.sign_up(slug=slug),
        await browser.get(f"/status/{slug}/subscribe/sent"),
    ):
        assert (status, headers.getone("Content-Type")) == (404, "text/html; charset=utf-8")
        assert heading(text) == "Page not found"


@pytest.mark.parametrize("lacks", [{"smtp_url": ""}, {"encryption_keys": ()}])
async def test_without_an_email_channel_there_is_no_form(http, settings, parts, acme, lacks):
    async with serving(replace(settings, **lacks), parts) as url:
        browser = Browser(http, url)
        for expected, (status, text, _) in (
            (200, await browser.get("/status/acme/subscribe")),
            (503, await browser.sign_up()),
        ):
            assert (status, heading(text)) == (expected, "Email updates are not available")
            assert "<form" not in text
    assert await head(parts, acme.id) == 2


@pytest.fixture
async def _empty_buckets(valkey):
    """Forget the requests of other tests: they all come from one address."""
    client = connect(valkey.url, GENEROUS_SECONDS)
    await client.flushdb()
    await client.aclose()


@pytest.mark.usefixtures("_empty_buckets")
async def test_pages_are_rate_limited_by_address_and_unsubscribing_is_not(http, settings, parts, acme, links):
    async with serving(replace(settings, rate_limit="3/minute"), parts) as url:
        browser = Browser(http, url)
        answers = [await browser.get("/status/acme/subscribe") for _ in range(4)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 429]
        assert int(answers[-1][2]["Retry-After"]) <= 60
        # Mail providers send the one-click requests of many people from few addresses.
        unsubscribe = f"/unsubscribe/{links.token('unsubscribe', acme.id, 1)}"
        assert [(await browser.post(unsubscribe))[0] for _ in range(5)] == [404] * 5


@pytest.mark.usefixtures("_empty_buckets")
async def test_sign_ups_are_rate_limited_by_address(http, settings, parts, acme):
    own = replace(settings, subscribe_rate_limit="3/hour", trusted_proxies=(ip_network("127.0.0.0/8"),))
    async with serving(own, parts) as url:
        browser = Browser(http, url)

        async def sign_up_from(number, address):
            return await browser.post(
                "/status/acme/subscribe",
                {"email": f"{number}@example.org"},
                headers={"X-Forwarded-For": f"1.2.3.4, {address}"},
            )

        assert (await browser.sign_up(email="wrong"))[0] == 400
        answers = [await sign_up_from(number, "203.0.113.9") for number in range(5)]
        assert [status for status, _, _ in answers] == [303, 303, 303, 429, 429]
        _, text, headers = answers[-1]
        assert heading(text) == "Too many requests"
        assert "You can try again in 60 minutes." in text
        assert 3000 < int(headers["Retry-After"]) <= 3600
        assert (await sign_up_from(9, "203.0.113.10"))[0] == 303


async def test_a_body_that_is_no_form_is_refused(browser, parts, acme):
    path = "/status/acme/subscribe"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert (await browser.send("POST", path, json={"email": "jo@example.org"}))[0] == 415
    assert (await browser.post(path))[0] == 415
    assert (await browser.post(path, b"email=%ff%fe", headers=form))[0] == 400
    assert (await browser.post(path, b"\xff\xfe", headers=form))[0] == 400
    assert (await browser.post(path, b"a=1&" * 5000, headers=form))[0] == 400
    assert (await browser.post(path, b"a" * 70_000, headers=form))[0] == 413
    assert (await browser.post(path, b"", headers=form))[0] == 400
    assert await head(parts, acme.id) == 2

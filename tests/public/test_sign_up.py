import asyncio
import html
from dataclasses import replace
from ipaddress import ip_network

import pytest

from opsentry.bootstrap import serving
from opsentry.domain import service
from opsentry.domain.service import RetireService
from opsentry.infrastructure.redis import connect
from opsentry.public import sign_up
from tests.conftest import META, make_service
from tests.public.conftest import Browser, head, heading, subscribed, told, types
from tests.waiting import GENEROUS_SECONDS

SENT = "subscribe/sent"


async def test_whoever_asks_is_pending_until_they_agree(browser, api, parts, acme, portal, links):
    status, text, _ = await browser.get("/status/acme/subscribe")
    assert (status, heading(text)) == (200, "Get e-mail updates")
    assert "Acme" in text
    assert "Customer Portal" in text

    fields = {"which": "some", "service": [str(portal)], "severity": "major_outage"}
    status, text, headers = await browser.ask(**fields)
    assert (status, text, headers["Location"]) == (303, "", SENT)
    status, text, _ = await browser.get("/status/acme/subscribe/sent")
    assert (status, heading(text)) == (200, "Look in your mailbox")

    (made,) = await subscribed(api)
    asked = ("channel", "target", "audience", "service_ids", "min_severity", "status")
    assert [made[name] for name in asked] == ["email", "jo@example.org", "public", [portal], "major_outage", "pending"]
    (created,) = await told(parts, acme.id, made["id"])
    assert (created.meta.actor.kind, created.meta.actor.id) == ("visitor", None)
    assert created.meta.request_id == headers["X-Request-ID"]
    assert not created.meta.silent

    confirm = f"/confirm/{links.token('confirm', acme.id, made['id'])}"
    status, text, _ = await browser.get(confirm)
    assert (status, '<form method="post">' in text) == (200, True)
    assert (await browser.send("HEAD", confirm))[0] == 200
    assert await types(parts, acme.id, made["id"]) == ["created"]
    for _ in range(2):
        status, text, _ = await browser.post(confirm)
        assert (status, heading(text)) == (200, "You are subscribed")
    assert heading((await browser.get(confirm))[1]) == "You are subscribed"
    assert await types(parts, acme.id, made["id"]) == ["created", "confirmed"]
    assert [found["status"] for found in await subscribed(api)] == ["active"]


async def test_all_services_are_meant_where_none_is_chosen(browser, api, portal):
    assert (await browser.ask())[0] == 303
    # Those ticked before the mind was changed do not count.
    assert (await browser.ask(email="b@example.org", which="all", service=[str(portal)]))[0] == 303
    for made in await subscribed(api):
        assert (made["service_ids"], made["min_severity"]) == ([], "informational")
        assert (made["notify_incidents"], made["notify_maintenance"]) == (True, True)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"email": ""}, "e-mail address such as"),
        ({"email": "nobody"}, "e-mail address such as"),
        ({"email": "a@b\x00.org"}, "e-mail address"),
        ({"email": '"><script>alert(1)</script>@example.org'}, "e-mail address"),
        ({"email": f"{'a' * 300}@example.org"}, "at most 254 characters"),
        ({"which": "some"}, "Choose at least one service"),
        ({"which": "others"}, "Choose at least one service"),
        ({"which": "some", "service": "x"}, "Choose at least one service"),
        ({"severity": "bad"}, "Choose one of the list"),
    ],
)
async def test_what_cannot_be_used_is_said_and_the_rest_is_kept(browser, parts, acme, portal, fields, says):
    before = await head(parts, acme.id)
    status, text, _ = await browser.ask(**{"email": "kept@example.org", "severity": "critical", **fields})
    assert status == 400
    assert says in text
    assert 'role="alert"' in text
    assert f'value="{html.escape(fields.get("email", "kept@example.org"))}"' in text.replace("&#34;", "&quot;")
    assert ('value="critical" selected' in text) == ("severity" not in fields)
    assert "<script" not in text
    assert await head(parts, acme.id) == before


async def test_the_choice_of_services_is_kept(browser, portal):
    status, text, _ = await browser.ask(email="nobody", which="some", service=[str(portal)])
    assert status == 400
    assert f'name="service" value="{portal}" checked' in text
    assert 'value="some" checked' in text


async def test_only_public_services_of_the_tenant_are_there(browser, api, parts, acme, globex, portal):
    hidden = await make_service(parts, acme.id, "admin", name="Admin Tools", visibility="internal")
    foreign = await make_service(parts, globex.id, "shop", name="Globex Shop")
    gone = await make_service(parts, acme.id, "old", name="Old Thing")
    executed = await parts.commands.execute(service.DECIDER, acme.id, gone, RetireService(), META)
    await parts.projector.catch_up(acme.id, executed.position)
    _, text, _ = await browser.get("/status/acme/subscribe")
    assert text.count('name="service"') == 1
    said = set()
    for number in (hidden, foreign, gone, 987654321):
        status, text, _ = await browser.ask(which="some", service=[str(portal), str(number)])
        assert status == 400
        said.add(text)
    assert len(said) == 1
    assert await subscribed(api) == []


async def test_nobody_learns_who_is_subscribed(browser, api, parts, acme, links, monkeypatch):
    await api.post("/subscriptions", {"channel": "email", "target": "told@example.org"})
    answers = set()
    began = asyncio.get_running_loop().time()
    for email in ("told@example.org", "new@example.org", "new@example.org"):
        status, text, headers = await browser.ask(email=email)
        shown = {name: value for name, value in headers.items() if name not in {"X-Request-ID", "Date"}}
        answers.add((status, text, tuple(shown.items())))
    assert asyncio.get_running_loop().time() - began >= 3 * sign_up.ANSWER_SECONDS
    assert len(answers) == 1
    assert [found["target"] for found in await subscribed(api)] == ["new@example.org", "told@example.org"]

    # Who asks again later is sent another e-mail: the link of the one before is good no longer.
    monkeypatch.setattr(sign_up, "PATIENCE_SECONDS", 0)
    (before, _) = await subscribed(api)
    assert (await browser.ask(email="new@example.org"))[0] == 303
    (after, _) = await subscribed(api)
    assert (after["target"], after["status"], after["id"] > before["id"]) == ("new@example.org", "pending", True)
    assert await types(parts, acme.id, before["id"]) == ["created", "removed", "redacted"]
    status, text, _ = await browser.post(f"/confirm/{links.token('confirm', acme.id, before['id'])}")
    assert (status, heading(text)) == (410, "This link is no longer good")
    assert (await browser.ask(email="told@example.org"))[0] == 303
    assert len(await subscribed(api)) == 2


async def test_an_impatient_click_asks_once(browser, api):
    answers = await asyncio.gather(*(browser.ask() for _ in range(5)))
    assert [status for status, _, _ in answers] == [303] * 5
    assert len(await subscribed(api)) == 1


async def test_whom_the_tenant_no_longer_tells_may_ask_anew(browser, api):
    _, made, _ = await api.post("/subscriptions", {"channel": "email", "target": "jo@example.org"})
    await api.patch(f"/subscriptions/{made['id']}", {"enabled": False})
    await browser.ask()
    assert [found["status"] for found in await subscribed(api)] == ["pending", "disabled"]


@pytest.mark.parametrize("slug", ["initech", "ACME", "a b", "%00", "..%2f", "é"])
async def test_a_tenant_that_there_is_not(browser, acme, slug):
    for status, text, headers in (
        await browser.get(f"/status/{slug}/subscribe"),
        await browser.ask(slug=slug),
        await browser.get(f"/status/{slug}/subscribe/sent"),
    ):
        assert (status, headers.getone("Content-Type")) == (404, "text/html; charset=utf-8")
        assert heading(text) == "There is no such page"


@pytest.mark.parametrize("lacks", [{"smtp_url": ""}, {"encryption_keys": ()}])
async def test_where_no_email_is_set_up_there_is_no_form(http, settings, parts, acme, lacks):
    async with serving(replace(settings, **lacks), parts) as url:
        browser = Browser(http, url)
        for expected, (status, text, _) in (
            (200, await browser.get("/status/acme/subscribe")),
            (503, await browser.ask()),
        ):
            assert (status, heading(text)) == (expected, "No e-mail is set up here")
            assert "<form" not in text
    assert await head(parts, acme.id) == 2


@pytest.fixture
async def _empty_buckets(valkey):
    """All tests come from one address."""
    client = connect(valkey.url, GENEROUS_SECONDS)
    await client.flushdb()
    await client.aclose()


@pytest.mark.usefixtures("_empty_buckets")
async def test_too_many_pages_opened_from_one_address(http, settings, parts, acme, links):
    async with serving(replace(settings, rate_limit="3/minute"), parts) as url:
        browser = Browser(http, url)
        answers = [await browser.get("/status/acme/subscribe") for _ in range(4)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 429]
        assert int(answers[-1][2]["Retry-After"]) <= 60
        # Mail programs unsubscribe many people from few addresses.
        unsubscribe = f"/unsubscribe/{links.token('unsubscribe', acme.id, 1)}"
        assert [(await browser.post(unsubscribe))[0] for _ in range(5)] == [404] * 5


@pytest.mark.usefixtures("_empty_buckets")
async def test_too_many_wishes_from_one_address(http, settings, parts, acme):
    own = replace(settings, subscribe_rate_limit="3/hour", trusted_proxies=(ip_network("127.0.0.0/8"),))
    async with serving(own, parts) as url:
        browser = Browser(http, url)

        async def ask(number, address):
            return await browser.post(
                "/status/acme/subscribe",
                {"email": f"{number}@example.org"},
                headers={"X-Forwarded-For": f"1.2.3.4, {address}"},
            )

        assert (await browser.ask(email="wrong"))[0] == 400
        answers = [await ask(number, "203.0.113.9") for number in range(5)]
        assert [status for status, _, _ in answers] == [303, 303, 303, 429, 429]
        _, text, headers = answers[-1]
        assert heading(text) == "Too many tries"
        assert 3000 < int(headers["Retry-After"]) <= 3600
        assert (await ask(9, "203.0.113.10"))[0] == 303


async def test_what_is_no_form_is_refused(browser, parts, acme):
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

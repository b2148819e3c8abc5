import pytest

from opsentry.domain import subscription
from opsentry.domain.subscription import CreateSubscription
from opsentry.events.codec import Actor, Meta
from tests import commands
from tests.public.conftest import head, heading, history_of, list_subscriptions, types_of

ONE_CLICK = {"List-Unsubscribe": "One-Click"}


@pytest.fixture
async def pending(parts, acme):
    """The id of a subscription that awaits confirmation."""
    command = CreateSubscription(channel="email", target="jo@example.org", pending=True)
    result = await commands.create(parts, subscription.DECIDER, acme.id, command, Meta(Actor("visitor")))
    return result.stream_id


@pytest.mark.parametrize("form", [None, ONE_CLICK, "multipart"])
async def test_unsubscribing_removes_the_subscription_and_repeats_its_answer(
    browser, api, parts, acme, pending, links, form
):
    path = f"/unsubscribe/{links.token('unsubscribe', acme.id, pending)}"
    await browser.post(f"/confirm/{links.token('confirm', acme.id, pending)}")
    status, text, _ = await browser.get(path)
    assert (status, '<form method="post">' in text) == (200, True)
    assert heading(text) == "Unsubscribe from Acme status updates?"
    assert (await browser.send("HEAD", path))[0] == 200
    assert await types_of(parts, acme.id, pending) == ["created", "confirmed"]

    options = {"data": form}
    if form == "multipart":
        body = '--x\r\nContent-Disposition: form-data; name="List-Unsubscribe"\r\n\r\nOne-Click\r\n--x--\r\n'
        options = {"data": body.encode(), "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    for _ in range(2):
        status, text, headers = await browser.send("POST", path, **options)
        assert (status, heading(text)) == (200, "You are unsubscribed")
        assert "Set-Cookie" not in headers
    assert heading((await browser.get(path))[1]) == "You are unsubscribed"
    assert await list_subscriptions(api) == []
    history = await history_of(parts, acme.id, pending)
    assert [recorded.event.TYPE for recorded in history[2:]] == ["subscription.removed", "subscription.redacted"]
    assert history[2].event.unsubscribed
    assert history[2].meta.actor.kind == "visitor"
    assert history[0].event.target == "[redacted]"


async def test_links_of_a_removed_subscription_say_that_it_has_ended(browser, api, acme, pending, links):
    await api.delete(f"/subscriptions/{pending}")
    confirm = f"/confirm/{links.token('confirm', acme.id, pending)}"
    for status, text, _ in (await browser.get(confirm), await browser.post(confirm)):
        assert (status, heading(text)) == (410, "This link is no longer valid")
        assert 'href="../status/acme/subscribe"' in text
    unsubscribe = f"/unsubscribe/{links.token('unsubscribe', acme.id, pending)}"
    for status, text, _ in (await browser.get(unsubscribe), await browser.post(unsubscribe)):
        assert (status, heading(text)) == (200, "You are unsubscribed")


async def test_a_confirmation_does_not_enable_a_disabled_subscription(browser, api, acme, pending, links):
    confirm = f"/confirm/{links.token('confirm', acme.id, pending)}"
    assert (await browser.post(confirm))[0] == 200
    await api.patch(f"/subscriptions/{pending}", {"enabled": False})
    for status, text, _ in (await browser.get(confirm), await browser.post(confirm)):
        assert (status, heading(text)) == (410, "This link is no longer valid")


async def test_invalid_tokens_open_no_page(browser, parts, acme, globex, pending, links):
    before = await head(parts, acme.id)
    confirm, unsubscribe = (links.token(purpose, acme.id, pending) for purpose in ("confirm", "unsubscribe"))
    altered = confirm[:-1] + ("A" if confirm[-1] != "A" else "B")
    for path in (
        f"/confirm/{unsubscribe}",
        f"/unsubscribe/{confirm}",
        f"/confirm/{altered}",
        f"/confirm/{confirm}=",
        f"/confirm/{confirm[:-4]}",
        "/confirm/x",
        "/unsubscribe/%00",
        "/unsubscribe/é",
        f"/confirm/{links.token('confirm', 987654321, pending)}",
    ):
        for method in ("GET", "POST"):
            status, text, headers = await browser.send(method, path)
            assert (status, heading(text)) == (404, "Page not found"), path
            assert headers["X-Request-ID"] in text
    # Signed with our key, but for subscriptions that never existed: there is no button, and POST does nothing.
    for path in (
        f"/confirm/{links.token('confirm', globex.id, 987654321)}",
        f"/unsubscribe/{links.token('unsubscribe', acme.id, 987654321)}",
    ):
        assert "<form" not in (await browser.get(path))[1]
        assert (await browser.post(path))[0] == 404
    assert await head(parts, acme.id) == before


async def test_links_work_after_the_tenant_is_renamed(browser, parts, acme, pending, links, owner):
    await owner.execute("UPDATE tenants SET slug = 'emca', name = 'Emca' WHERE tenant_id = $1", acme.id)
    status, text, _ = await browser.post(f"/unsubscribe/{links.token('unsubscribe', acme.id, pending)}")
    assert (status, "Emca" in text) == (200, True)
    assert 'href="../status/emca/subscribe"' in text
    assert await types_of(parts, acme.id, pending) == ["created", "removed", "redacted"]

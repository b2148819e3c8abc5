import pytest

from opsentry.domain import subscription
from opsentry.domain.subscription import CreateSubscription
from opsentry.events.codec import Actor, Meta
from tests.public.conftest import head, heading, subscribed, told, types

ONE_CLICK = {"List-Unsubscribe": "One-Click"}


@pytest.fixture
async def wish(parts, acme):
    """The id of a subscription that waits for its confirmation."""
    command = CreateSubscription(channel="email", target="jo@example.org", pending=True)
    executed = await parts.commands.create(subscription.DECIDER, acme.id, command, Meta(Actor("visitor")))
    return executed.stream_id


@pytest.mark.parametrize("form", [None, ONE_CLICK, "multipart"])
async def test_one_click_unsubscribes_and_again_answers_the_same(browser, api, parts, acme, wish, links, form):
    path = f"/unsubscribe/{links.token('unsubscribe', acme.id, wish)}"
    await browser.post(f"/confirm/{links.token('confirm', acme.id, wish)}")
    status, text, _ = await browser.get(path)
    assert (status, '<form method="post">' in text) == (200, True)
    assert (await browser.send("HEAD", path))[0] == 200
    assert await types(parts, acme.id, wish) == ["created", "confirmed"]

    options = {"data": form}
    if form == "multipart":
        body = '--x\r\nContent-Disposition: form-data; name="List-Unsubscribe"\r\n\r\nOne-Click\r\n--x--\r\n'
        options = {"data": body.encode(), "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    for _ in range(2):
        status, text, headers = await browser.send("POST", path, **options)
        assert (status, heading(text)) == (200, "You are not subscribed any more")
        assert "Set-Cookie" not in headers
    assert heading((await browser.get(path))[1]) == "You are not subscribed any more"
    assert await subscribed(api) == []
    history = await told(parts, acme.id, wish)
    assert [recorded.event.TYPE for recorded in history[2:]] == ["subscription.removed", "subscription.redacted"]
    assert history[2].event.unsubscribed
    assert history[2].meta.actor.kind == "visitor"
    assert history[0].event.target == "[redacted]"


async def test_the_page_of_what_was_removed(browser, api, acme, wish, links):
    await api.delete(f"/subscriptions/{wish}")
    confirm = f"/confirm/{links.token('confirm', acme.id, wish)}"
    for status, text, _ in (await browser.get(confirm), await browser.post(confirm)):
        assert (status, heading(text)) == (410, "This link is no longer good")
    unsubscribe = f"/unsubscribe/{links.token('unsubscribe', acme.id, wish)}"
    for status, text, _ in (await browser.get(unsubscribe), await browser.post(unsubscribe)):
        assert (status, heading(text)) == (200, "You are not subscribed any more")


async def test_confirming_what_the_tenant_has_disabled_since(browser, api, acme, wish, links):
    confirm = f"/confirm/{links.token('confirm', acme.id, wish)}"
    assert (await browser.post(confirm))[0] == 200
    await api.patch(f"/subscriptions/{wish}", {"enabled": False})
    for status, text, _ in (await browser.get(confirm), await browser.post(confirm)):
        assert (status, heading(text)) == (410, "This link is no longer good")


async def test_tokens_of_others_open_nothing(browser, parts, acme, globex, wish, links):
    before = await head(parts, acme.id)
    confirm, unsubscribe = (links.token(purpose, acme.id, wish) for purpose in ("confirm", "unsubscribe"))
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
        f"/confirm/{links.token('confirm', 987654321, wish)}",
    ):
        for method in ("GET", "POST"):
            status, text, headers = await browser.send(method, path)
            assert (status, heading(text)) == (404, "There is no such page"), path
            assert headers["X-Request-ID"] in text
    # Made with our key, but for what never was: no button, and nothing to press.
    for path in (
        f"/confirm/{links.token('confirm', globex.id, wish)}",
        f"/unsubscribe/{links.token('unsubscribe', acme.id, 987654321)}",
    ):
        assert "<form" not in (await browser.get(path))[1]
        assert (await browser.post(path))[0] == 404
    assert await head(parts, acme.id) == before


async def test_it_works_whatever_the_tenant_is_called_now(browser, parts, acme, wish, links, owner):
    await owner.execute("UPDATE tenants SET slug = 'emca', name = 'Emca' WHERE tenant_id = $1", acme.id)
    status, text, _ = await browser.post(f"/unsubscribe/{links.token('unsubscribe', acme.id, wish)}")
    assert (status, "Emca" in text) == (200, True)
    assert await types(parts, acme.id, wish) == ["created", "removed", "redacted"]

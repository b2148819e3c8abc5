import smtplib
import time
from asyncio import to_thread
from email.message import EmailMessage

import pytest
from standardwebhooks.webhooks import Webhook

from opsentry.demo import sink as sinks
from opsentry.demo.sink import sink
from opsentry.notifications.messages.signing import new_secret, signatures

BODY = b'{"type": "incident.opened", "data": {"title": "<script>alert(1)</script>"}}'


def signed(secret, *, at=None, body=BODY):
    sent_at = int(time.time()) if at is None else at
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(sent_at),
        "webhook-signature": signatures([secret], "msg_1", sent_at, body),
    }


@pytest.fixture
async def made():
    async with sink(mailbox=True) as running:
        running.secrets.append(new_secret())
        yield running


async def test_a_webhook_is_kept_and_verified(made, http):
    (secret,) = made.secrets
    headers = signed(secret)
    Webhook(secret).verify(BODY.decode(), headers)
    for sent in (headers, signed(new_secret()), signed(secret, at=int(time.time()) - 301), None):
        async with http.post(f"{made.url}/hook/any/path", data=BODY, headers=sent) as answer:
            assert answer.status == 204
    async with http.get(f"{made.url}/arrived.json") as answer:
        hooks = (await answer.json())["webhooks"]
    assert [hook["verified"] for hook in hooks] == [False, False, False, True]
    last = hooks[-1]
    assert (last["id"], last["type"], last["path"]) == ("msg_1", "incident.opened", "/hook/any/path")
    assert last["body"]["data"] == {"title": "<script>alert(1)</script>"}
    async with http.get(f"{made.url}/") as answer:
        shown = await answer.text()
    assert "<script" not in shown
    assert shown.count("The signature verifies.") == 1


async def test_an_email_is_kept_with_its_links(made, http):
    letter = EmailMessage()
    letter["Subject"], letter["From"], letter["To"] = "Grüße", "a@example.org", "b@example.org"
    letter["References"] = "<thread@example.org>"
    letter.set_content("See http://127.0.0.1/confirm/x and <b>this</b>.")
    letter.add_alternative("<p>See</p>", subtype="html")

    def send():
        with smtplib.SMTP("127.0.0.1", int(made.smtp_url.rpartition(":")[2])) as relay:
            relay.send_message(letter)

    await to_thread(send)
    async with http.get(f"{made.url}/arrived.json") as answer:
        (kept,) = (await answer.json())["emails"]
    assert (kept["to"], kept["subject"], kept["references"]) == ("b@example.org", "Grüße", "<thread@example.org>")
    assert kept["html"].strip() == "<p>See</p>"
    async with http.get(f"{made.url}/") as answer:
        shown = await answer.text()
    assert 'href="http://127.0.0.1/confirm/x"' in shown
    assert "<b>" not in shown


async def test_only_the_last_ones_are_kept(made, http):
    for number in range(sinks.KEPT + 2):
        async with http.post(f"{made.url}/slack/x", json={"text": str(number)}) as answer:
            assert answer.status == 200
    async with http.post(f"{made.url}/slack", data=b"\xffno JSON") as answer:
        assert answer.status == 200
    assert len(made.slack) == sinks.KEPT
    assert [one["body"] for one in list(made.slack)[:2]] == ["\ufffdno JSON", {"text": str(sinks.KEPT + 1)}]
    async with http.get(f"{made.url}/") as answer:
        assert answer.status == 200


async def test_without_a_mailbox_there_is_none():
    async with sink(mailbox=False) as running:
        assert (running.smtp_url, running.url != "") == ("", True)


async def test_it_comes_back_to_where_it_was_if_that_is_free():
    async with sink(mailbox=False) as first:
        port = int(first.url.rpartition(":")[2])
        async with sink(mailbox=False, port=port) as other:
            assert other.url != first.url
    async with sink(mailbox=False, port=port) as again:
        assert again.url == first.url

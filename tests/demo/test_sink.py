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
    """Return the headers of a webhook that `secret` signed."""
    sent_at = int(time.time()) if at is None else at
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(sent_at),
        "webhook-signature": signatures([secret], "msg_1", sent_at, body),
    }


@pytest.fixture
async def running():
    async with sink(mailbox=True) as running:
        running.secrets.append(new_secret())
        yield running


async def test_a_webhook_is_kept_and_its_signature_verified(running, http):
    (secret,) = running.secrets
    headers = signed(secret)
    Webhook(secret).verify(BODY.decode(), headers)
    for sent in (headers, signed(new_secret()), signed(secret, at=int(time.time()) - 301), None):
        async with http.post(f"{running.url}/hook/any/path", data=BODY, headers=sent) as response:
            assert response.status == 204
    async with http.get(f"{running.url}/arrived.json") as response:
        webhooks = (await response.json())["webhooks"]
    assert [webhook["verified"] for webhook in webhooks] == [False, False, False, True]
    first = webhooks[-1]
    assert (first["id"], first["type"], first["path"]) == ("msg_1", "incident.opened", "/hook/any/path")
    assert first["body"]["data"] == {"title": "<script>alert(1)</script>"}
    async with http.get(f"{running.url}/") as response:
        page = await response.text()
    assert "<script" not in page
    assert page.count("Valid signature") == 1


async def test_an_email_is_kept_with_its_links(running, http):
    email = EmailMessage()
    email["Subject"], email["From"], email["To"] = "Grüße", "a@example.org", "b@example.org"
    email["Message-ID"], email["References"] = "<msg_1@example.org>", "<thread@example.org>"
    email.set_content("See http://127.0.0.1/confirm/x and <b>this</b>.")
    email.add_alternative("<p>See</p>", subtype="html")

    def send():
        with smtplib.SMTP("127.0.0.1", int(running.smtp_url.rpartition(":")[2])) as relay:
            relay.send_message(email)

    await to_thread(send)
    async with http.get(f"{running.url}/arrived.json") as response:
        (kept,) = (await response.json())["emails"]
    assert (kept["to"], kept["subject"], kept["references"]) == ("b@example.org", "Grüße", "<thread@example.org>")
    assert kept["html"].strip() == "<p>See</p>"
    async with http.get(f"{running.url}/") as response:
        page = await response.text()
    assert 'href="http://127.0.0.1/confirm/x"' in page
    assert "<b>" not in page
    assert 'href="/emails/%3Cmsg_1%40example.org%3E"' in page
    async with http.get(f"{running.url}/emails/%3Cmsg_1%40example.org%3E") as response:
        assert (response.status, (await response.text()).strip()) == (200, "<p>See</p>")
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    async with http.get(f"{running.url}/emails/none") as response:
        assert response.status == 404


async def test_only_the_newest_messages_are_kept(running, http):
    for number in range(sinks.MAX_MESSAGES + 2):
        async with http.post(f"{running.url}/slack/x", json={"text": str(number)}) as response:
            assert response.status == 200
    async with http.post(f"{running.url}/slack", data=b"\xffno JSON") as response:
        assert response.status == 200
    assert len(running.slack) == sinks.MAX_MESSAGES
    newest = [message["body"] for message in list(running.slack)[:2]]
    assert newest == ["\ufffdno JSON", {"text": str(sinks.MAX_MESSAGES + 1)}]
    async with http.get(f"{running.url}/") as response:
        assert response.status == 200


async def test_the_page_refreshes_until_it_is_paused(running, http):
    for path, refreshes in (("/", True), ("/?paused", False)):
        async with http.get(running.url + path) as response:
            assert ('http-equiv="refresh"' in await response.text()) == refreshes


async def test_a_sink_without_a_mailbox_has_no_smtp_url():
    async with sink(mailbox=False) as running:
        assert (running.smtp_url, running.url != "") == ("", True)


async def test_a_sink_takes_the_preferred_port_if_it_is_free():
    async with sink(mailbox=False) as first:
        port = int(first.url.rpartition(":")[2])
        async with sink(mailbox=False, port=port) as other:
            assert other.url != first.url
    async with sink(mailbox=False, port=port) as again:
        assert again.url == first.url

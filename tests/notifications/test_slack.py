import msgspec
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from opsentry.notifications.channel import BadTarget, Outcome
from opsentry.notifications.channels import Dependencies, channels, slack
from opsentry.notifications.channels.slack import _payload
from opsentry.notifications.transport.egress import http_session
from opsentry.settings import Settings
from tests.notifications.conftest import LOOPBACK, answering
from tests.notifications.messages import endpoint, incident, message, update, window

_HOOK = "https://hooks.slack.com/services/T00000000/B00000000/abcdefghijklmnopqrstuvwx"


def checked(payload):
    """Return the payload after the checks that Slack makes."""
    assert 0 < len(payload["text"]) <= 4000
    assert len(payload["blocks"]) <= 50
    for block in payload["blocks"]:
        match block["type"]:
            case "header":
                assert 0 < len(block["text"]["text"]) <= 150
                assert "\n" not in block["text"]["text"]
            case "section":
                assert 0 < len(block["text"]["text"]) <= 3000
            case "context":
                assert 0 < len(block["elements"][0]["text"]) <= 3000
    return payload


async def test_slack_receives_text_and_blocks():
    received = []

    async def answer(request):
        received.append((request.content_type, await request.json()))
        return web.Response(text="ok")

    async with answering(answer) as url, http_session(LOOPBACK, 10) as http:
        channel = slack.make(Dependencies(Settings(webhook_allowed_networks=LOOPBACK), http))
        assert await channel.send(endpoint(url), message()) == Outcome(response_status=200)
        await channel.close()
    ((content_type, payload),) = received
    assert content_type == "application/json"
    assert payload == {
        "text": "[Acme] Investigating: Checkout is slow\n"
        "\n"
        "2026-03-01 12:30 UTC\n"
        "We are looking into it.\n"
        "\n"
        "About this incident\n"
        "Payments take long.\n"
        "\n"
        "Severity: Major outage\n"
        "Started: 2026-03-01 12:30 UTC\n"
        "Affected services: Checkout",
        "blocks": [
            {"type": "header", "text": {"type": "plain_text", "text": "Investigating: Checkout is slow"}},
            {
                "type": "section",
                "text": {"type": "mrkdwn", "text": "*2026-03-01 12:30 UTC*\nWe are looking into it."},
            },
            {"type": "section", "text": {"type": "mrkdwn", "text": "*About this incident*\nPayments take long."}},
            {
                "type": "section",
                "text": {
                    "type": "mrkdwn",
                    "text": "*Severity:* Major outage\n*Started:* 2026-03-01 12:30 UTC\n*Affected services:* Checkout",
                },
            },
            {"type": "context", "elements": [{"type": "mrkdwn", "text": "Acme"}]},
        ],
    }


def test_a_message_mentions_nobody_and_contains_no_link():
    hostile = "<!channel> <https://evil.example|click> & co @channel @All @here"
    subject = incident(title=hostile, description=hostile, updates=[update(42, hostile, author=hostile)])
    payload = _payload(message(subject, tenant={"slug": "acme", "name": hostile}))
    texts = [payload["text"], payload["blocks"][-1]["elements"][0]["text"]]
    *sections, facts = (block["text"]["text"] for block in payload["blocks"] if block["type"] == "section")
    assert "<" not in facts
    texts += sections
    for text in texts:
        assert "&lt;!channel&gt;" in text
        assert "<" not in text
        assert not any(mention in text for mention in ("@channel", "@All", "@here"))
        assert "@\u200bchannel" in text


def test_maintenance_and_test_messages_have_a_text_and_blocks():
    payload = checked(_payload(message(window(), "maintenance", type="maintenance.started")))
    assert payload["text"].startswith("[Acme] Maintenance started: Database upgrade\n")
    assert "*Scheduled start:* 2026-03-01 12:30 UTC" in payload["blocks"][1]["text"]["text"]
    payload = checked(_payload(message({"id": 8}, "subscription", type="subscription.test")))
    assert payload["text"] == (
        "[Acme] Test message\n"
        "\n"
        "This is a test message. Your subscription to Acme status updates works. No service is affected."
    )


@settings(max_examples=40, deadline=None)
@given(
    st.text(min_size=1), st.text(min_size=1), st.sampled_from(["&", "x", "@all ", "\U0001f525"]), st.integers(1, 50_000)
)
def test_texts_and_blocks_keep_slacks_limits(title, name, character, times):
    words = (name + character) * times
    services = [{"id": n, "slug": "s", "name": (name + character) * 100} for n in range(60)]
    subject = incident(title=title * 20, description=words[:50_000], services=services, updates=[update(42, words)])
    checked(_payload(message(subject, tenant={"slug": "acme", "name": name})))


@pytest.mark.parametrize(
    ("target", "displayed"),
    [
        (_HOOK, "https://hooks.slack.com/services/…uvwx"),
        ("https://hooks.slack.com/services/short", "https://hooks.slack.com/services/…"),
        ("https://chat.example.com:8443/hooks/abcdefghijklmnopqrstuvwxyz", "https://chat.example.com:8443/…wxyz"),
        ("https://chat.example.com/?key=abcdefghijklmnopqrstuvwxyz", "https://chat.example.com/…wxyz"),
        ("https://chat.example.com", "https://chat.example.com/…"),
    ],
)
def test_a_target_is_displayed_in_part(target, displayed):
    channel = slack.make(Dependencies(Settings(), None))  # type: ignore[arg-type]
    assert (channel.name, channel.signs_messages, channel.has_secret_target) == ("slack", False, True)
    assert channel.validate_target(target) == target
    assert channel.display_target(target) == displayed
    with pytest.raises(BadTarget):
        channel.validate_target("https://127.0.0.1/services/x")


async def test_a_refusal_by_slack_is_a_failure():
    async def answer(request):
        return web.Response(status=int(request.query["status"]), headers={"Retry-After": "30"})

    async with answering(answer) as url, http_session(LOOPBACK, 10) as http:
        channel = slack.make(Dependencies(Settings(webhook_allowed_networks=LOOPBACK), http))
        limited = await channel.send(endpoint(f"{url}/?status=429"), message())
        assert limited == Outcome("answered 429", 429, retry_after=30)
        assert (await channel.send(endpoint(f"{url}/?status=410"), message())).endpoint_gone


def test_every_module_of_the_package_is_a_channel():
    found = channels(Dependencies(Settings(), None))  # type: ignore[arg-type]
    assert set(found) == {"webhook", "slack", "email"}
    assert all(msgspec.json.encode(channel.display_target("https://a.example/")) for channel in found.values())

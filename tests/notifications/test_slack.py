import msgspec
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from opsentry.notifications.channel import BadTarget, Outcome
from opsentry.notifications.channels import Dependencies, channels, slack
from opsentry.notifications.channels.slack import _content
from opsentry.notifications.transport.egress import http_session
from opsentry.settings import Settings
from tests.notifications.conftest import LOOPBACK, answering
from tests.notifications.messages import endpoint, incident, message, update, window

_HOOK = "https://hooks.slack.com/services/T00000000/B00000000/abcdefghijklmnopqrstuvwx"


def checked(content):
    """What Slack would refuse is found here."""
    assert content["text"]
    assert len(content.get("blocks", ())) <= 50
    for block in content.get("blocks", ()):
        match block["type"]:
            case "header":
                assert 0 < len(block["text"]["text"]) <= 150
                assert "\n" not in block["text"]["text"]
            case "section":
                assert 0 < len(block["text"]["text"]) <= 3000
            case "context":
                assert 0 < len(block["elements"][0]["text"]) <= 3000
    return content


async def test_what_slack_gets():
    seen = []

    async def answer(request):
        seen.append((request.content_type, await request.json()))
        return web.Response(text="ok")

    async with answering(answer) as url, http_session(LOOPBACK, 10) as http:
        channel = slack.make(Dependencies(Settings(webhook_allowed_networks=LOOPBACK), http))
        assert await channel.send(endpoint(url), message()) == Outcome(response_status=200)
        await channel.close()
    ((content_type, content),) = seen
    assert content_type == "application/json"
    assert content == {
        "text": "New incident: Checkout is slow (investigating)",
        "blocks": [
            {"type": "header", "text": {"type": "plain_text", "text": "New incident: Checkout is slow"}},
            {
                "type": "section",
                "text": {
                    "type": "mrkdwn",
                    "text": "*Status:* investigating\n*Severity:* major outage\n*Affects:* Checkout",
                },
            },
            {
                "type": "section",
                "text": {"type": "mrkdwn", "text": "*2026-03-01 12:30 UTC:*\nWe are looking into it."},
            },
            {"type": "section", "text": {"type": "mrkdwn", "text": "Payments take long."}},
            {"type": "context", "elements": [{"type": "mrkdwn", "text": "Acme"}]},
        ],
    }


def test_nobody_is_mentioned_and_nothing_linked():
    hostile = "<!channel> <https://evil.example|click> & co"
    subject = incident(title=hostile, description=hostile, updates=[update(42, hostile, author=hostile)])
    content = _content(message(subject, tenant={"slug": "acme", "name": hostile}))
    said = content["text"] + "".join(block["text"]["text"] for block in content["blocks"] if block["type"] == "section")
    assert "&lt;!channel&gt;" in said
    assert "<" not in said
    assert "<" not in content["blocks"][-1]["elements"][0]["text"]


def test_maintenance_and_tests_are_told_too():
    content = checked(_content(message(window(), "maintenance", type="maintenance.started")))
    assert content["text"] == "Maintenance has begun: Database upgrade (scheduled)"
    assert "*Begins:* 2026-03-01 12:30 UTC" in content["blocks"][1]["text"]["text"]
    test = _content(message({"id": 8}, "subscription", type="subscription.test"))
    assert test == {"text": "Acme: This is a test: messages reach you"}


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1), st.text(min_size=1), st.sampled_from(["&", "x", "\U0001f525"]), st.integers(1, 50_000))
def test_blocks_are_never_too_long(title, name, character, times):
    words = (name + character) * times
    services = [{"id": n, "slug": "s", "name": (name + character) * 100} for n in range(60)]
    subject = incident(title=title * 20, description=words[:50_000], services=services, updates=[update(42, words)])
    checked(_content(message(subject, tenant={"slug": "acme", "name": name})))


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        (_HOOK, "https://hooks.slack.com/services/…uvwx"),
        ("https://hooks.slack.com/services/short", "https://hooks.slack.com/services/…"),
        ("https://chat.example.com:8443/hooks/abcdefghijklmnopqrstuvwxyz", "https://chat.example.com:8443/…wxyz"),
        ("https://chat.example.com/?key=abcdefghijklmnopqrstuvwxyz", "https://chat.example.com/…wxyz"),
        ("https://chat.example.com", "https://chat.example.com/…"),
    ],
)
def test_a_target_is_shown_in_part(target, shown):
    channel = slack.make(Dependencies(Settings(), None))  # type: ignore[arg-type]
    assert (channel.name, channel.signs_messages, channel.has_secret_target) == ("slack", False, True)
    assert channel.validate_target(target) == target
    assert channel.display_target(target) == shown
    with pytest.raises(BadTarget):
        channel.validate_target("https://127.0.0.1/services/x")


async def test_what_slack_refuses_is_a_failure():
    async def answer(request):
        return web.Response(status=int(request.query["status"]), headers={"Retry-After": "30"})

    async with answering(answer) as url, http_session(LOOPBACK, 10) as http:
        channel = slack.make(Dependencies(Settings(webhook_allowed_networks=LOOPBACK), http))
        limited = await channel.send(endpoint(f"{url}/?status=429"), message())
        assert limited == Outcome("answered 429", 429, retry_after=30)
        assert (await channel.send(endpoint(f"{url}/?status=410"), message())).endpoint_gone


def test_every_channel_is_found_by_being_there():
    found = channels(Dependencies(Settings(), None))  # type: ignore[arg-type]
    assert set(found) == {"webhook", "slack", "email"}
    assert all(msgspec.json.encode(channel.display_target("https://a.example/")) for channel in found.values())

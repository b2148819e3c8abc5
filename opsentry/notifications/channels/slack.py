"""Send messages to Slack's incoming webhooks, and to services that accept the same JSON, such as Mattermost.

Protocol: https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks
Limits: https://docs.slack.dev/reference/block-kit/blocks
Escaping: https://docs.slack.dev/messaging/formatting-message-text
"""

import re
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from opsentry.notifications.channel import Channel, Endpoint, Message, Outcome
from opsentry.notifications.channels import Dependencies
from opsentry.notifications.messages import text
from opsentry.notifications.transport.egress import check_url
from opsentry.notifications.transport.http import post
from opsentry.settings import Network

# Slack's limits, in characters.
_MAX_TEXT = 4_000
_MAX_HEADER = 150
_MAX_SECTION = 3_000
# Ours: a section holds a label and a text, and must not exceed Slack's limit.
_MAX_FACT = 1_000
_MAX_LABEL = 200
_MAX_PARAGRAPH = _MAX_SECTION - 2 * _MAX_LABEL

_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_MAX_ESCAPE = 5
# Mattermost and Rocket.Chat notify a whole channel about these words, even in a webhook's text.
_MENTION = re.compile(r"@(?=(?:all|channel|here|everyone)\b)", re.IGNORECASE)
_ZERO_WIDTH_SPACE = "\u200b"

_VISIBLE_CHARACTERS = 4
_MIN_SECRET_CHARACTERS = 20
# All of Slack's own webhooks begin with this path, so it is no secret.
_SLACK_PATH = "/services/"


def make(parts: Dependencies) -> Channel:
    """Return the channel `slack`."""
    return Slack(parts.http, parts.settings.webhook_allowed_networks)


class Slack:
    """Post text and blocks to a URL that is itself a secret."""

    name = "slack"
    signs_messages = False
    has_secret_target = True
    max_concurrency: int | None = None

    def __init__(self, http: aiohttp.ClientSession, webhook_allowed_networks: tuple[Network, ...]) -> None:
        self._http = http
        self._allowed_networks = webhook_allowed_networks

    def validate_target(self, target: str) -> str:
        """Return the URL unchanged.

        Raises:
            BadTarget: The URL is malformed or its address is blocked.
        """
        return check_url(target, self._allowed_networks)

    def display_target(self, target: str) -> str:
        """Return the origin and the last four characters; a short secret is hidden whole."""
        url = URL(target)
        prefix = _SLACK_PATH if url.raw_path.startswith(_SLACK_PATH) else "/"
        secret = url.raw_path_qs.removeprefix(prefix)
        visible = secret[-_VISIBLE_CHARACTERS:] if len(secret) >= _MIN_SECRET_CHARACTERS else ""
        return f"{url.origin()}{prefix}…{visible}"

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Post one message."""
        return await post(self._http, endpoint.target, msgspec.json.encode(_payload(message)))

    async def close(self) -> None:
        """Do nothing: the HTTP session belongs to the caller."""


def _payload(message: Message) -> dict[str, Any]:
    """Return the JSON of one message.

    `text` holds the whole message, because Mattermost ignores `blocks`; Slack shows `blocks` and uses `text` in
    notifications.
    """
    tenant, headline = text.tenant_name(message), text.headline(message)
    paragraphs = text.paragraphs(message)
    facts = () if message.type == text.TEST else tuple(text.facts(message))
    lines = [f"[{tenant}] {headline}"]
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": text.shorten(headline, _MAX_HEADER)}}
    ]
    for paragraph in paragraphs:
        label = "" if paragraph.label is None else paragraph.label
        lines += ["", *filter(None, [label]), paragraph.text]
        bold = [f"*{_escape(label, _MAX_LABEL)}*"] if label else []
        blocks.append(_section(*bold, _escape(paragraph.text, _MAX_PARAGRAPH)))
    if facts:
        lines += ["", *(f"{name}: {value}" for name, value in facts)]
        blocks.append(_section(*(f"*{name}:* {_escape(value, _MAX_FACT)}" for name, value in facts)))
    blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": _escape(tenant, _MAX_SECTION)}]})
    return {"text": _escape("\n".join(lines), _MAX_TEXT), "blocks": blocks}


def _section(*lines: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": "\n".join(lines)}}


def _escape(value: str, max_characters: int) -> str:
    """Return text of at most `max_characters` that mentions nobody and contains no link."""
    harmless = _MENTION.sub(f"@{_ZERO_WIDTH_SPACE}", value)
    escaped = text.shorten(harmless, max_characters).translate(_ESCAPES)
    if len(escaped) <= max_characters:
        return escaped
    return text.shorten(harmless, max_characters // _MAX_ESCAPE).translate(_ESCAPES)

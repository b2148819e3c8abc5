"""The channel `slack`: Slack's incoming webhooks, which others such as Mattermost understand too.

https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks and, for limits and what has to be escaped,
https://docs.slack.dev/reference/block-kit/blocks and https://docs.slack.dev/messaging/formatting-message-text.
"""

from typing import Any

import aiohttp
import msgspec
from yarl import URL

from opsentry.notifications.channel import Channel, Endpoint, Message, Outcome
from opsentry.notifications.channels import Dependencies
from opsentry.notifications.messages.text import HEADINGS, facts, line, paragraphs, plain, shorter, tenant_name
from opsentry.notifications.transport.egress import check_url
from opsentry.notifications.transport.http import post
from opsentry.settings import Network

_MAX_HEADER = 150
_MAX_SECTION = 3_000
_ESCAPED = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_LONGEST_ESCAPE = 5

_SHOWN_END = 4
_LONG_ENOUGH = 20
# The beginning that all of Slack's own webhooks have: no secret, and it tells what this is.
_SLACK_PATH = "/services/"


def make(parts: Dependencies) -> Channel:
    """Return the channel."""
    return Slack(parts.http, parts.settings.webhook_allowed_networks)


class Slack:
    """Posts a text with blocks to a URL that is a secret itself."""

    name = "slack"
    signs_messages = False
    has_secret_target = True
    max_concurrency: int | None = None

    def __init__(self, http: aiohttp.ClientSession, webhook_allowed_networks: tuple[Network, ...]) -> None:
        self._http = http
        self._open_networks = webhook_allowed_networks

    def validate_target(self, target: str) -> str:
        """Return the URL; raises `BadTarget`."""
        return check_url(target, self._open_networks)

    def display_target(self, target: str) -> str:
        """Return the host, and the last four characters where so many more are left out."""
        url = URL(target)
        begins = _SLACK_PATH if url.raw_path.startswith(_SLACK_PATH) else "/"
        secret = url.raw_path_qs.removeprefix(begins)
        return f"{url.origin()}{begins}…{secret[-_SHOWN_END:] if len(secret) >= _LONG_ENOUGH else ''}"

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Post it."""
        return await post(self._http, endpoint.target, msgspec.json.encode(_content(message)))

    async def close(self) -> None:
        """Nothing of its own is open."""


def _content(message: Message) -> dict[str, Any]:
    heading, tenant = HEADINGS[message.type], tenant_name(message)
    if message.subject_kind == "subscription":
        return {"text": _escaped(f"{tenant}: {heading}")}
    title = line(message.subject["title"])
    blocks = [
        {"type": "header", "text": {"type": "plain_text", "text": shorter(f"{heading}: {title}", _MAX_HEADER)}},
        _section(*(f"*{name}:* {_escaped(value, 1_000)}" for name, value in facts(message.subject))),
    ]
    for text, label, by in paragraphs(message):
        above = [f"*{label}{f' by {_escaped(line(by), 100)}' if by else ''}:*"] if label else []
        blocks.append(_section(*above, _escaped(text, _MAX_SECTION - 700)))
    blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": _escaped(tenant)}]})
    return {"text": _escaped(f"{heading}: {title} ({plain(message.subject['status'])})"), "blocks": blocks}


def _section(*lines: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": "\n".join(lines)}}


def _escaped(text: str, most: int = _MAX_SECTION) -> str:
    """Return text that mentions nobody and links nothing, in at most `most` characters."""
    escaped = shorter(text, most).translate(_ESCAPED)
    return escaped if len(escaped) <= most else shorter(text, most // _LONGEST_ESCAPE).translate(_ESCAPED)

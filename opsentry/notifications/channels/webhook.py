"""Send messages as signed JSON, as the Standard Webhooks specification describes (standardwebhooks.com)."""

import time

import aiohttp

from opsentry.notifications.channel import Channel, Endpoint, Message, Outcome
from opsentry.notifications.channels import Dependencies
from opsentry.notifications.messages import signing
from opsentry.notifications.messages.webhook_payload import PayloadEncoder
from opsentry.notifications.transport.egress import check_url
from opsentry.notifications.transport.http import post
from opsentry.settings import Network


def make(parts: Dependencies) -> Channel:
    """Return the channel `webhook`."""
    return Webhook(parts.http, parts.settings.webhook_allowed_networks)


class Webhook:
    """Post payloads with one signature for each valid secret."""

    name = "webhook"
    signs_messages = True
    has_secret_target = False
    max_concurrency: int | None = None

    def __init__(self, http: aiohttp.ClientSession, webhook_allowed_networks: tuple[Network, ...]) -> None:
        self._http = http
        self._allowed_networks = webhook_allowed_networks
        self._encoder = PayloadEncoder()

    def validate_target(self, target: str) -> str:
        """Return the URL unchanged.

        Raises:
            BadTarget: The URL is malformed or its address is blocked.
        """
        return check_url(target, self._allowed_networks)

    def display_target(self, target: str) -> str:
        """Return the whole URL."""
        return target

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Sign and post one message."""
        body = self._encoder.encode(message)
        timestamp = int(time.time())
        headers = {
            "webhook-id": message.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signing.signatures(endpoint.secrets, message.id, timestamp, body),
        }
        return await post(self._http, endpoint.target, body, headers)

    async def close(self) -> None:
        """Do nothing: the HTTP session belongs to the caller."""

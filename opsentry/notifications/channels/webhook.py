"""The channel `webhook`: signed JSON to a URL, as the Standard Webhooks specification has it."""

import time

import aiohttp

from opsentry.notifications.channel import Channel, Endpoint, Message, Outcome
from opsentry.notifications.channels import Dependencies
from opsentry.notifications.messages import signing
from opsentry.notifications.messages.webhook_payload import Bodies
from opsentry.notifications.transport.egress import check_url
from opsentry.notifications.transport.http import post
from opsentry.settings import Network


def make(parts: Dependencies) -> Channel:
    """Return the channel."""
    return Webhook(parts.http, parts.settings.webhook_allowed_networks)


class Webhook:
    """Posts what `payload` describes, signed with each secret that is good at the moment."""

    name = "webhook"
    signs_messages = True
    has_secret_target = False
    max_concurrency: int | None = None

    def __init__(self, http: aiohttp.ClientSession, webhook_allowed_networks: tuple[Network, ...]) -> None:
        self._http = http
        self._open_networks = webhook_allowed_networks
        self._bodies = Bodies()

    def validate_target(self, target: str) -> str:
        """Return the URL; raises `BadTarget`."""
        return check_url(target, self._open_networks)

    def display_target(self, target: str) -> str:
        """Return all of it."""
        return target

    async def send(self, endpoint: Endpoint, message: Message) -> Outcome:
        """Post it."""
        body = self._bodies.body(message)
        now = int(time.time())
        headers = {
            "webhook-id": message.id,
            "webhook-timestamp": str(now),
            "webhook-signature": signing.signatures(endpoint.secrets, message.id, now, body),
        }
        return await post(self._http, endpoint.target, body, headers)

    async def close(self) -> None:
        """Nothing of its own is open."""

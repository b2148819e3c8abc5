"""The channel `webhook`: signed JSON to a URL, as the Standard Webhooks specification has it."""

import time

import aiohttp

from opsentry.config import Network
from opsentry.notifications import signing
from opsentry.notifications.addresses import check_url
from opsentry.notifications.channel import Channel, Endpoint, Message, Outcome
from opsentry.notifications.channels import Parts
from opsentry.notifications.payload import Bodies
from opsentry.notifications.posting import post


def make(parts: Parts) -> Channel:
    """Return the channel."""
    return Webhook(parts.http, parts.settings.open_networks)


class Webhook:
    """Posts what `payload` describes, signed with each secret that is good at the moment."""

    name = "webhook"
    signs = True
    hides = False
    at_once: int | None = None

    def __init__(self, http: aiohttp.ClientSession, open_networks: tuple[Network, ...]) -> None:
        self._http = http
        self._open_networks = open_networks
        self._bodies = Bodies()

    def check(self, target: str) -> str:
        """Return the URL; raises `BadTarget`."""
        return check_url(target, self._open_networks)

    def shown(self, target: str) -> str:
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

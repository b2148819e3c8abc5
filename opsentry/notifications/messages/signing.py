"""Signatures of webhooks, as the Standard Webhooks specification 1.0.0 has them (standardwebhooks.com)."""

import base64
import hmac
import secrets
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

_PREFIX = "whsec_"
_SECRET_BYTES = 32


def new_secret() -> str:
    """Return a new random secret: `whsec_` and 32 bytes in base64."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def signatures(secrets_: Sequence[str], message_id: str, timestamp: int, body: bytes) -> str:
    """Return the header `webhook-signature`: a signature with each secret, separated by spaces.

    Args:
        secrets_: As `new_secret` makes them.
        message_id: The header `webhook-id`.
        timestamp: The header `webhook-timestamp`: seconds since 1970.
        body: The exact bytes that are sent.
    """
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    return " ".join("v1," + base64.b64encode(hmac.digest(_key(secret), signed, sha256)).decode() for secret in secrets_)


@lru_cache(maxsize=1024)
def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(_PREFIX))

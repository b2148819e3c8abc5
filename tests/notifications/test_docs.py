import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec

from opsentry.notifications.messages.signing import new_secret, signatures
from opsentry.notifications.messages.webhook_payload import Payload

DOCS = Path(__file__).parents[2] / "docs"


def block(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)[0]


def test_the_documented_payload_matches_the_schema():
    example = msgspec.json.decode(block("reference/webhooks.md", "json"), type=Payload)
    assert json.loads(msgspec.json.encode(example)) == json.loads(block("reference/webhooks.md", "json"))


def test_the_documented_verifier_works():
    names: dict[str, Any] = {}
    exec(block("how-to/receive-webhooks.md", "python"), names)
    verify = names["verify"]
    secret, newer, body, now = new_secret(), new_secret(), b'{"title":"\xc5\x81"}', int(time.time())

    def headers(at, *secrets):
        signed = signatures(secrets, "msg_1", at, body)
        return {"webhook-id": "msg_1", "webhook-timestamp": str(at), "webhook-signature": signed}

    assert verify(secret, headers(now, secret), body)
    assert verify(secret, headers(now, newer, secret), body)
    assert verify(newer, headers(now, newer, secret), body)
    assert not verify(secret, headers(now, newer), body)
    assert not verify(secret, headers(now, secret), body + b" ")
    assert not verify(secret, headers(now - 301, secret), body)

"""Where the demo's messages go: endpoints for webhooks and Slack, a mailbox, and a page that shows what arrived."""

import asyncio
import email.policy
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import EmailMessage
from email.parser import BytesParser
from typing import Any

import jinja2
from aiohttp import web
from aiosmtpd.smtp import SMTP, Envelope, Session

from opsentry.notifications.messages import signing

KEPT = 200
_HOST = "127.0.0.1"
_OLD_SECONDS = 300  # a signature may be so old, or its timestamp so much ahead
_MAX_BODY = 2**20

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("opsentry.demo"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass
class Sink:
    """What arrived, the newest first, in memory.

    Attributes:
        url: Of its page, without a slash at its end.
        smtp_url: Of its mailbox; empty where it has none.
        secrets: Those that signatures of webhooks are verified with.
    """

    url: str = ""
    smtp_url: str = ""
    secrets: list[str] = field(default_factory=list)
    webhooks: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    slack: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))
    emails: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))

    # ------------------------------------------------------------------------------------------ HTTP

    def app(self) -> web.Application:
        """Return the HTTP application."""
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_get("/", self._page)
        app.router.add_get("/arrived.json", self._arrived)
        app.router.add_post("/hook{rest:(/.*)?}", self._hook)
        app.router.add_post("/slack{rest:(/.*)?}", self._slack)
        return app

    async def _hook(self, request: web.Request) -> web.Response:
        octets = await request.read()
        headers = _headers(request)
        body = _json(octets)
        self.webhooks.appendleft(
            {
                "id": headers.get("webhook-id"),
                "type": body.get("type") if isinstance(body, dict) else None,
                "at": _now(),
                "path": request.path,
                "verified": verifies(self.secrets, headers, octets),
                "raw": octets.decode(errors="replace"),
                "headers": headers,
                "body": body,
            }
        )
        return web.Response(status=204)

    async def _slack(self, request: web.Request) -> web.Response:
        body = _json(await request.read())
        self.slack.appendleft({"at": _now(), "path": request.path, "headers": _headers(request), "body": body})
        return web.Response(text="ok")

    async def _arrived(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"webhooks": list(self.webhooks), "emails": list(self.emails), "slack": list(self.slack)}
        )

    async def _page(self, _: web.Request) -> web.Response:
        kinds = {"webhook": self.webhooks, "slack": self.slack, "email": self.emails}
        arrived = [{"kind": kind, **one} for kind, several in kinds.items() for one in several]
        arrived.sort(key=lambda one: str(one["at"]), reverse=True)
        text = _TEMPLATES.get_template("sink.html").render(arrived=arrived[:KEPT], sink=self, pretty=_pretty)
        # What others wrote is shown here: nothing of it may run or be loaded.
        policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    # ------------------------------------------------------------------------------------------ SMTP

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's
        """Keep an e-mail."""
        content = envelope.content
        letter = BytesParser(policy=email.policy.default).parsebytes(content if isinstance(content, bytes) else b"")
        self.emails.appendleft(
            {
                "to": ", ".join(envelope.rcpt_tos),
                "subject": str(letter.get("Subject", "")),
                "message_id": letter.get("Message-ID"),
                "references": letter.get("References"),
                "at": _now(),
                "headers": {name: str(value) for name, value in letter.items()},
                "text": _part(letter, "plain"),
                "html": _part(letter, "html"),
            }
        )
        return "250 kept"


@asynccontextmanager
async def sink(*, mailbox: bool, port: int = 0) -> AsyncIterator[Sink]:
    """Receive on 127.0.0.1, webhooks at `port` if it is free; e-mails only with a `mailbox`."""
    made = Sink()
    runner = web.AppRunner(made.app(), access_log=None, shutdown_timeout=1, handle_signals=False)
    await runner.setup()
    server = None
    try:
        try:
            await web.TCPSite(runner, _HOST, port).start()
        except OSError:
            await web.TCPSite(runner, _HOST, 0).start()
        made.url = f"http://{_HOST}:{runner.addresses[0][1]}"
        if mailbox:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(lambda: SMTP(made, hostname="sink", loop=loop), _HOST, 0)
            made.smtp_url = f"smtp://{_HOST}:{server.sockets[0].getsockname()[1]}"
        yield made
    finally:
        if server is not None:
            server.close()
        await runner.cleanup()


def verifies(secrets: Sequence[str], headers: Mapping[str, str], body: bytes) -> bool:
    """Tell whether a webhook was signed just now with one of `secrets`, as its receiver has to find out."""
    sent_at = headers.get("webhook-timestamp", "")
    if not sent_at.isdigit() or abs(time.time() - int(sent_at)) > _OLD_SECONDS:
        return False
    expected = signing.signatures(secrets, headers.get("webhook-id", ""), int(sent_at), body).split()
    return not set(expected).isdisjoint(headers.get("webhook-signature", "").split())


def _headers(request: web.Request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def _json(octets: bytes) -> Any:
    """Return the JSON, or as text what is none."""
    with suppress(ValueError):
        return json.loads(octets)
    return octets.decode(errors="replace")


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _part(letter: EmailMessage, subtype: str) -> str | None:
    part = letter.get_body((subtype,))
    return None if part is None else str(part.get_content())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

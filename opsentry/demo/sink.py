"""Receive the demo's messages: endpoints for webhooks and Slack, a mailbox, and a page that shows the messages."""

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

MAX_MESSAGES = 200
"""The most messages of each kind that are kept; older ones are dropped."""
SIGNATURE_TOLERANCE_SECONDS = 300

_HOST = "127.0.0.1"
_MAX_BODY_BYTES = 2**20

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("opsentry.demo"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
# The pages show text that others wrote: none of it may run or load anything.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def _newest() -> deque[dict[str, Any]]:
    return deque(maxlen=MAX_MESSAGES)


@dataclass
class Sink:
    """Keep received messages in memory, newest first.

    Attributes:
        url: The base URL of the page, without a slash at its end.
        smtp_url: The URL of the mailbox; empty if there is none.
        secrets: The secrets that signatures of webhooks are verified with.
    """

    url: str = ""
    smtp_url: str = ""
    secrets: list[str] = field(default_factory=list)
    webhooks: deque[dict[str, Any]] = field(default_factory=_newest)
    slack: deque[dict[str, Any]] = field(default_factory=_newest)
    emails: deque[dict[str, Any]] = field(default_factory=_newest)

    # ------------------------------------------------------------------------------------------ HTTP

    def app(self) -> web.Application:
        """Return the HTTP application with the page and the endpoints."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_get("/", self._show_page)
        app.router.add_get("/arrived.json", self._list_messages)
        app.router.add_get("/emails/{message_id}", self._show_email)
        app.router.add_post("/hook{rest:(/.*)?}", self._receive_webhook)
        app.router.add_post("/slack{rest:(/.*)?}", self._receive_slack)
        return app

    async def _receive_webhook(self, request: web.Request) -> web.Response:
        raw = await request.read()
        headers = _headers(request)
        body = _decode(raw)
        self.webhooks.appendleft(
            {
                "id": headers.get("webhook-id"),
                "type": body.get("type") if isinstance(body, dict) else None,
                "at": _now(),
                "path": request.path,
                "verified": is_signed(self.secrets, headers, raw),
                "raw": raw.decode(errors="replace"),
                "headers": headers,
                "body": body,
            }
        )
        return web.Response(status=204)

    async def _receive_slack(self, request: web.Request) -> web.Response:
        body = _decode(await request.read())
        self.slack.appendleft({"at": _now(), "path": request.path, "headers": _headers(request), "body": body})
        return web.Response(text="ok")

    async def _list_messages(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"webhooks": list(self.webhooks), "emails": list(self.emails), "slack": list(self.slack)}
        )

    async def _show_page(self, request: web.Request) -> web.Response:
        by_kind = {"webhook": self.webhooks, "slack": self.slack, "email": self.emails}
        messages = [{"kind": kind, **message} for kind, received in by_kind.items() for message in received]
        messages.sort(key=lambda message: str(message["at"]), reverse=True)
        text = _TEMPLATES.get_template("sink.html").render(
            messages=messages[:MAX_MESSAGES], sink=self, pretty=_pretty, is_paused="paused" in request.query
        )
        return web.Response(text=text, content_type="text/html", headers=_PAGE_HEADERS)

    async def _show_email(self, request: web.Request) -> web.Response:
        """Show the HTML part of an email as a mail program would."""
        message_id = request.match_info["message_id"]
        found = next((each for each in self.emails if each["message_id"] == message_id and each["html"]), None)
        if found is None:
            raise web.HTTPNotFound
        return web.Response(text=found["html"], content_type="text/html", headers=_PAGE_HEADERS)

    # ------------------------------------------------------------------------------------------ SMTP

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's
        """Keep an email and accept it."""
        content = envelope.content
        parsed = BytesParser(policy=email.policy.default).parsebytes(content if isinstance(content, bytes) else b"")
        self.emails.appendleft(
            {
                "to": ", ".join(envelope.rcpt_tos),
                "subject": str(parsed.get("Subject", "")),
                "message_id": parsed.get("Message-ID"),
                "references": parsed.get("References"),
                "at": _now(),
                "headers": {name: str(value) for name, value in parsed.items()},
                "text": _part(parsed, "plain"),
                "html": _part(parsed, "html"),
            }
        )
        return "250 accepted"


@asynccontextmanager
async def sink(*, mailbox: bool, port: int = 0) -> AsyncIterator[Sink]:
    """Run a sink on 127.0.0.1.

    Args:
        mailbox: Whether to receive emails too.
        port: The preferred HTTP port; if it is taken, or 0, the system chooses one.
    """
    running = Sink()
    runner = web.AppRunner(running.app(), access_log=None, shutdown_timeout=1, handle_signals=False)
    await runner.setup()
    server = None
    try:
        try:
            await web.TCPSite(runner, _HOST, port).start()
        except OSError:
            await web.TCPSite(runner, _HOST, 0).start()
        running.url = f"http://{_HOST}:{runner.addresses[0][1]}"
        if mailbox:
            loop = asyncio.get_running_loop()
            server = await loop.create_server(lambda: SMTP(running, hostname="sink", loop=loop), _HOST, 0)
            running.smtp_url = f"smtp://{_HOST}:{server.sockets[0].getsockname()[1]}"
        yield running
    finally:
        if server is not None:
            server.close()
        await runner.cleanup()


def is_signed(secrets: Sequence[str], headers: Mapping[str, str], body: bytes) -> bool:
    """Return whether one of `secrets` signed a webhook in the last five minutes, checked as a receiver would."""
    sent_at = headers.get("webhook-timestamp", "")
    if not sent_at.isdigit() or abs(time.time() - int(sent_at)) > SIGNATURE_TOLERANCE_SECONDS:
        return False
    expected = signing.signatures(secrets, headers.get("webhook-id", ""), int(sent_at), body).split()
    return not set(expected).isdisjoint(headers.get("webhook-signature", "").split())


def _headers(request: web.Request) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def _decode(raw: bytes) -> Any:
    """Return the decoded JSON, or the text if it is not JSON."""
    with suppress(ValueError):
        return json.loads(raw)
    return raw.decode(errors="replace")


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _part(message: EmailMessage, subtype: str) -> str | None:
    part = message.get_body((subtype,))
    return None if part is None else str(part.get_content())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

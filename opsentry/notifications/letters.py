"""Messages as e-mails: text and HTML, one thread for each incident, and one click to unsubscribe."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import datetime
from email import charset, policy
from email.header import Header
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.utils import format_datetime, formataddr, parseaddr
from hashlib import sha256
from typing import Any, NamedTuple

import jinja2

from opsentry.config import Settings
from opsentry.notifications.channel import Endpoint, Message
from opsentry.notifications.links import CONFIRM, UNSUBSCRIBE, Links

_CONFIRM_TYPE = "subscription.confirm"
_HEADINGS = {
    "incident.opened": "New incident",
    "incident.updated": "Update",
    "incident.severity_changed": "Severity changed",
    "incident.resolved": "Resolved",
    "incident.reopened": "Reopened",
    "incident.still_open": "Still open",
    "maintenance.scheduled": "Maintenance scheduled",
    "maintenance.rescheduled": "Maintenance moved to another time",
    "maintenance.reminder": "Maintenance begins soon",
    "maintenance.updated": "Maintenance update",
    "maintenance.started": "Maintenance has begun",
    "maintenance.completed": "Maintenance is over",
    "maintenance.cancelled": "Maintenance cancelled",
    "subscription.test": "This is a test: messages reach you",
    _CONFIRM_TYPE: "Do you want to be told?",
}
_FACTS = (
    ("status", "Status"),
    ("severity", "Severity"),
    ("scheduled_start", "Begins"),
    ("scheduled_end", "Ends"),
    ("resolved_at", "Resolved"),
)
_MAX_SUBJECT = 200
_MAX_TEXT = 5_000
_MAX_UPDATES = 10
_MAX_SERVICES = 50

# What turns the direction of all that follows, in a line that is not only the writer's.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

# Quoted-printable keeps lines short and what is ASCII readable, whatever is in them.
_UTF_8 = charset.Charset("utf-8")
_UTF_8.body_encoding = charset.QP
# The older of Python's policies: the newer one encodes long words of headers, and a link is one long word. Nothing is
# folded, as programs are known to stumble over a link on a line of its own; the subject is folded before.
_POLICY = policy.compat32.clone(linesep="\r\n", mangle_from_=False, max_line_length=None)


class _Paragraph(NamedTuple):
    text: str
    label: str | None = None
    by: str | None = None


class Letters:
    """Writes e-mails."""

    def __init__(self, settings: Settings) -> None:
        name, self.sender = parseaddr(settings.mail_from)
        self.domain = self.sender.rpartition("@")[2] or "localhost"
        self._from = formataddr((name, self.sender))
        self._links = Links(settings)
        templates = jinja2.Environment(
            loader=jinja2.PackageLoader("opsentry.notifications"),
            autoescape=jinja2.select_autoescape(["html"]),
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._text = templates.get_template("message.txt")
        self._html = templates.get_template("message.html")

    def letter(self, endpoint: Endpoint, to: str, message: Message) -> bytes:
        """Return the whole e-mail to the address `to`, the same for the same message but for its MIME boundary.

        Raises:
            NoKey: There is no key to sign its link with.
        """
        confirms = message.type == _CONFIRM_TYPE
        url = self._links.url(CONFIRM if confirms else UNSUBSCRIBE, endpoint.tenant_id, endpoint.subscription_id)
        tenant = _line(message.tenant["name"])
        subscribed = message.kind == "subscription"
        filled = {
            "tenant": tenant,
            "heading": f"Do you want to be told how {tenant} is?" if confirms else _HEADINGS[message.type],
            "title": None if subscribed else _line(message.subject["title"]),
            "facts": () if subscribed else tuple(_facts(message.subject)),
            "paragraphs": () if subscribed else tuple(_paragraphs(message)),
            "confirm_url" if confirms else "unsubscribe_url": url,
        }
        letter = MIMEMultipart("alternative")
        root = self._root(endpoint, message)
        headers = {
            "From": self._from,
            "To": to,
            "Subject": _header(_subject(tenant, message)),
            "Date": format_datetime(message.at),
            "Message-ID": f"<{message.id}@{self.domain}>",
            "In-Reply-To": root,
            "References": root,
            "Auto-Submitted": "auto-generated",
            "List-Id": f"<{message.tenant['slug']}.opsentry.{self.domain}>",
        }
        if not confirms:
            headers["List-Unsubscribe"] = f"<{url}>"
            headers["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
        for name, value in headers.items():
            letter[name] = value
        for template, subtype in ((self._text, "plain"), (self._html, "html")):
            letter.attach(MIMEText(template.render(filled), subtype, _UTF_8))  # type: ignore[arg-type]
        return letter.as_bytes(policy=_POLICY)

    def _root(self, endpoint: Endpoint, message: Message) -> str:
        # Nothing with this id was ever sent: all are answers to it, so whichever comes first they are one thread.
        name = f"{endpoint.tenant_id}:{message.kind}:{message.subject.get('id')}:{endpoint.subscription_id}"
        return f"<{sha256(name.encode()).hexdigest()[:32]}@{self.domain}>"


def _subject(tenant: str, message: Message) -> str:
    if message.kind == "subscription":
        return f"[{tenant}] {_HEADINGS[message.type]}"
    status = f": {_plain(message.subject['status'])}"
    return _shorter(f"[{tenant}] {_line(message.subject['title'])}", _MAX_SUBJECT - len(status)) + status


def _facts(subject: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field, name in _FACTS:
        value = subject.get(field)
        if value is not None:
            yield name, _moment(value) if field.endswith(("_at", "_start", "_end")) else _plain(value)
    if services := [_line(service["name"]) for service in subject["services"][:_MAX_SERVICES]]:
        yield "Affects", ", ".join(services)


def _paragraphs(message: Message) -> Iterator[_Paragraph]:
    subject = message.subject
    told = {change.seq for change in message.changes}
    for update in [update for update in subject["updates"] if update["id"] in told][-_MAX_UPDATES:]:
        yield _Paragraph(_words(update["message"]), _moment(update["created_at"]), update.get("author"))
    for field in ("description", "root_cause", "postmortem"):
        if subject.get(field):
            yield _Paragraph(_words(subject[field]), None if field == "description" else _plain(field).capitalize())


def _plain(value: str) -> str:
    return value.replace("_", " ")


def _moment(value: str) -> str:
    return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M} UTC"


def _words(text: str) -> str:
    return _shorter(_INVISIBLE.sub("", text.replace("\r\n", "\n")), _MAX_TEXT)


def _line(text: str) -> str:
    """Return text as one line, without what could begin another one, be invisible, or turn its direction."""
    spaced = " ".join(text.split())
    return "".join(c for c in spaced if unicodedata.category(c) != "Cc" and c not in _TURNING)


def _shorter(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _header(line: str) -> str:
    # What looks encoded would be decoded by whoever reads it: it is encoded too.
    plain = line.isascii() and "=?" not in line
    return Header(line, "us-ascii" if plain else "utf-8", header_name="Subject").encode()

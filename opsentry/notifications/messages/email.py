"""Messages as e-mails: text and HTML, one thread for each incident, and one click to unsubscribe."""

import re
from email import charset, policy
from email.header import Header
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.utils import format_datetime, formataddr, parseaddr
from hashlib import sha256

import jinja2

from opsentry.domain.subscription import CONFIRMATION_DAYS
from opsentry.notifications.channel import Endpoint, Message
from opsentry.notifications.messages import text
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, Links
from opsentry.notifications.messages.text import HEADINGS, facts, line, paragraphs, plain, shorter, tenant_name
from opsentry.settings import Settings

_MAX_SUBJECT = 200
_MAX_TENANT = 60
_MAX_TEXT = 5_000

# Where the heading alone does not say what is new.
_NEWS = {"incident.updated": "status", "incident.severity_changed": "severity", "maintenance.updated": "status"}

_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

# Quoted-printable keeps lines short and what is ASCII readable, whatever is in them.
_UTF_8 = charset.Charset("utf-8")
_UTF_8.body_encoding = charset.QP
# The older of Python's policies: the newer one encodes long words of headers, and a link is one long word. Nothing is
# folded, as programs are known to stumble over a link on a line of its own; the subject is folded before.
_POLICY = policy.compat32.clone(linesep="\r\n", mangle_from_=False, max_line_length=None)


class EmailRenderer:
    """Writes e-mails."""

    def __init__(self, settings: Settings) -> None:
        name, self.sender = parseaddr(settings.mail_from)
        self.domain = self.sender.rpartition("@")[2] or "localhost"
        self._from = formataddr((name, self.sender))
        self._links = Links(settings)
        templates = jinja2.Environment(
            loader=jinja2.PackageLoader("opsentry.notifications.messages"),
            autoescape=jinja2.select_autoescape(["html"]),
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._text = templates.get_template("message.txt")
        self._html = templates.get_template("message.html")

    def letter(self, endpoint: Endpoint, to: str, message: Message) -> bytes:
        """Return the whole e-mail to the address `to`, the same for the same message but for its MIME boundary.

        Raises:
            EncryptionKeyMissing: There is no key to sign its link with.
        """
        confirms = message.type == text.CONFIRM
        url = self._links.url(CONFIRM if confirms else UNSUBSCRIBE, endpoint.tenant_id, endpoint.subscription_id)
        tenant = tenant_name(message)
        subscribed = message.subject_kind == "subscription"
        filled = {
            "tenant": tenant,
            "heading": f"Do you want to be told how {tenant} is?" if confirms else HEADINGS[message.type],
            "title": None if subscribed else line(message.subject["title"]),
            "facts": () if subscribed else tuple(facts(message.subject)),
            "paragraphs": () if subscribed else [each._replace(text=_words(each.text)) for each in paragraphs(message)],
            "days": CONFIRMATION_DAYS,
            "confirm_url" if confirms else "unsubscribe_url": url,
        }
        letter = MIMEMultipart("alternative")
        root = self._root(endpoint, message)
        headers = {
            "From": self._from,
            "To": to,
            "Subject": _header(_subject(tenant, message)),
            "Date": format_datetime(message.recorded_at),
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
        name = f"{endpoint.tenant_id}:{message.subject_kind}:{message.subject.get('id')}:{endpoint.subscription_id}"
        return f"<{sha256(name.encode()).hexdigest()[:32]}@{self.domain}>"


def _subject(tenant: str, message: Message) -> str:
    """Return what happened, and to what, in one line; the title alone is cut for whatever is too long."""
    happened = f"[{shorter(tenant, _MAX_TENANT)}] {HEADINGS[message.type]}"
    if message.subject_kind == "subscription" or not (title := line(message.subject["title"])):
        return happened
    news = f" ({plain(message.subject[_NEWS[message.type]])})" if message.type in _NEWS else ""
    return shorter(f"{happened}: {title}", _MAX_SUBJECT - len(news)) + news


def _words(text: str) -> str:
    return shorter(_INVISIBLE.sub("", text.replace("\r\n", "\n")), _MAX_TEXT)


def _header(line: str) -> str:
    # What looks encoded would be decoded by whoever reads it: it is encoded too.
    plain = line.isascii() and "=?" not in line
    return Header(line, "us-ascii" if plain else "utf-8", header_name="Subject").encode()

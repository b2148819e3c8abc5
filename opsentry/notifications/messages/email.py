"""Render messages as emails: text and HTML, one thread for each incident, one-click unsubscribe (RFC 8058)."""

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
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, SignedLinks
from opsentry.settings import Settings

_MAX_SUBJECT = 200
_MAX_TENANT = 60
_MAX_PARAGRAPH = 5_000

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

# Quoted-printable keeps lines short and leaves ASCII readable in the raw email.
_UTF_8 = charset.Charset("utf-8")
_UTF_8.body_encoding = charset.QP
# The newer policies of `email` encode long words in headers, and an unsubscribe link is one long word. Some mail
# programs do not find a link on a folded line, so no header is folded here. `Header` folds the subject itself.
_POLICY = policy.compat32.clone(linesep="\r\n", mangle_from_=False, max_line_length=None)


class EmailRenderer:
    """Render emails from one sender.

    Attributes:
        sender: The sender's bare address, for the SMTP envelope.
        domain: The domain of that address, for message ids.
    """

    def __init__(self, settings: Settings) -> None:
        name, self.sender = parseaddr(settings.mail_from)
        self.domain = self.sender.rpartition("@")[2] or "localhost"
        self._from = formataddr((name, self.sender))
        self._links = SignedLinks(settings)
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("opsentry.notifications.messages"),
            autoescape=jinja2.select_autoescape(["html"]),
            undefined=jinja2.StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def render(self, endpoint: Endpoint, address: str, message: Message) -> bytes:
        """Return the whole email to `address`. Rendering a message twice differs in the MIME boundary alone.

        Raises:
            EncryptionKeyMissing: No key is set to sign the link with.
        """
        tenant = text.tenant_name(message)
        subject = _subject(tenant, message)
        shared = {"tenant": tenant, "updates": text.status_updates(tenant), "subject": subject}
        email = MIMEMultipart("alternative")
        thread = self._thread_id(endpoint, message)
        headers = {
            "From": self._from,
            "To": address,
            "Subject": _encode_header(subject),
            "Date": format_datetime(message.recorded_at),
            "Message-ID": f"<{message.id}@{self.domain}>",
            "In-Reply-To": thread,
            "References": thread,
            "Auto-Submitted": "auto-generated",
            "List-Id": f"<{message.tenant['slug']}.opsentry.{self.domain}>",
        }
        if message.type == text.CONFIRM:
            url = self._links.url(CONFIRM, endpoint.tenant_id, endpoint.subscription_id)
            parts = self._render("confirmation", **shared, address=address, confirm_url=url, days=CONFIRMATION_DAYS)
        else:
            url = self._links.url(UNSUBSCRIBE, endpoint.tenant_id, endpoint.subscription_id)
            parts = self._render("update", **shared, **_content(message), unsubscribe_url=url)
            headers["List-Unsubscribe"] = f"<{url}>"
            headers["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
        for name, value in headers.items():
            email[name] = value
        for part in parts:
            email.attach(part)
        return email.as_bytes(policy=_POLICY)

    def _render(self, template: str, **values: object) -> tuple[MIMEText, MIMEText]:
        """Return the text and the HTML part that one pair of templates renders."""
        plain = self._templates.get_template(f"{template}.txt").render(values)
        html = self._templates.get_template(f"{template}.html").render(values)
        return MIMEText(plain, "plain", _UTF_8), MIMEText(html, "html", _UTF_8)  # type: ignore[arg-type]

    def _thread_id(self, endpoint: Endpoint, message: Message) -> str:
        # No email has this id. All emails of a thread reply to it, so their order of arrival does not matter.
        name = f"{endpoint.tenant_id}:{message.subject_kind}:{message.subject.get('id')}:{endpoint.subscription_id}"
        return f"<{sha256(name.encode()).hexdigest()[:32]}@{self.domain}>"


def _content(message: Message) -> dict[str, object]:
    """Return the template values that describe the news itself."""
    is_test = message.type == text.TEST
    return {
        "headline": text.headline(message),
        "label": text.label(message),
        "title": text.title(message),
        "tone": text.tone(message),
        "facts": () if is_test else tuple(text.facts(message)),
        "paragraphs": [paragraph._replace(text=_printable(paragraph.text)) for paragraph in text.paragraphs(message)],
    }


def _subject(tenant: str, message: Message) -> str:
    """Return the subject line; too long a title loses its end."""
    return text.shorten(f"[{text.shorten(tenant, _MAX_TENANT)}] {text.headline(message)}", _MAX_SUBJECT)


def _printable(paragraph: str) -> str:
    return text.shorten(_CONTROL_CHARACTERS.sub("", paragraph.replace("\r\n", "\n")), _MAX_PARAGRAPH)


def _encode_header(value: str) -> str:
    # Mail programs decode everything that looks like an encoded word, so such a text is encoded too.
    is_plain = value.isascii() and "=?" not in value
    return Header(value, "us-ascii" if is_plain else "utf-8", header_name="Subject").encode()

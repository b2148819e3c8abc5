import re
from email.utils import parsedate_to_datetime
from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsentry.domain.subscription import CONFIRMATION_DAYS
from opsentry.notifications.channel import Change
from opsentry.notifications.messages.email import EmailRenderer
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, SignedLinks
from tests.notifications.mail import SETTINGS, parsed
from tests.notifications.messages import AT, endpoint, incident, message, update, window

RENDERER = EmailRenderer(SETTINGS)
CONFIRMATION = message({"id": 8}, "subscription", type="subscription.confirm")
TEST = message({"id": 8}, "subscription", type="subscription.test")
STATUS_CHANGED = [Change(42, "incident.status_changed", AT)]


def rendered(sent, address="kim@example.com"):
    return parsed(RENDERER.render(endpoint(address), address, sent))


def text_of(email, kind="plain"):
    return email.get_body((kind,)).get_content().replace("\r\n", "\n")


def words_of(email, kind):
    """The words that a reader sees, in order; the HTML's links and the text's bare URLs are left out."""
    text = text_of(email, kind)
    if kind == "html":
        text = unescape(re.sub("<[^>]*>", " ", text.partition("<body")[2].partition(">")[2]))
    return re.findall(r"\w+", re.sub(r"https?://\S+", "", text))


def test_an_email_reports_the_incident():
    email = rendered(message())
    assert email["From"] == "Acme Status <status@acme.example>"
    assert email["To"] == "kim@example.com"
    assert email["Subject"] == "[Acme] Investigating: Checkout is slow"
    assert email["Message-ID"] == "<msg_0123456789abcdef0123456789abcdef@acme.example>"
    assert email["Auto-Submitted"] == "auto-generated"
    assert email["List-Id"] == "<acme.opsentry.acme.example>"
    assert parsedate_to_datetime(email["Date"]) == AT.replace(microsecond=0)
    assert email.get_content_type() == "multipart/alternative"
    assert text_of(email).partition("Unsubscribe:")[0] == (
        "Investigating: Checkout is slow\n"
        "\n"
        "2026-03-01 12:30 UTC\n"
        "We are looking into it.\n"
        "\n"
        "About this incident\n"
        "Payments take long.\n"
        "\n"
        "Severity: Major outage\n"
        "Started: 2026-03-01 12:30 UTC\n"
        "Affected services: Checkout\n"
        "\n"
        "-- \n"
        "You are receiving this because you subscribed to Acme status updates.\n"
    )
    assert "<img" not in text_of(email, "html")


@pytest.mark.parametrize(
    "sent",
    [
        message(),
        message(window(description="Reads only."), "maintenance", type="maintenance.reminder"),
        message(incident(status="identified"), type="incident.severity_changed"),
        TEST,
        CONFIRMATION,
    ],
)
def test_text_and_html_say_the_same(sent):
    email = rendered(sent)
    plain, html = sorted(words_of(email, "plain")), sorted(words_of(email, "html"))
    # The HTML starts with the tenant's name; a button repeats the heading of a confirmation.
    extra = ["Acme", *(["Confirm", "your", "subscription"] if sent is CONFIRMATION else [])]
    assert html == sorted([*plain, *extra])


def test_the_unsubscribe_link_is_in_the_header_and_in_both_parts():
    email = rendered(message())
    link = email["List-Unsubscribe"]
    base = f"<{SETTINGS.public_url}/unsubscribe/"
    assert link.startswith(base)
    assert link.endswith(">")
    assert SignedLinks(SETTINGS).verify(UNSUBSCRIBE, link[len(base) : -1]) == (7, 8)
    assert email["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert link[1:-1] in text_of(email)
    assert link[1:-1] in text_of(email, "html")


def test_each_incident_is_one_thread_for_each_subscription():
    def thread(sent, to=None):
        email = parsed(RENDERER.render(to or endpoint("kim@example.com"), "kim@example.com", sent))
        assert email["In-Reply-To"] == email["References"]
        return email["References"]

    first = thread(message())
    assert first == thread(message(incident(title="Renamed"), id="msg_2", type="incident.resolved"))
    others = [
        thread(message(incident(id=18))),
        thread(message(window(id=17), "maintenance", type="maintenance.started")),
        thread(message(), endpoint("kim@example.com")._replace(subscription_id=9)),
        thread(message(), endpoint("kim@example.com")._replace(tenant_id=9)),
    ]
    assert len({first, *others}) == 5


def test_an_email_contains_only_the_reported_entries_and_the_descriptions():
    updates = [update(n, f"entry {n}.", author="Kim" if n == 3 else "Robin") for n in (1, 2, 3)]
    sent = message(
        incident(updates=updates, postmortem="It was DNS.", root_cause=None),
        changes=[Change(3, "incident.updated", AT)],
        type="incident.updated",
    )
    text = text_of(rendered(sent))
    assert "2026-03-01 12:30 UTC by Kim\nentry 3." in text
    assert "entry 2." not in text
    assert "Postmortem\nIt was DNS." in text
    assert "Status: Investigating\n" in text


def test_a_description_that_is_the_first_entry_appears_once():
    assert text_of(rendered(message(incident(updates=[update(42, "Payments take long.")])))).count("Payments") == 1


@pytest.mark.parametrize(
    "kind",
    ["scheduled", "rescheduled", "reminder", "updated", "started", "completed", "cancelled"],
)
def test_maintenance_emails_contain_the_scheduled_times(kind):
    text = text_of(rendered(message(window(), "maintenance", type=f"maintenance.{kind}")))
    assert "Scheduled start: 2026-03-01 12:30 UTC" in text
    assert "Scheduled end: 2026-03-01 14:30 UTC" in text


@pytest.mark.parametrize(
    ("type_", "subject"),
    [
        ("incident.opened", "Investigating: Checkout is slow"),
        ("incident.updated", "Update: Checkout is slow"),
        ("incident.severity_changed", "Severity changed: Checkout is slow"),
        ("incident.resolved", "Resolved: Checkout is slow"),
        ("incident.reopened", "Reopened: Checkout is slow"),
        ("incident.still_open", "Still open: Checkout is slow"),
        ("maintenance.scheduled", "Maintenance scheduled: Database upgrade"),
        ("maintenance.rescheduled", "Maintenance rescheduled: Database upgrade"),
        ("maintenance.reminder", "Maintenance starts soon: Database upgrade"),
        ("maintenance.updated", "Maintenance update: Database upgrade"),
        ("maintenance.started", "Maintenance started: Database upgrade"),
        ("maintenance.completed", "Maintenance completed: Database upgrade"),
        ("maintenance.cancelled", "Maintenance cancelled: Database upgrade"),
    ],
)
def test_the_subject_line_names_the_news(type_, subject):
    kind, _, _ = type_.partition(".")
    email = rendered(message(window() if kind == "maintenance" else incident(), kind, type=type_))
    assert email["Subject"] == f"[Acme] {subject}"


@pytest.mark.parametrize("status", ["investigating", "identified", "monitoring"])
def test_the_subject_line_names_a_new_status(status):
    for type_ in ("incident.opened", "incident.updated"):
        email = rendered(message(incident(status=status), type=type_, changes=STATUS_CHANGED))
        assert email["Subject"] == f"[Acme] {status.title()}: Checkout is slow"
        assert "Status:" not in text_of(email)


def test_long_names_shorten_the_title_and_keep_the_label():
    long = {"slug": "acme", "name": "A" * 300}
    subject = rendered(message(incident(title="t" * 300), tenant=long, type="incident.updated"))["Subject"]
    assert subject.startswith(f"[{'A' * 59}…] Update: ttt")
    assert subject.endswith("t…")
    assert len(subject) == 200
    assert rendered(message(incident(title="\x07"), type="incident.resolved"))["Subject"] == "[Acme] Resolved"


def test_a_confirmation_has_one_link_and_no_way_to_unsubscribe():
    email = rendered(CONFIRMATION)
    assert email["Subject"] == "[Acme] Confirm your subscription to status updates"
    assert email["List-Unsubscribe"] is email["List-Unsubscribe-Post"] is None
    for kind in ("plain", "html"):
        text = " ".join(text_of(email, kind).split())
        assert "Someone asked us to send Acme status updates to kim@example.com." in text
        assert f"This link works for {CONFIRMATION_DAYS} days." in text
        assert "ignore this email" in text
        assert len(re.findall("https?://", text)) == 1
    token = text_of(email).partition(f"{SETTINGS.public_url}/confirm/")[2].split()[0]
    assert SignedLinks(SETTINGS).verify(CONFIRM, token) == (7, 8)
    assert f"{SETTINGS.public_url}/confirm/{token}" in text_of(email, "html")


def test_a_test_message_says_that_nothing_happened():
    email = rendered(TEST)
    assert email["Subject"] == "[Acme] Test message"
    assert "This is a test message." in text_of(email)
    assert "No service is affected." in text_of(email)
    assert email["List-Unsubscribe-Post"]


def test_a_tenant_named_status_has_no_status_status_updates():
    email = rendered(message(tenant={"slug": "acme", "name": "Acme Status"}))
    assert "you subscribed to Acme Status updates." in text_of(email)


def test_markup_in_texts_stays_text():
    hostile = '<script>alert("1")</script>{{ 7 * 7 }}'
    html = text_of(rendered(message(incident(title=hostile, description=hostile))), "html")
    assert "<script>" not in html
    assert "{{ 7 * 7 }}" in html
    assert hostile in text_of(rendered(message(incident(description=hostile))))


@pytest.mark.parametrize(
    "title",
    [
        "One\r\nBcc: everyone@example.com\r\n\r\nbody",
        "One\nBcc: everyone@example.com",
        "One\rBcc: x",
        "\u2028Bcc: x\u2029\x85\x0b\x0c\x1c",
        "=?utf-8?q?=0ABcc=3A_x?=",
        "\U0001f525" * 300,
        "\u05e9\u05dc\u05d5\u05dd \u202eelbisivni\u202c \u2066x",
        "a" * 300,
        "Ł" * 300,
        "\x01\x07\x1b[31m red \x7f",
        '"quoted", <a@b.example>; (comment) \\',
        "w " * 150,
    ],
)
def test_no_title_can_add_a_header(title):
    sent = message(incident(title=title), tenant={"slug": "acme", "name": title}, type="incident.updated")
    email = rendered(sent)
    assert len(email["Subject"]) <= 200
    assert email["Subject"].startswith("[")
    assert "] Update: " in email["Subject"]
    assert not any(character in email["Subject"] for character in "\r\n\u202e\u2066\x1b\x00")
    assert email["Bcc"] is None
    assert len(email.keys()) == len(set(email.keys())) == 13


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1), st.text(), st.text(), st.integers(1, 20_000))
def test_no_text_makes_an_email_defective(title, name, words, times):
    subject = incident(title=title, description=(words * times)[:50_000], updates=[update(42, words)])
    rendered(message(subject, tenant={"slug": "acme", "name": name}))

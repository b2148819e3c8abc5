from email.utils import parsedate_to_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsentry.domain.subscription import CONFIRMATION_DAYS
from opsentry.notifications.channel import Change
from opsentry.notifications.messages.email import EmailRenderer
from opsentry.notifications.messages.links import CONFIRM, UNSUBSCRIBE, Links
from tests.notifications.mail import SETTINGS, parsed
from tests.notifications.messages import AT, endpoint, incident, message, update, window

LETTERS = EmailRenderer(SETTINGS)
CONFIRMING = message({"id": 8}, "subscription", type="subscription.confirm")


def written(sent, to="kim@example.com"):
    return parsed(LETTERS.letter(endpoint(to), to, sent))


def text_of(letter, kind="plain"):
    return letter.get_body((kind,)).get_content().replace("\r\n", "\n")


def test_what_an_e_mail_says():
    letter = written(message())
    assert letter["From"] == "Acme Status <status@acme.example>"
    assert letter["To"] == "kim@example.com"
    assert letter["Subject"] == "[Acme] New incident: Checkout is slow"
    assert letter["Message-ID"] == "<msg_0123456789abcdef0123456789abcdef@acme.example>"
    assert letter["Auto-Submitted"] == "auto-generated"
    assert letter["List-Id"] == "<acme.opsentry.acme.example>"
    assert parsedate_to_datetime(letter["Date"]) == AT.replace(microsecond=0)
    assert letter.get_content_type() == "multipart/alternative"
    for kind in ("plain", "html"):
        words = text_of(letter, kind)
        for said in (
            "New incident",
            "Checkout is slow",
            "investigating",
            "major outage",
            "Payments take long.",
            "Acme",
        ):
            assert said in words
        assert "We are looking into it." in words  # entry 42, which the message tells
    assert "<img" not in text_of(letter, "html")


def test_one_click_unsubscribes():
    letter = written(message())
    link = letter["List-Unsubscribe"]
    base = f"<{SETTINGS.public_url}/unsubscribe/"
    assert link.startswith(base)
    assert link.endswith(">")
    assert Links(SETTINGS).read(UNSUBSCRIBE, link[len(base) : -1]) == (7, 8)
    assert letter["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert link[1:-1] in text_of(letter)
    assert link[1:-1] in text_of(letter, "html")


def test_one_incident_is_one_thread_of_one_subscription():
    def root(sent, to=None):
        letter = parsed(LETTERS.letter(to or endpoint("kim@example.com"), "kim@example.com", sent))
        assert letter["In-Reply-To"] == letter["References"]
        return letter["References"]

    first = root(message())
    assert first == root(message(incident(title="Renamed"), id="msg_2", type="incident.resolved"))
    others = [
        root(message(incident(id=18))),
        root(message(window(id=17), "maintenance", type="maintenance.started")),
        root(message(), endpoint("kim@example.com")._replace(subscription_id=9)),
        root(message(), endpoint("kim@example.com")._replace(tenant_id=9)),
    ]
    assert len({first, *others}) == 5


def test_only_news_and_the_description_are_told():
    updates = [update(n, f"entry {n}.", author="Kim" if n == 3 else "Robin") for n in (1, 2, 3)]
    sent = message(
        incident(updates=updates, postmortem="It was DNS.", root_cause=None),
        changes=[Change(3, "incident.updated", AT)],
        type="incident.updated",
    )
    words = text_of(written(sent))
    assert "2026-03-01 12:30 UTC by Kim:\nentry 3." in words
    assert "entry 2." not in words
    assert "Postmortem:\nIt was DNS." in words


def test_what_is_said_by_the_first_entry_is_said_once():
    assert text_of(written(message(incident(updates=[update(42, "Payments take long.")])))).count("Payments") == 1


@pytest.mark.parametrize(
    "kind",
    ["scheduled", "rescheduled", "reminder", "updated", "started", "completed", "cancelled"],
)
def test_maintenance_is_told_with_its_times(kind):
    words = text_of(written(message(window(), "maintenance", type=f"maintenance.{kind}")))
    assert "Begins: 2026-03-01 12:30 UTC" in words
    assert "Ends: 2026-03-01 14:30 UTC" in words


@pytest.mark.parametrize(
    ("type_", "subject"),
    [
        ("incident.opened", "New incident: Checkout is slow"),
        ("incident.updated", "Update: Checkout is slow (investigating)"),
        ("incident.severity_changed", "Severity changed: Checkout is slow (major outage)"),
        ("incident.resolved", "Resolved: Checkout is slow"),
        ("incident.reopened", "Reopened: Checkout is slow"),
        ("incident.still_open", "Still open: Checkout is slow"),
        ("maintenance.scheduled", "Maintenance scheduled: Database upgrade"),
        ("maintenance.rescheduled", "Maintenance moved to another time: Database upgrade"),
        ("maintenance.reminder", "Maintenance begins soon: Database upgrade"),
        ("maintenance.updated", "Maintenance update: Database upgrade (scheduled)"),
        ("maintenance.started", "Maintenance has begun: Database upgrade"),
        ("maintenance.completed", "Maintenance is over: Database upgrade"),
        ("maintenance.cancelled", "Maintenance cancelled: Database upgrade"),
    ],
)
def test_the_subject_says_what_happened(type_, subject):
    kind, _, _ = type_.partition(".")
    letter = written(message(window() if kind == "maintenance" else incident(), kind, type=type_))
    assert letter["Subject"] == f"[Acme] {subject}"


def test_what_happened_is_said_however_long_the_names_are():
    long = {"slug": "acme", "name": "A" * 300}
    subject = written(message(incident(title="t" * 300), tenant=long, type="incident.updated"))["Subject"]
    assert subject.startswith(f"[{'A' * 59}…] Update: ttt")
    assert subject.endswith("t… (investigating)")
    assert len(subject) == 200
    assert written(message(incident(title="\x07"), type="incident.resolved"))["Subject"] == "[Acme] Resolved"


def test_whoever_has_to_agree_is_asked_and_told_nothing_else():
    letter = written(CONFIRMING)
    assert letter["Subject"] == "[Acme] Do you want to be told?"
    assert letter["List-Unsubscribe"] is letter["List-Unsubscribe-Post"] is None
    for kind in ("plain", "html"):
        assert f"forgotten after {CONFIRMATION_DAYS} days" in text_of(letter, kind).replace("\n", " ")
    token = text_of(letter).partition(f"{SETTINGS.public_url}/confirm/")[2].split()[0]
    assert Links(SETTINGS).read(CONFIRM, token) == (7, 8)
    assert f"{SETTINGS.public_url}/confirm/{token}" in text_of(letter, "html")


def test_a_test_says_that_it_is_one():
    letter = written(message({"id": 8}, "subscription", type="subscription.test"))
    assert letter["Subject"] == "[Acme] This is a test: messages reach you"
    assert "This is a test" in text_of(letter)
    assert letter["List-Unsubscribe-Post"]


def test_what_people_wrote_is_no_markup():
    hostile = '<script>alert("1")</script>{{ 7 * 7 }}'
    html = text_of(written(message(incident(title=hostile, description=hostile))), "html")
    assert "<script>" not in html
    assert "{{ 7 * 7 }}" in html
    assert hostile in text_of(written(message(incident(description=hostile))))


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
def test_no_title_breaks_out_of_its_line(title):
    sent = message(incident(title=title), tenant={"slug": "acme", "name": title}, type="incident.updated")
    letter = written(sent)
    assert len(letter["Subject"]) <= 200
    assert letter["Subject"].startswith("[")
    assert "] Update: " in letter["Subject"]
    assert letter["Subject"].endswith(" (investigating)")
    assert not any(character in letter["Subject"] for character in "\r\n\u202e\u2066\x1b\x00")
    assert letter["Bcc"] is None
    assert len(letter.keys()) == len(set(letter.keys())) == 13


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1), st.text(), st.text(), st.integers(1, 20_000))
def test_whatever_people_wrote_an_e_mail_has_no_defects(title, name, words, times):
    subject = incident(title=title, description=(words * times)[:50_000], updates=[update(42, words)])
    written(message(subject, tenant={"slug": "acme", "name": name}))

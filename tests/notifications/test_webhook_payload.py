import json
from datetime import timedelta, timezone
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from opsentry.notifications.channel import Change
from opsentry.notifications.messages import webhook_payload
from opsentry.notifications.messages.webhook_payload import MAX_BYTES, Payload, PayloadEncoder
from tests.notifications.messages import AT, incident, message, update, window

_SCHEMA = Path(webhook_payload.__file__).with_name("webhook.schema.json")
# Long texts from short examples, of characters that take one to six bytes in JSON.
_LONG = st.builds(lambda text, times: (text * times)[:50_000], st.text(min_size=1, max_size=5), st.integers(1, 50_000))
_TITLES = st.builds(lambda text, times: (text * times)[:300], st.text(min_size=1, max_size=5), st.integers(1, 300))
_SERVICES = st.lists(_TITLES, max_size=3).flatmap(
    lambda names: st.builds(
        lambda times: [{"id": n, "slug": "s" * 63, "name": name} for n, name in enumerate(names * times)],
        st.integers(0, 200),
    )
)
_UPDATES = st.lists(_LONG, max_size=4).flatmap(
    lambda texts: st.builds(lambda times: [update(n, t) for n, t in enumerate(texts * times)], st.integers(0, 20))
)


def encoded(sent):
    """Return the payload as bytes and decoded, after a check that the schema describes all of it."""
    body = PayloadEncoder().encode(sent)
    assert len(body) < MAX_BYTES
    decoded = msgspec.json.decode(body, type=Payload)
    assert msgspec.json.decode(msgspec.json.encode(decoded)) == msgspec.json.decode(body)
    return body, decoded


def test_the_published_schema_matches_the_structs():
    assert json.loads(_SCHEMA.read_text()) == webhook_payload.schema()


def test_a_payload_has_these_fields():
    body, _ = encoded(message(changes=[Change(41, "incident.opened", AT), Change(42, "incident.updated", AT)]))
    assert list(json.loads(body).items()) == [
        ("version", 1),
        ("id", "msg_0123456789abcdef0123456789abcdef"),
        ("type", "incident.opened"),
        ("timestamp", "2026-03-01T12:30:05.123456Z"),
        ("position", 42),
        ("tenant", {"slug": "acme", "name": "Acme"}),
        (
            "changes",
            [
                {"position": 41, "type": "incident.opened", "recorded_at": "2026-03-01T12:30:05.123456Z"},
                {"position": 42, "type": "incident.updated", "recorded_at": "2026-03-01T12:30:05.123456Z"},
            ],
        ),
        ("data", {"incident": incident()}),
    ]


def test_times_are_in_utc():
    there = timezone(timedelta(hours=5, minutes=30))
    _, sent = encoded(message(changes=[Change(42, "incident.opened", AT.astimezone(there))]))
    assert sent.timestamp.utcoffset() == sent.changes[0].recorded_at.utcoffset() == timedelta(0)
    assert sent.timestamp == AT


def test_the_schema_describes_each_kind_of_subject():
    internal = {"visibility": "internal", "root_cause": None, "postmortem": "It was DNS."}
    written = update(5, is_public=False, author="Kim")
    assert encoded(message(incident(**internal, updates=[written])))[1].data.incident.postmortem == "It was DNS."
    assert encoded(message(window(), "maintenance"))[1].data.maintenance.title == "Database upgrade"
    encoded(message(window(visibility="internal", updates=[written]), "maintenance"))
    assert encoded(message({"id": 5, "channel": "webhook"}, "subscription"))[1].data.subscription == {
        "id": 5,
        "channel": "webhook",
    }


def test_a_long_payload_omits_as_few_of_the_oldest_entries_as_possible():
    updates = [update(n, f"{n} " + "words " * 100) for n in range(100)]
    body, sent = encoded(message(incident(updates=updates)))
    kept = sent.data.incident.updates
    assert [entry.id for entry in kept] == list(range(100 - len(kept), 100))
    assert sent.data.incident.updates_omitted == 100 - len(kept)
    assert sent.data.incident.shortened is msgspec.UNSET
    assert len(body) > MAX_BYTES - 1_500


def test_long_texts_are_shortened_and_named():
    subject = incident(description="a" * 50_000, updates=[update(n, "b" * 50_000) for n in range(3)])
    _, sent = encoded(message(subject))
    assert sent.data.incident.shortened == ["description", "updates.message"]
    assert sent.data.incident.description.endswith("a…")
    assert [entry.id for entry in sent.data.incident.updates] == [2]
    assert sent.data.incident.updates[0].message.endswith("b…")
    assert len(sent.data.incident.description) == 4_000
    assert sent.data.incident.title == "Checkout is slow"


def test_long_lists_are_cut_and_counted():
    services = [{"id": n, "slug": f"s{n}", "name": "n" * 300} for n in range(500)]
    _, sent = encoded(message(incident(services=services, service_ids=list(range(500)))))
    shown = sent.data.incident
    assert 0 < len(shown.services) == 500 - shown.services_omitted
    assert [service.id for service in shown.services] == list(range(len(shown.services)))
    assert len(shown.service_ids) == 500 - shown.service_ids_omitted


def test_only_the_newest_fifty_changes_are_reported():
    changes = [Change(n, "incident.updated", AT) for n in range(200)]
    _, sent = encoded(message(changes=changes))
    assert [change.position for change in sent.changes] == list(range(150, 200))


def test_the_cache_never_mixes_up_messages():
    encoder = PayloadEncoder()
    one, other = incident(title="One"), incident(title="Other")
    for sent in (
        message(one),
        message(one, id="msg_2"),
        message(other),
        message(one, type="incident.updated"),
        message(one, tenant={"slug": "acme", "name": "Renamed"}),
        message(one, changes=[Change(42, "incident.updated", AT)]),
        message(one, position=43),
    ):
        assert encoder.encode(sent) == encoder.encode(sent) == PayloadEncoder().encode(sent)
        assert json.loads(encoder.encode(sent))["id"] == sent.id
    for number in range(1000):
        made = incident(id=number)
        assert json.loads(encoder.encode(message(made)))["data"]["incident"]["id"] == number


@settings(max_examples=150, deadline=None)
@given(_TITLES, _LONG, _LONG, _LONG, _SERVICES, _UPDATES, st.integers(1, 100), _TITLES)
def test_a_payload_never_exceeds_the_limit(
    title, description, root_cause, postmortem, services, updates, changes, name
):
    subject = incident(
        title=title,
        description=description,
        root_cause=root_cause,
        postmortem=postmortem,
        services=services,
        service_ids=[10**18 + service["id"] for service in services],
        updates=updates,
    )
    encoded(
        message(
            subject,
            changes=[Change(10**18 + n, "incident.severity_changed", AT) for n in range(changes)],
            tenant={"slug": "s" * 63, "name": name},
        )
    )

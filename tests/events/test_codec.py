import json
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from opsentry.domain.decider import REDACTED, Event
from opsentry.domain.events import EVENT_TYPES
from opsentry.domain.incident import IncidentEdited, IncidentOpened
from opsentry.events import codec
from opsentry.events.codec import Actor, Meta, UnknownEvent, decode, decode_meta, encode, encode_meta

# Every shape that a release has written. Entries are added but never changed, because ledgers hold them.
GOLDEN_FILE = Path(__file__).with_name("golden.json")
GOLDEN: list[dict[str, Any]] = json.loads(GOLDEN_FILE.read_text())
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def plain(event: Event) -> dict[str, Any]:
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    return {
        name: value.isoformat() if isinstance(value, datetime) else list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
        if value is not UNSET
    }


def stored(entry: dict[str, Any]) -> tuple[str, int, str, str | None]:
    return entry["type"], entry["version"], entry["data"], entry["erasable"]


def test_every_version_of_every_event_is_in_the_golden_file():
    written = {(entry["type"], entry["version"]) for entry in GOLDEN}
    known = {(name, version) for name, kind in EVENT_TYPES.items() for version in range(1, kind.VERSION + 1)}
    assert written == known


def test_every_field_is_in_the_golden_file_with_a_value():
    seen: dict[str, set[str]] = {name: set() for name in EVENT_TYPES}
    for entry in GOLDEN:
        if entry["version"] == EVENT_TYPES[entry["type"]].VERSION:
            seen[entry["type"]] |= {name for name, value in entry["fields"].items() if value is not None}
    assert seen == {name: set(kind.__struct_fields__) for name, kind in EVENT_TYPES.items()}


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["type"])
def test_every_stored_version_is_decoded(entry):
    event = decode(*stored(entry))
    assert type(event) is EVENT_TYPES[entry["type"]]
    assert plain(event) == entry["fields"]


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: entry["type"])
def test_the_current_version_is_encoded_as_stored(entry):
    if entry["version"] == EVENT_TYPES[entry["type"]].VERSION:
        assert encode(decode(*stored(entry))) == stored(entry)


@pytest.mark.parametrize("entry", [e for e in GOLDEN if e["erasable"]], ids=lambda entry: entry["type"])
def test_erased_text_reads_redacted_and_facts_stay(entry):
    erasable = json.loads(entry["erasable"])
    event = decode(entry["type"], entry["version"], entry["data"], None)
    assert plain(event) == entry["fields"] | dict.fromkeys(erasable, REDACTED)


@pytest.mark.parametrize("name", EVENT_TYPES)
@given(data=st.data())
def test_facts_never_contain_erasable_text(name, data):
    kind = EVENT_TYPES[name]
    fullest = max((e for e in GOLDEN if e["type"] == name), key=lambda e: len(e["erasable"] or ""))
    marks = {field: f"§{data.draw(TEXT)}§" for field in sorted(kind.ERASABLE)}
    event = msgspec.structs.replace(decode(*stored(fullest)), **marks)
    encoded = encode(event)
    assert "§" not in encoded.data
    assert encoded.erasable is None or json.loads(encoded.erasable) == marks
    assert (encoded.erasable is None) == (not kind.ERASABLE)
    assert decode(*encoded) == event


def test_unset_cleared_and_empty_text_stay_distinct():
    for edited in (
        IncidentEdited(title="t"),
        IncidentEdited(title="t", description=None),
        IncidentEdited(title="t", description=""),
    ):
        assert decode(*encode(edited)) == edited


def test_equal_events_have_the_same_encoding():
    one = IncidentOpened(title="t", severity="critical", visibility="public", service_ids=(1, 2), source="s")
    other = IncidentOpened(source="s", service_ids=(1, 2), visibility="public", severity="critical", title="t")
    assert encode(one) == encode(other)


@pytest.mark.parametrize(
    ("name", "version", "data", "erasable"),
    [
        ("incident.exploded", 1, "{}", None),
        ("incident.reopened", 2, "{}", None),
        ("incident.reopened", 0, "{}", None),
        ("incident.status_changed", 1, "{}", None),
        ("incident.status_changed", 1, '{"status":7}', None),
        ("incident.status_changed", 1, "not json", None),
        ("incident.status_changed", 1, "[]", None),
        ("incident.status_changed", 1, "[" * 100_000, None),
        ("incident.updated", 1, '{"status":"monitoring","erasable":["message"]}', "not json"),
        ("incident.updated", 1, '{"status":"monitoring","erasable":["message"]}', "[]"),
        ("incident.updated", 1, '{"status":"monitoring","erasable":7}', None),
        ("incident.updated", 1, '{"status":"monitoring"}', None),
    ],
)
def test_undecodable_columns_raise_an_error_with_the_type(name, version, data, erasable):
    with pytest.raises(UnknownEvent, match=name.replace(".", r"\.")):
        decode(name, version, data, erasable)


def test_upcasters_bring_an_old_version_forward_step_by_step(monkeypatch):
    class Renamed(Event, frozen=True, kw_only=True):
        TYPE = "incident.renamed"
        VERSION = 3
        REDACTABLE_FIELDS = frozenset({"title"})
        title: str
        reason: str

    monkeypatch.setitem(EVENT_TYPES, Renamed.TYPE, Renamed)
    monkeypatch.setitem(codec.UPCASTERS, (Renamed.TYPE, 1), lambda old: {"title": old["name"]})
    monkeypatch.setitem(codec.UPCASTERS, (Renamed.TYPE, 2), lambda old: old | {"reason": "unknown"})
    current: Event = Renamed(title="New", reason="unknown")
    assert decode(Renamed.TYPE, 1, '{"erasable":["name"]}', '{"name":"New"}') == current
    assert decode(Renamed.TYPE, 2, '{"erasable":["title"]}', '{"title":"New"}') == current
    assert decode(*encode(current)) == current
    erased: Event = Renamed(title=REDACTED, reason="unknown")
    assert decode(Renamed.TYPE, 1, '{"erasable":["name"]}', None) == erased


def test_an_old_version_without_an_upcaster_is_unknown(monkeypatch):
    class Renamed(Event, frozen=True, kw_only=True):
        TYPE = "incident.renamed"
        VERSION = 2

    monkeypatch.setitem(EVENT_TYPES, Renamed.TYPE, Renamed)
    with pytest.raises(UnknownEvent):
        decode(Renamed.TYPE, 1, "{}", None)


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        (Meta(Actor("operator")), '{"actor":{"kind":"operator"}}'),
        (Meta(Actor("scheduler")), '{"actor":{"kind":"scheduler"}}'),
        (
            Meta(Actor("token", 7), request_id="r-1", silent=True),
            '{"actor":{"kind":"token","id":7},"request_id":"r-1","silent":true}',
        ),
    ],
)
def test_stored_meta_data_is_decoded(meta, text):
    assert encode_meta(meta) == text
    assert decode_meta(text) == meta


@pytest.mark.parametrize("text", ["", "null", "{}", '{"actor":"me"}', "[" * 100_000])
def test_undecodable_meta_data_raises_an_error(text):
    with pytest.raises(UnknownEvent, match="meta data"):
        decode_meta(text)

"""Encode events to the exact text that the ledger stores, and decode every version of it."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Literal, NamedTuple, cast

import msgspec
from msgspec import UNSET

from opsentry.domain.decider import REDACTED, Event
from opsentry.domain.events import EVENT_TYPES, AnyEvent
from opsentry.domain.redaction import HistoryEntry

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_encode = msgspec.json.Encoder(order="sorted").encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


ActorKind = Literal["token", "user", "operator", "scheduler", "importer", "sender", "visitor", "alert_source"]


class Actor(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Identify the cause of an event by its kind and the id of its row.

    Attributes:
        kind: `token` (API client), `user` (admin pages), `operator` (command line), `scheduler`, `importer`, `sender`
            (a delivery's response), `visitor` (public page) or `alert_source`.
        id: The token's, user's or alert source's id within the tenant; `None` for the other kinds.
    """

    kind: ActorKind
    id: int | None = None


class Meta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Describe the circumstances of an event by ids only, never by names or addresses.

    Attributes:
        actor: The event's cause.
        request_id: The HTTP request that caused it, if one did.
        silent: Whether the event notifies nobody.
    """

    actor: Actor
    request_id: str | None = None
    silent: bool = False


class RecordedEvent(msgspec.Struct, frozen=True, gc=False):
    """Hold an event with its place in the ledger and in its stream."""

    tenant_id: int
    position: int
    kind: str
    stream_id: int
    version: int
    event: AnyEvent
    occurred_at: datetime
    recorded_at: datetime
    meta: Meta


def history_entries(history: Iterable[RecordedEvent]) -> list[HistoryEntry]:
    """Return a stream's events in the form that `plan_redaction` reads."""
    return [HistoryEntry(recorded.version, recorded.position, recorded.event) for recorded in history]


class Encoded(NamedTuple):
    """Hold an event's columns: `data` has the facts, `erasable` the free text (`None` if there is none)."""

    type: str
    schema_version: int
    data: str
    erasable: str | None


class UnknownEvent(Exception):
    """The ledger holds an event that this version of Opsentry cannot decode.

    Attributes:
        kind: The kind of its stream, if it was read from a ledger.
        position: Its position, if it was read from a ledger.
    """

    kind: str | None = None
    position: int | None = None


# (event type, schema version) → function from that version's fields to the next version's. Entries stay forever,
# because ledgers keep events of every version.
UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {}

_meta_decoder = msgspec.json.Decoder(Meta)
_meta_encoder = msgspec.json.Encoder()


def encode(event: Event) -> Encoded:
    """Return the event's columns.

    `data` lists the names of the erasable fields, so that a reader knows after a redaction which fields had text.
    """
    facts: dict[str, Any] = {}
    erasable: dict[str, str] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if value is UNSET:
            continue
        if name in event.ERASABLE and value is not None:
            erasable[name] = value
        else:
            facts[name] = value
    if erasable:
        facts["erasable"] = sorted(erasable)
    return Encoded(event.TYPE, event.VERSION, _encode(facts).decode(), _encode(erasable).decode() if erasable else None)


def decode(type_: str, schema_version: int, data: str, erasable: str | None) -> AnyEvent:
    """Return the event that these columns hold, with `[redacted]` for erased text.

    Raises:
        UnknownEvent: The type is unknown, the version is newer than this code's, or the fields do not fit the type.
    """
    event_type = EVENT_TYPES.get(type_)
    if event_type is None or schema_version > event_type.VERSION:
        raise UnknownEvent(f"{type_} version {schema_version} is unknown to this version of Opsentry")
    try:
        # Nearly all events have the current version and their text. Both columns are joined to one JSON object, because
        # decoding once is faster.
        if schema_version == event_type.VERSION and data[:2] == '{"' and data[-1:] == "}":
            if erasable is not None and erasable[:2] == '{"':
                return cast("AnyEvent", _decoder(event_type)(f"{data[:-1]},{erasable[1:]}"))
            if erasable is None and '"erasable"' not in data:
                return cast("AnyEvent", _decoder(event_type)(data))
        fields = readable(data, erasable)
        for version in range(schema_version, event_type.VERSION):
            fields = UPCASTERS[type_, version](fields)
        return cast("AnyEvent", msgspec.convert(fields, event_type))
    except (msgspec.MsgspecError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UnknownEvent(f"{type_} version {schema_version} has unexpected fields: {error}") from error


def readable(data: str, erasable: str | None) -> dict[str, Any]:
    """Return an event's facts and text as one object, in the version in which it was stored.

    Raises:
        msgspec.DecodeError: A column is not a JSON object.
    """
    fields = _decode(data)
    names = fields.pop("erasable", ())
    fields.update(_decode(erasable) if erasable is not None else dict.fromkeys(names, REDACTED))
    return fields


@cache
def _decoder(event_type: type[Event]) -> Callable[[str], Event]:
    return msgspec.json.Decoder(event_type).decode


def encode_meta(meta: Meta) -> str:
    """Return `meta` as the ledger stores it."""
    return _meta_encoder.encode(meta).decode()


def decode_meta(text: str) -> Meta:
    """Return the meta data that `text` holds.

    Raises:
        UnknownEvent: The fields are not those of `Meta`.
    """
    try:
        return _meta_decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UnknownEvent(f"meta data has unexpected fields: {error}") from error


def to_microseconds(moment: datetime) -> int:
    """Return whole microseconds since 1970 UTC."""
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(microseconds: int) -> datetime:
    """Return the time `microseconds` after the start of 1970 UTC; raise `OverflowError` beyond the calendar."""
    return _EPOCH + microseconds * _MICROSECOND

"""Between events as objects and events as the exact text that the log keeps."""

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
    """The metadata of an event: ids only, never names or addresses.

    `silent` says that nobody is to be notified of it.
    """

    actor: Actor
    request_id: str | None = None
    silent: bool = False


class RecordedEvent(msgspec.Struct, frozen=True, gc=False):
    """An event with its place in the ledger."""

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
    """Return a stream's events as an erasure looks at them."""
    return [HistoryEntry(recorded.version, recorded.position, recorded.event) for recorded in history]


class Encoded(NamedTuple):
    """An event as columns: `data` holds facts, `erasable` what people wrote (`None` where they wrote nothing)."""

    type: str
    schema_version: int
    data: str
    erasable: str | None


class UnknownEvent(Exception):
    """The log holds an event that this version of Opsentry cannot read.

    Attributes:
        kind: The kind of stream it lies in, where it was read from the log.
        position: Its position there.
    """

    kind: str | None = None
    position: int | None = None


# (event type, schema version) → function from that version's fields to the next version's. Entries stay forever,
# because ledgers keep events of every version.
UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {}

_meta_decoder = msgspec.json.Decoder(Meta)
_meta_encoder = msgspec.json.Encoder()


def encode(event: Event) -> Encoded:
    """Return the event as the log keeps it.

    The facts name the fields that have erasable, so that a reader knows what was there after an erasure.
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
    """Return the event that these columns hold; erased erasable read `[redacted]`.

    Raises:
        UnknownEvent: Its type, or a version newer than this code's, is unknown, or its fields do not fit.
    """
    event_type = EVENT_TYPES.get(type_)
    if event_type is None or schema_version > event_type.VERSION:
        raise UnknownEvent(f"{type_} version {schema_version} is not known to this version of Opsentry")
    try:
        # Nearly all events are of this version and whole: facts and erasable become one object's text, decoded in
        # one go.
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
        raise UnknownEvent(f"{type_} version {schema_version} does not have the fields it should: {error}") from error


def readable(data: str, erasable: str | None) -> dict[str, Any]:
    """Return an event's fields, facts and erasable together, as they were written; erased erasable read `[redacted]`.

    Raises:
        msgspec.DecodeError: One of them is not a JSON object.
    """
    fields = _decode(data)
    names = fields.pop("erasable", ())
    fields.update(_decode(erasable) if erasable is not None else dict.fromkeys(names, REDACTED))
    return fields


@cache
def _decoder(event_type: type[Event]) -> Callable[[str], Event]:
    return msgspec.json.Decoder(event_type).decode


def encode_meta(meta: Meta) -> str:
    """Return `meta` as the log keeps it."""
    return _meta_encoder.encode(meta).decode()


def decode_meta(text: str) -> Meta:
    """Return the meta data that `text` holds.

    Raises:
        UnknownEvent: Its fields are not those that meta data has.
    """
    try:
        return _meta_decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UnknownEvent(f"meta data does not have the fields it should: {error}") from error


def to_microseconds(moment: datetime) -> int:
    """Return whole microseconds since 1970 UTC."""
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(microseconds: int) -> datetime:
    """Return the time this many microseconds after 1970 began in UTC; raise `OverflowError` outside of the calendar."""
    return _EPOCH + microseconds * _MICROSECOND

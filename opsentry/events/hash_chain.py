"""Recompute the hash chain of a tenant's ledger from its rows.

`hash = sha256(previous hash || canonical)`. `canonical` concatenates netstrings (`<octets>:<bytes>,`; Bernstein, 1997)
of tenant id, position, stream kind, stream id, version, type, schema version, occurred_at, recorded_at, data, meta and
erasable digest. Times are whole microseconds since 1970 UTC. The digest is lower-case hex, empty without erasable text.
The previous hash of the first event is 32 zero octets.
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain, islice
from typing import Literal, NamedTuple, TypeAlias

GENESIS = bytes(32)

# A gap that was closed by renumbering is found if it is smaller than this.
_MAX_CLOSED_GAP_EVENTS = 64


class Link(NamedTuple):
    """Hold a row of `events`. Times are whole microseconds since 1970 UTC, `None` for an infinity."""

    tenant_id: int
    position: int
    stream_kind: str
    stream_id: int
    version: int
    type: str
    schema_version: int
    occurred_at: int | None
    recorded_at: int | None
    data: str
    meta: str
    erasable: str | None
    salt: bytes | None
    erasable_digest: bytes | None
    hash: bytes


ViolationKind: TypeAlias = Literal["changed", "missing", "reordered", "duplicated", "inserted", "truncated", "erased"]


class Violation(NamedTuple):
    """Locate the first fault of a ledger.

    Attributes:
        position: The position at which the fault begins.
        kind: The kind of fault. `erased` means erasable text that is gone without a redaction event.
        message: A description whose subject, "it", is the event at `position`.
    """

    position: int
    kind: ViolationKind
    message: str


def canonical(link: Link) -> bytes:
    """Return the octets that the event's hash covers after the previous hash."""
    tenant_id, position, kind, stream_id, version, type_, schema, occurred_at, recorded_at, data, meta, *_ = link
    digest = link[13]
    facts, about = data.encode(), meta.encode()
    begin = (
        f"{len(str(tenant_id))}:{tenant_id},{len(str(position))}:{position},{len(kind.encode())}:{kind},"
        f"{len(str(stream_id))}:{stream_id},{len(str(version))}:{version},{len(type_.encode())}:{type_},"
        f"{len(str(schema))}:{schema},{len(str(occurred_at))}:{occurred_at},{len(str(recorded_at))}:{recorded_at},"
    ).encode()
    end = b"0:," if digest is None else b"%d:%b," % (2 * len(digest), digest.hex().encode())
    return b"%b%d:%b,%d:%b,%b" % (begin, len(facts), facts, len(about), about, end)


def check(rows: Iterable[Link], previous: bytes = GENESIS, position: int = 0) -> Violation | None:
    """Return the first violation among `rows`, `None` if each row follows from the one before.

    The existence and the position of a violation are certain. Its kind is inferred from the rows after it.

    Args:
        rows: Events of one tenant in stored order, the first one expected right after `position`.
        previous: The hash of the event at `position`.
        position: The last position before `rows`.
    """
    source = iter(rows)
    last = None
    for row in source:
        position += 1
        if row[1] != position or row[14] != sha256(previous + canonical(row)).digest():
            return _diagnose(row, source, last, previous, position)
        erasable, salt, digest = row[11], row[12], row[13]
        if erasable is None:
            if salt is not None:
                return Violation(position, "changed", "it has a salt without erasable text")
        elif salt is None or digest is None or sha256(salt + erasable.encode()).digest() != digest:
            return Violation(position, "changed", "its erasable text is not the recorded text")
        previous = row[14]
        last = row
    return None


def _follows(row: Link, previous: bytes, position: int) -> bool:
    """Return whether this event was recorded at `position`, after the event with the hash `previous`."""
    return row.hash == sha256(previous + canonical(row._replace(position=position))).digest()


def _diagnose(row: Link, rest: Iterator[Link], last: Link | None, previous: bytes, position: int) -> Violation:
    row, rest = Link(*row), (Link(*later) for later in rest)
    if row.position < position:
        return Violation(row.position, "duplicated", "it exists more than once")
    if row.position > position:
        if any(later.position == position for later in rest):
            return Violation(position, "reordered", f"it is stored after event {row.position}")
        return Violation(position, "missing", f"event {row.position} is the next one")
    near = [row, *islice(rest, _MAX_CLOSED_GAP_EVENTS)]
    if len(near) > 1 and near[1].position == position:
        return Violation(position, "duplicated", "it exists more than once")
    if last is not None and row[2:7] == last[2:7]:
        return Violation(position, "duplicated", "it repeats the event before it")
    true = next((other for other in chain(near[1:], rest) if _follows(other, previous, position)), None)
    if true is None:
        return _changed_or_missing(near, position)
    if true is not near[1] or _follows(row, true.hash, position + 1):
        return Violation(position, "reordered", f"the event of this position is stored at {true.position}")
    if any(row[2:7] == other[2:7] for other in near[1:]):
        return Violation(position, "duplicated", "it is a copy of another event")
    return Violation(position, "inserted", "it was not recorded; the recorded event follows it")


def _changed_or_missing(near: list[Link], position: int) -> Violation:
    """Distinguish a changed event from a gap that was closed by renumbering the later events."""
    for shift in range(1, _MAX_CLOSED_GAP_EVENTS):
        if len(near) > 1 and _follows(near[1], near[0].hash, position + 1 + shift):
            return Violation(
                position, "missing", f"{shift} events are missing here, and the later ones were renumbered"
            )
    return Violation(position, "changed", "it is not the recorded event")

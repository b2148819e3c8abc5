"""The hash chain of a tenant's ledger, as an outsider would recompute it.

`hash = sha256(previous hash || canonical)`, where `canonical` is the concatenation of netstrings
(`<octets>:<bytes>,`, Bernstein 1997) of: tenant id, position, stream kind, stream id, version, type, schema version,
occurred_at and recorded_at (whole microseconds since 1970 UTC), data, meta, and the erasable' digest (lower-case hex,
empty where there are no erasable). The first event's previous hash is 32 zero octets.
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain, islice
from typing import NamedTuple

GENESIS = bytes(32)

# Removed events that can be recognized after later events were renumbered, at most.
_LOOK_AROUND = 64


class Link(NamedTuple):
    """A row of `events` as it is verified; times are whole microseconds since 1970 UTC (`None`: no such time)."""

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


class Violation(NamedTuple):
    """The first violation of a ledger.

    `kind` is one of changed, missing, reordered, duplicated, inserted, truncated, erased.
    """

    position: int
    kind: str
    says: str


def canonical(link: Link) -> bytes:
    """Return the octets that are hashed for an event."""
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
    """Return the first violation among `rows`, `None` if each follows from the ones before.

    The position is certain. The kind is inferred from the rows after it.

    Args:
        rows: Events of one tenant in the order of their source, following right after `position`.
        previous: The hash of the event `position`.
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
                return Violation(position, "changed", "there is a salt without erasable")
        elif salt is None or digest is None or sha256(salt + erasable.encode()).digest() != digest:
            return Violation(position, "changed", "its erasable are not those that were recorded")
        previous = row[14]
        last = row
    return None


def _follows(row: Link, previous: bytes, position: int) -> bool:
    """Tell whether this is the event that was recorded as `position` after the event with the hash `previous`."""
    return row.hash == sha256(previous + canonical(row._replace(position=position))).digest()


def _diagnose(row: Link, rest: Iterator[Link], last: Link | None, previous: bytes, position: int) -> Violation:
    row, rest = Link(*row), (Link(*later) for later in rest)
    if row.position < position:
        return Violation(row.position, "duplicated", "it is there more than once")
    if row.position > position:
        if any(later.position == position for later in rest):
            return Violation(position, "reordered", f"it comes after event {row.position}")
        return Violation(position, "missing", f"event {row.position} is next")
    near = [row, *islice(rest, _LOOK_AROUND)]
    if len(near) > 1 and near[1].position == position:
        return Violation(position, "duplicated", "it is there more than once")
    if last is not None and row[2:7] == last[2:7]:
        return Violation(position, "duplicated", "it is the event before it once more")
    true = next((other for other in chain(near[1:], rest) if _follows(other, previous, position)), None)
    if true is None:
        return _changed_or_missing(near, position)
    if true is not near[1] or _follows(row, true.hash, position + 1):
        return Violation(position, "reordered", f"the event that belongs here stands as {true.position}")
    if any(row[2:7] == other[2:7] for other in near[1:]):
        return Violation(position, "duplicated", "an event was put in that stands elsewhere too")
    return Violation(position, "inserted", "this event was not recorded here; the one that was follows it")


def _changed_or_missing(near: list[Link], position: int) -> Violation:
    """Distinguish a changed event from removed events whose successors were renumbered."""
    for shift in range(1, _LOOK_AROUND):
        if len(near) > 1 and _follows(near[1], near[0].hash, position + 1 + shift):
            return Violation(position, "missing", f"{shift} events were removed here and the later ones renumbered")
    return Violation(position, "changed", "it is not what was recorded")

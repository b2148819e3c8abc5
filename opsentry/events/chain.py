"""The hash chain of a tenant's ledger, as an outsider would recompute it.

`hash = sha256(previous hash || canonical)`, where `canonical` is the concatenation of netstrings
(`<octets>:<bytes>,`, Bernstein 1997) of: tenant id, seq, stream kind, stream id, version, type, schema version,
occurred_at and recorded_at (whole microseconds since 1970 UTC), data, meta, and the words' digest (lower-case hex,
empty where there are no words). The first event's previous hash is 32 zero octets.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from opsentry.events.codec import to_microseconds

GENESIS = bytes(32)


def canonical(row: Mapping[str, Any]) -> bytes:
    """Return the octets that are hashed for `row`, a mapping with the columns of `events`."""
    digest: bytes | None = row["words_digest"]
    parts = (
        row["tenant_id"],
        row["seq"],
        row["stream_kind"],
        row["stream_id"],
        row["version"],
        row["type"],
        row["schema_version"],
        to_microseconds(row["occurred_at"]),
        to_microseconds(row["recorded_at"]),
        row["data"],
        row["meta"],
        "" if digest is None else digest.hex(),
    )
    octets = [str(part).encode() for part in parts]
    return b"".join(b"%d:%s," % (len(part), part) for part in octets)


def first_broken(rows: Iterable[Mapping[str, Any]], previous: bytes = GENESIS, seq: int = 0) -> int | None:
    """Return the seq of the first row that does not follow from the ones before, or `None` if all do.

    Args:
        rows: Rows of `events` of one tenant in order of seq, following right after `seq`.
        previous: The hash of the event `seq`.
        seq: The last seq before `rows`.
    """
    for row in rows:
        seq += 1
        if row["seq"] != seq or row["hash"] != sha256(previous + canonical(row)).digest():
            return seq
        words, salt, digest = row["words"], row["salt"], row["words_digest"]
        if (words is None) != (salt is None) or (words is not None and digest is None):
            return seq
        if words is not None and sha256(salt + words.encode()).digest() != digest:
            return seq
        previous = row["hash"]
    return None

"""Describe the result of a verification, and share the rules that a ledger and an export are both held to."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from opsentry.events.hash_chain import Violation

EventKey: TypeAlias = tuple[str, int, int]
"""An event's stream kind, stream id and version."""


class Anchor(NamedTuple):
    """Pin a position and its hex hash, from `/events/head`, where no owner of the database can change it."""

    position: int
    hash: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Describe a verified ledger.

    Attributes:
        tenant_id: The ledger's tenant.
        slug: The tenant's slug; `None` for an export, which does not name it.
        events: The number of verified events.
        first: Position of the first verified event.
        last: Position of the last verified event.
        hash: Hex hash of that event, to be kept as an anchor.
        redacted: The number of events whose erasable text was erased.
        violation: The first violation, `None` if there is none.
    """

    tenant_id: int
    slug: str | None
    events: int
    first: int
    last: int
    hash: str
    redacted: int
    violation: Violation | None


def first_violation(found: Sequence[Violation | None]) -> Violation | None:
    """Return the violation with the lowest position, `None` if there is none."""
    present = [violation for violation in found if violation is not None]
    return min(present, key=lambda violation: violation.position, default=None)


def redacted_versions(data: str) -> Sequence[int]:
    """Return the versions that a redaction event names in its `data`; none if it cannot be read."""
    try:
        return [int(version) for version in json.loads(data)["versions"]]
    except (ValueError, LookupError, TypeError):
        return ()


def find_unrecorded_erasure(erased: Mapping[EventKey, int], recorded: Collection[EventKey]) -> Violation | None:
    """Return the first event whose erasable text is gone although no redaction event names it.

    Args:
        erased: The positions of events without their erasable text.
        recorded: The events that redaction events name.
    """
    position = min((position for key, position in erased.items() if key not in recorded), default=None)
    if position is None:
        return None
    return Violation(position, "erased", "its erasable text was erased, and no event records the redaction")

"""Verify an export of a ledger without a database, in constant memory."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opsentry.events import export
from opsentry.events.hash_chain import GENESIS, Link, Violation, check
from opsentry.events.verdict import (
    Anchor,
    EventKey,
    Verdict,
    find_unrecorded_erasure,
    first_violation,
    redacted_versions,
)

_PROGRESS_INTERVAL_EVENTS = 2_000


class BadExport(Exception):
    """The file is not an export: its first line cannot be read, or it has none."""


def verify_export(
    path: Path, *, anchors: Sequence[Anchor] = (), advance: Callable[[int], None] = lambda _done: None
) -> Verdict:
    """Verify an export of one tenant, whole or partial.

    A partial export proves that it is complete in itself and continues from the hash that its first line names.

    Args:
        path: The file, compressed by gzip or not.
        anchors: Positions and hashes that the export must contain.
        advance: Receives the number of events verified since its last call.

    Raises:
        BadExport: The file is not an export.
        OSError: The file cannot be read.
    """
    with export.opened(path) as file:
        lines = _Lines(export.Reader(file).links(), {anchor.position: anchor.hash for anchor in anchors}, advance)
        if lines.first is None:
            raise BadExport(f"{path.name}: {lines.unreadable or 'is empty'}")
        violation = check(lines, lines.previous, lines.first - 1)
    advance(lines.count % _PROGRESS_INTERVAL_EVENTS)
    if lines.unreadable is not None:
        violation = first_violation([violation, Violation(lines.last + 1, "changed", lines.unreadable)])
    missing_anchor = min((position for position in lines.anchors if position > lines.last), default=None)
    if missing_anchor is not None:
        message = f"the export ends before it; the anchor names position {missing_anchor}"
        lines.violations.append(Violation(lines.last + 1, "truncated", message))
    lines.violations.append(find_unrecorded_erasure(lines.erased, lines.recorded))
    return Verdict(
        tenant_id=lines.tenant_id,
        slug=None,
        events=lines.count,
        first=lines.first,
        last=lines.last,
        hash=lines.hash.hex(),
        redacted=len(lines.erased),
        violation=first_violation([violation, *lines.violations]),
    )


class _Lines:
    """Iterate over an export's rows and collect the findings that the chain alone does not show."""

    def __init__(
        self, links: Iterator[tuple[Link, bytes]], anchors: dict[int, str], advance: Callable[[int], None]
    ) -> None:
        self.anchors = anchors
        self.erased: dict[EventKey, int] = {}
        self.recorded: set[EventKey] = set()
        self.violations: list[Violation | None] = []
        self.unreadable: str | None = None
        self.count = self.last = 0
        self.hash = GENESIS
        self._links = self._readable(links)
        self._advance = advance
        beginning = next(self._links, None)
        self.first = None
        if beginning is not None:
            self._links = _after(beginning, self._links)
            self.tenant_id, self.first, self.previous = beginning[0].tenant_id, beginning[0].position, beginning[1]
            if self.first == 1 and self.previous != GENESIS:
                self.violations.append(Violation(1, "changed", "its previous hash must be 32 zero octets"))

    def _readable(self, links: Iterator[tuple[Link, bytes]]) -> Iterator[tuple[Link, bytes]]:
        try:
            yield from links
        except export.Unreadable as error:
            self.unreadable = str(error)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self.unreadable = f"the compressed file is incomplete or damaged: {error}"

    def __iter__(self) -> Iterator[Link]:
        previous = self.previous
        for link, named_previous in self._links:
            if link.tenant_id != self.tenant_id:
                self.violations.append(Violation(link.position, "inserted", f"it belongs to tenant {link.tenant_id}"))
            if named_previous != previous:
                self.violations.append(Violation(link.position, "changed", "its line names another previous hash"))
            anchored = self.anchors.get(link.position)
            if anchored is not None and anchored != link.hash.hex():
                message = "it, or an event before it, differs from the one that the anchor names"
                self.violations.append(Violation(link.position, "changed", message))
            if link.erasable is None and link.erasable_digest is not None:
                self.erased[link.stream_kind, link.stream_id, link.version] = link.position
            if link.type.endswith(".redacted"):
                versions = redacted_versions(link.data)
                self.recorded |= {(link.stream_kind, link.stream_id, version) for version in versions}
            previous = self.hash = link.hash
            self.last = max(self.last, link.position)
            self.count += 1
            if self.count % _PROGRESS_INTERVAL_EVENTS == 0:
                self._advance(_PROGRESS_INTERVAL_EVENTS)
            yield link


def _after(first: tuple[Link, bytes], rest: Iterator[tuple[Link, bytes]]) -> Iterator[tuple[Link, bytes]]:
    yield first
    yield from rest

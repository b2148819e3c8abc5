"""Verify exports of ledgers, without a database."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opsentry.events import export
from opsentry.events.hash_chain import GENESIS, Link, Violation, check
from opsentry.events.verification import (
    BATCH,
    Anchor,
    Erased,
    Verdict,
    first_violation,
    redacted_versions,
    unrecorded_erasure,
)


class BadExport(Exception):
    """The file is not an export: its first line is unreadable."""


def verify_export(
    path: Path, *, anchors: Sequence[Anchor] = (), advance: Callable[[int], None] = lambda _done: None
) -> Verdict:
    """Verify the export of one tenant's ledger, or of a part of it, in constant memory.

    A part is verified from the previous hash that its first line names.

    Raises:
        BadExport: It has no readable line.
        OSError: The file cannot be read.
    """
    with export.opened(path) as file:
        lines = _Lines(export.Reader(file).links(), {anchor.position: anchor.hash for anchor in anchors}, advance)
        if lines.first is None:
            raise BadExport(f"{path.name}: {lines.broken or 'is empty'}")
        violation = check(lines, lines.previous, lines.first - 1)
    advance(lines.count % BATCH)
    if lines.broken is not None:
        violation = first_violation([violation, Violation(lines.last + 1, "changed", lines.broken)])
    beyond = min((position for position in lines.anchors if position > lines.last), default=None)
    if beyond is not None:
        cut = Violation(lines.last + 1, "truncated", f"the export ends before it; the anchor names position {beyond}")
        lines.violations.append(cut)
    lines.violations.append(unrecorded_erasure(lines.erased, lines.recorded))
    return Verdict(
        tenant_id=lines.tenant_id,
        slug=None,
        events=lines.count,
        first=lines.first,
        last=lines.last,
        hash=lines.hash.hex(),
        erased=len(lines.erased),
        violation=first_violation([violation, *lines.violations]),
    )


class _Lines:
    """The rows of an export. Collects the violations that the chain alone does not show."""

    def __init__(
        self, links: Iterator[tuple[Link, bytes]], anchors: dict[int, str], advance: Callable[[int], None]
    ) -> None:
        self.anchors = anchors
        self.erased: dict[Erased, int] = {}
        self.recorded: set[Erased] = set()
        self.violations: list[Violation | None] = []
        self.broken: str | None = None
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
                self.violations.append(Violation(1, "changed", "the first event must follow 32 zero octets"))

    def _readable(self, links: Iterator[tuple[Link, bytes]]) -> Iterator[tuple[Link, bytes]]:
        try:
            yield from links
        except export.Unreadable as error:
            self.broken = str(error)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self.broken = f"the file is cut off or corrupt: {error}"

    def __iter__(self) -> Iterator[Link]:
        previous = self.previous
        for link, named in self._links:
            if link.tenant_id != self.tenant_id:
                self.violations.append(Violation(link.position, "inserted", f"it belongs to tenant {link.tenant_id}"))
            if named != previous:
                self.violations.append(Violation(link.position, "changed", "its line names another previous hash"))
            if (hash_ := self.anchors.get(link.position)) is not None and hash_ != link.hash.hex():
                says = "it, or an event before it, is not the one that the anchor names"
                self.violations.append(Violation(link.position, "changed", says))
            if link.erasable is None and link.erasable_digest is not None:
                self.erased[link.stream_kind, link.stream_id, link.version] = link.position
            if link.type.endswith(".redacted"):
                self.recorded |= {
                    (link.stream_kind, link.stream_id, version) for version in redacted_versions(link.data)
                }
            previous = self.hash = link.hash
            self.last = max(self.last, link.position)
            self.count += 1
            if self.count % BATCH == 0:
                self._advance(BATCH)
            yield link


def _after(first: tuple[Link, bytes], rest: Iterator[tuple[Link, bytes]]) -> Iterator[tuple[Link, bytes]]:
    yield first
    yield from rest

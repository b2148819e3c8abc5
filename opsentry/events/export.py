"""Write a ledger as JSON lines, so that an outsider can verify it without the database.

One line is one row of `events`, with its texts exactly as they were hashed. The format is documented in
`docs/reference/ledger-format.md`.
"""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import msgspec

from opsentry.events import audit
from opsentry.events.hash_chain import GENESIS, Link
from opsentry.infrastructure.postgres import Connection

_GZIP = b"\x1f\x8b"


class Line(msgspec.Struct, frozen=True):
    """Define a line of an export. Times are whole microseconds since 1970 UTC; octets are lower-case hex."""

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
    salt: str | None
    erasable_digest: str | None
    hash: str
    previous_hash: str


class Unreadable(Exception):
    """A line of the file is not in the format of an export."""

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"line {number}: {problem}")
        self.number = number


_encode = msgspec.json.Encoder().encode_into
_decode = msgspec.json.Decoder(Line).decode


async def chunk(connection: Connection, tenant_id: int, after: int, until: int) -> bytes:
    """Return the lines of the events after position `after`, up to `until`."""
    rows = await audit.read_hash_links(connection, tenant_id, after, until)
    previous = GENESIS if after == 0 else await audit.read_hash(connection, tenant_id, after) or b""
    buffer = bytearray()
    for row in rows:
        salt, digest, hash_ = row[12:]
        line = Line(
            *row[:12],
            None if salt is None else salt.hex(),
            None if digest is None else digest.hex(),
            hash_.hex(),
            previous.hex(),
        )
        _encode(line, buffer, len(buffer))
        buffer += b"\n"
        previous = hash_
    return bytes(buffer)


class Reader:
    """Read an export line by line, in constant memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.number = 0
        """The number of the last line read, from 1."""

    def links(self) -> Iterator[tuple[Link, bytes]]:
        """Yield each line's row, and the previous hash that the line names.

        Raises:
            Unreadable: A line is not a line of an export, or is incomplete.
        """
        for octets in self._file:
            self.number += 1
            try:
                line = _decode(octets)
                if not octets.endswith(b"\n"):
                    raise Unreadable(self.number, "is incomplete")
                link = Link(
                    line.tenant_id,
                    line.position,
                    line.stream_kind,
                    line.stream_id,
                    line.version,
                    line.type,
                    line.schema_version,
                    line.occurred_at,
                    line.recorded_at,
                    line.data,
                    line.meta,
                    line.erasable,
                    None if line.salt is None else bytes.fromhex(line.salt),
                    None if line.erasable_digest is None else bytes.fromhex(line.erasable_digest),
                    bytes.fromhex(line.hash),
                )
                previous = bytes.fromhex(line.previous_hash)
            except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
                raise Unreadable(self.number, f"is not a line of an export: {error}") from None
            yield link, previous


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open an export, compressed by gzip or not."""
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP
    if compressed:
        with gzip.open(path) as unpacked:
            yield cast("IO[bytes]", unpacked)
    else:
        with path.open("rb") as file:
            yield file

"""Conditional requests and safe retries: `If-Match`, `If-None-Match`, `Idempotency-Key`, `Opsentry-Min-Position`."""

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from http import HTTPStatus

import msgspec
from aiohttp import web

from opsentry.domain.decider import InvalidField
from opsentry.events.codec import Actor
from opsentry.events.store import IdempotencyKey
from opsentry.http.params import MAX_INTEGER

_KEY = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,254}")
_VERSION = re.compile(r'"([1-9][0-9]{0,9})(?:-[0-9]+)?"')

# The headers that a 304 repeats (RFC 9110, section 15.4.5), and ours.
_KEPT_HEADERS = ("ETag", "Link", "Opsentry-Position", "Opsentry-Lag-Events")


def entity_tags(values: Iterable[str]) -> Sequence[str]:
    """Return the entity tags in the values of a header; ours contain no comma."""
    return [tag.strip() for value in values for tag in value.split(",")]


def expected_versions(request: web.Request) -> Collection[int] | None:
    """Return the stream versions that `If-Match` names (RFC 9110, section 13.1.1), `None` for any."""
    values = request.headers.getall("If-Match", ())
    if not values:
        return None
    tags = entity_tags(values)
    return None if "*" in tags else {int(match[1]) for tag in tags if (match := _VERSION.fullmatch(tag))}


def min_position(request: web.Request) -> int:
    """Return the position that `Opsentry-Min-Position` asks for, 0 without the header.

    Raises:
        InvalidField: It is no position.
    """
    raw = request.headers.get("Opsentry-Min-Position")
    if raw is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,19}", raw, re.ASCII) or int(raw) > MAX_INTEGER:
        raise InvalidField("Opsentry-Min-Position", "must be a position, a whole number")
    return int(raw)


def idempotency_key(request: web.Request, actor: Actor, body: bytes) -> IdempotencyKey | None:
    """Return the key that makes a request safe to send again, `None` without an `Idempotency-Key`.

    The key belongs to the actor. Bodies are compared as JSON, so that spaces and the order of fields do not matter.

    Raises:
        InvalidField: The header is repeated or malformed.
    """
    values = request.headers.getall("Idempotency-Key", ())
    if not values:
        return None
    if len(values) > 1 or not _KEY.fullmatch(values[0]):
        raise InvalidField("Idempotency-Key", "must be 1 to 255 printable ASCII characters")
    body = body.strip() or b"{}"
    with suppress(msgspec.MsgspecError, RecursionError, OverflowError, UnicodeDecodeError):
        body = msgspec.json.encode(msgspec.json.decode(body), order="sorted")
    fingerprint = b"\n".join((request.method.encode(), request.path.encode(), body))
    key = f"{actor.kind}:{actor.id}:{values[0]}".encode()
    return IdempotencyKey(sha256(key).digest(), sha256(fingerprint).digest())


def not_modified(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Return `304 Not Modified` in place of `response` if the client has it (RFC 9110, section 13.1.2)."""
    known = request.headers.getall("If-None-Match", ())
    if not known or response.status != HTTPStatus.OK or request.method not in {"GET", "HEAD"}:
        return response
    current = response.headers.get("ETag")
    if current is None or not _matches(known, current):
        return response
    kept = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=kept)


def _matches(values: Iterable[str], current: str) -> bool:
    # The specification compares weakly here.
    tags = entity_tags(values)
    return "*" in tags or current.removeprefix("W/") in [tag.removeprefix("W/") for tag in tags]

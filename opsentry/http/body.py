"""Request bodies: read within bounds, decoded into the struct that an operation declares."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web

from opsentry.domain.decider import InvalidField
from opsentry.http.params import MAX_INTEGER

B = TypeVar("B", bound=msgspec.Struct)

MAX_BODY_BYTES = 64 * 1024

_JSON_MEDIA_TYPE = re.compile(r"application/(json|[\w.-]+\+json)")


class NoBody(msgspec.Struct):
    """No body is read."""


class BodyTooSlow(Exception):
    """The body did not arrive in time."""


class BodyTooLarge(Exception):
    """The body has more than `MAX_BODY_BYTES` bytes."""


class BodyBroken(Exception):
    """The body ended too early, or its encoding is not the declared one."""


class NotJson(Exception):
    """The body's media type is not JSON."""


async def read_body(request: web.Request, timeout_seconds: float) -> bytes:
    """Return the whole body.

    Raises:
        BodyTooLarge, BodyTooSlow, BodyBroken: It did not arrive whole.
    """
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise BodyTooLarge
    try:
        if request.content.is_eof():
            # A small body arrives with its head. A timer would cost more than to read it.
            return await request.read()
        async with asyncio.timeout(timeout_seconds):
            return await request.read()
    except TimeoutError:
        raise BodyTooSlow from None
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLarge from None
    except (web.RequestPayloadError, ConnectionResetError):
        raise BodyBroken from None


class BodyDecoder:
    """Decodes bodies of one type.

    Args:
        type_: The struct.
        is_optional: Whether an empty body means `{}`.
    """

    def __init__(self, type_: type[msgspec.Struct], *, is_optional: bool) -> None:
        self._decode = msgspec.json.Decoder(type_).decode
        self._is_optional = is_optional
        self._choices = _choices(type_)
        self._known = frozenset(info.encode_name for info in msgspec.structs.fields(type_))

    def decode(self, octets: bytes, media_type: str) -> Any:
        """Return the body.

        Raises:
            NotJson: The media type is not JSON.
            InvalidField: It is not what the struct wants.
        """
        if self._is_optional and not octets.strip():
            return self._decode(b"{}")
        if not _JSON_MEDIA_TYPE.fullmatch(media_type):
            raise NotJson
        try:
            return self._decode(octets)
        except msgspec.ValidationError as error:
            raise self._explain(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise InvalidField("body", "not well-formed JSON") from None
        except RecursionError:
            raise InvalidField("body", "nested too deeply") from None

    def ignored_fields(self, octets: bytes) -> Sequence[str]:
        """Return the names of top-level fields of a decoded body that the struct does not have."""
        if not octets.strip():
            return ()
        return [name for name in _names(octets) if name not in self._known]

    def _explain(self, message: str) -> InvalidField:
        """Translate msgspec's message into the client's words: the field's name and what it must be."""
        problem, _, path = message.partition(" - at `$")
        name = path.rstrip("`").removeprefix(".") or "body"
        if missing := re.fullmatch(r"Object missing required field `(.+)`", problem):
            return InvalidField(missing[1] if name == "body" else f"{name}.{missing[1]}", "is required")
        if choices := self._choices.get(name):
            return InvalidField(name, f"must be one of {', '.join(choices)}")
        for pattern, explanation in _EXPLANATIONS:
            if re.fullmatch(pattern, problem):
                return InvalidField(name, explanation)
        return InvalidField(name, problem)


_names = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_EXPLANATIONS = (
    (r"Expected `datetime` with a timezone component", "must have a time zone, such as 2026-06-01T02:00:00Z"),
    (r"Invalid RFC3339 encoded datetime", "must be an RFC 3339 timestamp, such as 2026-06-01T02:00:00Z"),
    (r"Expected `datetime(?: \| null)?`, got `.+`", "must be an RFC 3339 timestamp, such as 2026-06-01T02:00:00Z"),
    (r"Expected `str \| null`, got `.+`", "must be a string or null"),
    (r"Expected `str`, got `.+`", "must be a string"),
    (r"Expected `bool`, got `.+`", "must be true or false"),
    (r"Expected `int`, got `.+`", "must be an integer"),
    (r"Expected `array(?: \| null)?`, got `.+`", "must be an array"),
    (r"Expected `object`, got `.+`", "must be a JSON object"),
    (r"Expected `int` (>=|<=) (.+)", f"must be an integer from 1 to {MAX_INTEGER}"),
    (r"Integer value out of range", f"must be an integer from 1 to {MAX_INTEGER}"),
)


def _choices(type_: type[msgspec.Struct]) -> dict[str, Sequence[str]]:
    """Return the allowed values of each field that is an enumeration."""
    found: dict[str, Sequence[str]] = {}
    for name, hint in get_type_hints(type_).items():
        for part in (hint, *get_args(hint)):
            if get_origin(part) is Literal:
                found[name] = get_args(part)
    return found

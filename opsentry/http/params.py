"""Query parameters: parsed into the struct that an operation declares."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta
from multidict import MultiMapping

from opsentry.domain.decider import InvalidField, to_utc

Q = TypeVar("Q", bound=msgspec.Struct)

MAX_INTEGER = 2**63 - 1
MAX_LIMIT = 200

Id = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
Position = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
Timestamp = Annotated[datetime, Meta(tz=True)]
AsOf: TypeAlias = Position | Timestamp
"""A ledger position, or an RFC 3339 timestamp."""

_EXAMPLE = "such as 2026-06-01T02:00:00Z"


class EnumOf(NamedTuple):
    """Annotates a string parameter with the values that it may have, where they are known at run time only."""

    values: Sequence[str]


Parser: TypeAlias = Callable[[str, str], Any]
"""Turns (name, raw value) into a value; raises `InvalidField`."""


class NoQuery(msgspec.Struct):
    """No query parameters."""


class AsOfQuery(msgspec.Struct, kw_only=True):
    """A past state, by position or time; the present one if absent."""

    as_of: AsOf | None = None


Limit = Annotated[int, Meta(ge=1, le=MAX_LIMIT, description="Entries on the page; a higher number is clamped.")]


class PageQuery(msgspec.Struct, kw_only=True):
    """A page by limit and offset."""

    limit: Limit = 50
    offset: Annotated[Position, Meta(description="Entries before the page.")] = 0


def parse_query(query: type[Q], parsers: Mapping[str, tuple[str, Parser]], given: MultiMapping[str]) -> Q:
    """Return the parameters of a request. Those whose name begins with `_` are the client's own.

    Raises:
        InvalidField: A parameter is unknown, repeated, or has a value that it cannot have.
    """
    values: dict[str, Any] = {}
    for name, raw in given.items():
        if name.startswith("_"):
            continue
        known = parsers.get(name)
        if known is None:
            raise InvalidField(name, "unknown parameter")
        field, parser = known
        if field in values:
            raise InvalidField(name, "must be given once")
        values[field] = parser(name, raw)
    return query(**values)


def parsers_of(query: type[msgspec.Struct]) -> Mapping[str, tuple[str, Parser]]:
    """Return for each parameter of `query` its field and its parser."""
    hints = get_type_hints(query, include_extras=True)
    names = {info.name: info.encode_name for info in msgspec.structs.fields(query)}
    return {names[name]: (name, _parser(name, hint)) for name, hint in hints.items() if name in names}


def _parser(name: str, hint: Any) -> Parser:
    kinds = _alternatives(hint)
    bases = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    if get_origin(bases[0]) is Literal:
        return _choice(get_args(bases[0]))
    if bases == [int, datetime]:
        return _as_of
    if bases == [datetime]:
        return _timestamp
    if bases == [bool]:
        return lambda name, raw: _choice(("true", "false"))(name, raw) == "true"
    if bases == [int]:
        lowest, highest = _bounds(kinds[0])
        return _integer(lowest, highest, clamps=name == "limit")
    if bases == [str]:
        enums = [meta for meta in getattr(kinds[0], "__metadata__", ()) if isinstance(meta, EnumOf)]
        return _choice(enums[0].values) if enums else _text
    raise TypeError(f"{name}: no parser for {hint}")


def _alternatives(hint: Any) -> list[Any]:
    if get_origin(hint) is Annotated and get_origin(get_args(hint)[0]) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in {Union, UnionType}:
        return [each for part in get_args(hint) if part is not NoneType for each in _alternatives(part)]
    return [hint]


def _bounds(kind: Any) -> tuple[int, int]:
    metas = [meta for meta in getattr(kind, "__metadata__", ()) if isinstance(meta, Meta)]
    lowest = next((meta.ge for meta in metas if meta.ge is not None), 0)
    highest = next((meta.le for meta in metas if meta.le is not None), MAX_INTEGER)
    return int(lowest), int(highest)


def _choice(choices: Sequence[str]) -> Parser:
    def parse(name: str, raw: str) -> str:
        if raw not in choices:
            raise InvalidField(name, f"must be one of {', '.join(choices)}")
        return raw

    return parse


def _integer(lowest: int, highest: int, *, clamps: bool) -> Parser:
    bound = f"must be a whole number, {lowest} or more"
    if not clamps and highest < MAX_INTEGER:
        bound = f"must be a whole number from {lowest} to {highest}"

    def parse(name: str, raw: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", raw, re.ASCII) or not lowest <= int(raw) <= MAX_INTEGER:
            raise InvalidField(name, bound)
        if int(raw) > highest and not clamps:
            raise InvalidField(name, bound)
        return min(int(raw), highest)

    return parse


def _text(name: str, raw: str) -> str:
    if "\x00" in raw:
        raise InvalidField(name, "must not contain the character NUL")
    return raw


def _timestamp(name: str, raw: str, must_be: str = "an RFC 3339 timestamp,") -> datetime:
    try:
        # RFC 3339 allows a space for the T; any later space was a plus sign that the client did not escape.
        text = re.sub(r"^(\d{4}-\d\d-\d\d) ", r"\1T", raw.strip(), flags=re.ASCII).replace(" ", "+")
        moment = msgspec.convert(text, Timestamp)
    except msgspec.ValidationError:
        raise InvalidField(name, f"must be {must_be} {_EXAMPLE}") from None
    return to_utc(name, moment)


def _as_of(name: str, raw: str) -> int | datetime:
    if re.fullmatch(r"[0-9]{1,19}", raw, re.ASCII):
        return int(raw)
    return _timestamp(name, raw, "a position, or an RFC 3339 timestamp")

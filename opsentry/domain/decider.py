"""The shape all aggregates share: events, the errors a decision may raise, and checks on what people write."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from msgspec import UNSET

REDACTED = "[redacted]"
MAX_TITLE = 300
MAX_TEXT = 50_000


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Something that happened to one stream.

    `TYPE` names it in the log for ever, `VERSION` is the version of its fields, and `ERASABLE` names the fields that
    hold what people wrote: they are stored apart from the facts, so that they can be erased.
    """

    TYPE: ClassVar[str]
    VERSION: ClassVar[int] = 1
    ERASABLE: ClassVar[frozenset[str]] = frozenset()


class DomainError(Exception):
    """A command was refused. The message is meant for whoever sent it."""


class InvalidField(DomainError):
    """A field of the command holds something that can never be accepted.

    Args:
        field: The field's name as the sender wrote it, such as `severity`.
        problem: What is wrong with it, such as `must not be blank`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class IllegalTransition(DomainError):
    """The command is well formed, but the stream's present state forbids it."""


class StreamRemoved(DomainError):
    """The stream existed and was removed: to a caller it does not exist."""


S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class Decider(Generic[S, C, E]):
    """An aggregate as pure functions (Chassaing's decider).

    Attributes:
        kind: The stream kind its events are kept under.
        evolve: Folds one event into the state; `None` is the state of a stream that does not exist. Total.
        decide: Answers a command with events, or raises `DomainError`.
    """

    kind: str
    evolve: Callable[[S | None, E], S]
    decide: Callable[[S | None, C], Sequence[E]]

    def fold(self, events: Iterable[E], state: S | None = None) -> S | None:
        """Return the state after `events`."""
        for event in events:
            state = self.evolve(state, event)
        return state


def check_title(field: str, value: str) -> str:
    """Return `value` if it can stand as a one-line name; raise `InvalidField` if blank, too long or with NUL."""
    check_text(field, value)
    if not value.strip():
        raise InvalidField(field, "must not be blank")
    if len(value) > MAX_TITLE:
        raise InvalidField(field, f"must have at most {MAX_TITLE} characters")
    return value


def check_text(field: str, value: str | None) -> str | None:
    """Return `value` if PostgreSQL and JSON can carry it; raise `InvalidField` if too long or with NUL."""
    if value is not None:
        if "\x00" in value:
            raise InvalidField(field, "must not contain the character NUL")
        if len(value) > MAX_TEXT:
            raise InvalidField(field, f"must have at most {MAX_TEXT} characters")
    return value


def check_choice(field: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`; raise `InvalidField` that names them if it is not."""
    if value not in choices:
        raise InvalidField(field, f"must be one of {', '.join(choices)}")
    return value


# The driver stores these two moments as infinities.
_CALENDAR_ENDS = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


def to_utc(field: str, moment: datetime) -> datetime:
    """Return `moment` in UTC; raise `InvalidField` if it lies outside of the calendar or at one of its ends."""
    try:
        found = moment.astimezone(UTC)
    except OverflowError:
        raise InvalidField(field, "is out of range") from None
    if found in _CALENDAR_ENDS:
        raise InvalidField(field, "is out of range")
    return found


def normal_ids(service_ids: Iterable[int]) -> tuple[int, ...]:
    """Return ids in ascending order, each once: the order in which answers show them."""
    return tuple(sorted(set(service_ids)))


def set_fields(of: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of an event or a command that are not `UNSET`, by name."""
    values = msgspec.structs.asdict(of)
    return {name: value for name, value in values.items() if value is not UNSET}

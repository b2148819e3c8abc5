"""Define the shape that all aggregates share, the errors of a decision, and the checks of a command's fields."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from msgspec import UNSET

REDACTED = "[redacted]"
MAX_TITLE_CHARACTERS = 300
MAX_TEXT_CHARACTERS = 50_000

# The driver stores these two times as infinities.
_CALENDAR_ENDS = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Base of all events: facts about one stream, named in the past tense.

    Attributes:
        TYPE: The event's permanent name in the ledger.
        VERSION: The version of its fields. A change of fields needs a new version and an upcaster.
        ERASABLE: The fields that hold free text. They are stored apart from the facts, so that a redaction can erase
            them.
    """

    TYPE: ClassVar[str]
    VERSION: ClassVar[int] = 1
    ERASABLE: ClassVar[frozenset[str]] = frozenset()


class DomainError(Exception):
    """A command was refused and nothing was changed. The message is meant for the caller."""


class InvalidField(DomainError):
    """A field of the command has a value that no state would accept.

    Args:
        field: The field's name as the caller wrote it, such as `severity`.
        problem: The fault of its value, such as `must not be blank`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class IllegalTransition(DomainError):
    """The command is valid, but the stream's present state forbids it."""


class StreamRemoved(DomainError):
    """The stream existed and was removed. To a caller it does not exist."""


S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class Decider(Generic[S, C, E]):
    """Bundle an aggregate's pure functions (Jérémie Chassaing, "Functional Event Sourcing Decider", 2021).

    Attributes:
        kind: The kind of the aggregate's streams.
        evolve: Applies one event to a state; `None` is the state of a stream that does not exist. It is total.
        decide: Turns a command into events, or raises `DomainError`.
    """

    kind: str
    evolve: Callable[[S | None, E], S]
    decide: Callable[[S | None, C], Sequence[E]]

    def fold(self, events: Iterable[E], state: S | None = None) -> S | None:
        """Apply `events` to `state` in their order, and return the final state."""
        for event in events:
            state = self.evolve(state, event)
        return state


def check_title(field: str, value: str) -> str:
    """Return `value` if it is a usable one-line name; raise `InvalidField` if it is blank, too long or contains NUL."""
    check_text(field, value)
    if not value.strip():
        raise InvalidField(field, "must not be blank")
    if len(value) > MAX_TITLE_CHARACTERS:
        raise InvalidField(field, f"must have at most {MAX_TITLE_CHARACTERS} characters")
    return value


def check_text(field: str, value: str | None) -> str | None:
    """Return `value` if PostgreSQL can store it; raise `InvalidField` if it is too long or contains NUL."""
    if value is not None:
        if "\x00" in value:
            raise InvalidField(field, "must not contain the character NUL")
        if len(value) > MAX_TEXT_CHARACTERS:
            raise InvalidField(field, f"must have at most {MAX_TEXT_CHARACTERS} characters")
    return value


def check_choice(field: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`; raise `InvalidField` with the choices if it is not."""
    if value not in choices:
        raise InvalidField(field, f"must be one of {', '.join(choices)}")
    return value


def to_utc(field: str, moment: datetime) -> datetime:
    """Return `moment` in UTC; raise `InvalidField` if it is outside the calendar, or its very first or last moment."""
    try:
        converted = moment.astimezone(UTC)
    except OverflowError:
        raise InvalidField(field, "is out of range") from None
    if converted in _CALENDAR_ENDS:
        raise InvalidField(field, "is out of range")
    return converted


def normal_ids(service_ids: Iterable[int]) -> tuple[int, ...]:
    """Return the ids in ascending order without repetition, the order of responses."""
    return tuple(sorted(set(service_ids)))


def set_fields(fields: msgspec.Struct) -> dict[str, Any]:
    """Return the fields of an event or command that are not `UNSET`, by name."""
    values = msgspec.structs.asdict(fields)
    return {name: value for name, value in values.items() if value is not UNSET}

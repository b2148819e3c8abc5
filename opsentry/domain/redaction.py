"""Plan and decide redactions: find the events whose erasable text must go, so that it is nowhere left in a stream."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeVar

import msgspec

from opsentry.domain.decider import REDACTED, Event, InvalidField, check_choice, check_text


class RedactionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Describe the effect of a redaction.

    Attributes:
        versions: The events that lose their erasable text, ascending. An event loses all of it at once.
        fields: The stream's fields that read `[redacted]` afterwards.
        restated: Present values of other fields that such an event introduced, by field. They are recorded again.
    """

    versions: tuple[int, ...]
    fields: tuple[str, ...]
    restated: Mapping[str, str]


class Redacted(Event, frozen=True, kw_only=True):
    """Base of the events that record a redaction. The append that stores one erases the text it names.

    Attributes:
        versions: The events of the same stream whose erasable text was erased.
        fields: The stream's fields that read `[redacted]` from now on.
        reason: Free text, and therefore erasable itself.
    """

    ERASABLE: ClassVar[frozenset[str]] = frozenset({"reason"})
    versions: tuple[int, ...]
    fields: tuple[str, ...] = ()
    reason: str


class Redact(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the commands that redact a stream."""

    plan: RedactionPlan
    reason: str


class HistoryEntry(NamedTuple):
    """Place an event in its stream, by version, and in its ledger, by position."""

    version: int
    position: int
    event: Event


R = TypeVar("R", bound=Redacted)
E = TypeVar("E", bound=Event)


def plan_redaction(
    history: Sequence[HistoryEntry], redactable: Sequence[str], fields: Collection[str], positions: Collection[int]
) -> RedactionPlan:
    """Return the plan that removes all requested text from the stream.

    Another event that repeats a requested text word for word is redacted too: a description, for example, is also the
    first timeline entry. Text that was redacted before is skipped.

    Args:
        history: The whole stream, in order.
        redactable: The stream's own fields that hold erasable text.
        fields: Those of `redactable` to redact, with every value that they ever had.
        positions: Positions of events to redact, whatever their fields.

    Raises:
        InvalidField: A field or event is unknown or has no erasable text, or nothing was requested.
    """
    if not fields and not positions:
        raise InvalidField("fields", "name at least one field or event to redact")
    for name in fields:
        check_choice("fields", name, redactable)
    if unknown := sorted(set(positions) - {position for _, position, event in history if _has_erasable(event)}):
        raise InvalidField("events", f"no erasable text is recorded at {', '.join(map(str, unknown))}")
    texts: set[str] = set()
    for _, position, event in history:
        texts |= {text for name, text in _present_texts(event).items() if position in positions or name in fields}
    versions = {version for version, _, event in history if texts & set(_present_texts(event).values())}
    source: dict[str, tuple[int, str]] = {}  # the event that introduced each field's present value, and the value
    for version, _, event in history:
        for name in event.ERASABLE & frozenset(redactable):
            value = getattr(event, name)
            if isinstance(value, str):
                source[name] = (version, value)
            elif value is None:
                source.pop(name, None)
    lost = {name: text for name, (version, text) in source.items() if version in versions}
    return RedactionPlan(
        versions=tuple(sorted(versions)),
        fields=tuple(sorted(name for name, text in lost.items() if text in texts)),
        restated={name: text for name, text in sorted(lost.items()) if text not in texts},
    )


def decide_redaction(command: Redact, redacted: type[R], edited: type[E]) -> list[R | E]:
    """Return the events of a redaction: its record, and the restated fields. An empty plan yields no event.

    Args:
        command: The plan and the reason.
        redacted: The aggregate's event that records a redaction.
        edited: The aggregate's event that changes erasable fields.

    Raises:
        InvalidField: The reason is blank, too long or contains NUL.
    """
    if not (check_text("reason", command.reason) or "").strip():
        raise InvalidField("reason", "must not be blank")
    plan = command.plan
    if not plan.versions:
        return []
    record = redacted(versions=plan.versions, fields=plan.fields, reason=command.reason)
    return [record, msgspec.convert(plan.restated, edited)] if plan.restated else [record]


def erasable_versions(history: Iterable[HistoryEntry]) -> tuple[int, ...]:
    """Return the versions of a stream's events that hold erasable text, redacted ones included."""
    return tuple(version for version, _, event in history if _has_erasable(event))


def _present_texts(event: Event) -> dict[str, str]:
    texts = {name: getattr(event, name) for name in event.ERASABLE}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text != REDACTED}


def _has_erasable(event: Event) -> bool:
    return any(isinstance(getattr(event, name), str) for name in event.ERASABLE)

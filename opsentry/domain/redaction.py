"""Erasing what people wrote: which words have to go, so that a text is nowhere in a stream any more."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from opsentry.domain.decider import REDACTED, Event, InvalidField, check_choice, check_text


class RedactionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What erasing comes to.

    Attributes:
        versions: The events that lose their words, ascending. All words of an event go together.
        fields: Those of the stream's own fields that read `[redacted]` from now on.
        restated: Present values of fields that nobody asked to erase but that stood in such an event: said again.
    """

    versions: tuple[int, ...]
    fields: tuple[str, ...]
    restated: Mapping[str, str]


class HistoryEntry(NamedTuple):
    """An event of the stream and where it stands: its version, and its position in the ledger."""

    version: int
    position: int
    event: Event


def plan(
    history: Sequence[HistoryEntry], own: Sequence[str], fields: Collection[str], positions: Collection[int]
) -> RedactionPlan:
    """Return what has to go, so that nothing of what is asked for stays in the stream.

    A text that stands word for word in another event of the stream goes there too: a description is also the first
    entry of the timeline. What was erased before is passed over.

    Args:
        history: The whole stream, in order.
        own: The fields of the stream itself that hold words.
        fields: Those of them to erase, with everything that they ever held.
        positions: Positions of events to erase, whatever their fields.

    Raises:
        InvalidField: There is no such field, or no such event with words; or nothing is asked for.
    """
    if not fields and not positions:
        raise InvalidField("fields", "name fields, or events, whose words are to be erased")
    for name in fields:
        check_choice("fields", name, own)
    if unknown := sorted(set(positions) - {position for _, position, event in history if _has_erasable(event)}):
        raise InvalidField("events", f"no words are recorded here at {', '.join(map(str, unknown))}")
    texts: set[str] = set()
    for _, position, event in history:
        texts |= {text for name, text in _words(event).items() if position in positions or name in fields}
    erased = {version for version, _, event in history if texts & set(_words(event).values())}
    source: dict[str, tuple[int, str]] = {}
    for version, _, event in history:
        for name in event.ERASABLE & frozenset(own):
            value = getattr(event, name)
            if isinstance(value, str):
                source[name] = (version, value)
            elif value is None:
                source.pop(name, None)
    lost = {name: text for name, (version, text) in source.items() if version in erased}
    return RedactionPlan(
        versions=tuple(sorted(erased)),
        fields=tuple(sorted(name for name, text in lost.items() if text in texts)),
        restated={name: text for name, text in sorted(lost.items()) if text not in texts},
    )


def _words(event: Event) -> dict[str, str]:
    """Return the words that an event still holds, by field."""
    words = {name: getattr(event, name) for name in event.ERASABLE}
    return {name: value for name, value in words.items() if isinstance(value, str) and value != REDACTED}


def erasable_versions(history: Iterable[HistoryEntry]) -> tuple[int, ...]:
    """Return the versions of those of a stream's events that hold words, erased ones among them."""
    return tuple(version for version, _, event in history if _has_erasable(event))


def _has_erasable(event: Event) -> bool:
    """Tell whether an event holds words, or did before they were erased."""
    return any(isinstance(getattr(event, name), str) for name in event.ERASABLE)


def check_reason(reason: str) -> str:
    """Return `reason` if it says something; raise `InvalidField` if it is blank, too long or with NUL."""
    if not (check_text("reason", reason) or "").strip():
        raise InvalidField("reason", "must not be blank")
    return reason

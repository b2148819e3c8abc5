"""Specify deciders: given a history, when a command arrives, then these events follow."""

from collections.abc import Sequence
from typing import Any

import pytest

from opsentry.domain.decider import Decider, DomainError, Event


class Given:
    def __init__(self, decider: Decider[Any, Any, Any], history: Sequence[Event]) -> None:
        self._decider = decider
        self._state = decider.fold(history)
        self._command: Any = None

    def when(self, command: Any) -> "Given":
        self._command = command
        return self

    def then(self, *events: Event) -> None:
        assert list(self._decider.decide(self._state, self._command)) == list(events)

    def refused(self, error: type[DomainError], message: str) -> None:
        with pytest.raises(error) as raised:
            self._decider.decide(self._state, self._command)
        assert message in str(raised.value)


def given(decider: Decider[Any, Any, Any], *history: Event) -> Given:
    return Given(decider, history)

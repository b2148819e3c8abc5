"""A channel with scripted outcomes, for tests of the delivery service."""

import asyncio
from collections import Counter, defaultdict
from typing import Any

from opsentry.notifications.channel import Message, Outcome

OK = Outcome(response_status=200)
BROKEN = Outcome("answered 500", 500)


class ScriptedChannel:
    """Returns the outcome in `outcomes` for a target, after an event or by a callable; `sent` has all messages."""

    signs_messages = False
    has_secret_target = False

    def __init__(self, name="webhook", max_concurrency=None):
        self.name = name
        self.max_concurrency: int | None = max_concurrency
        self.outcomes: dict[str, Any] = defaultdict(lambda: OK)
        self.sent: list[tuple[str, Message]] = []
        self.in_flight: Counter[str] = Counter()
        self.max_in_flight: Counter[str] = Counter()
        self.max_total = 0

    def validate_target(self, target):
        return target

    def display_target(self, target):
        return target

    async def send(self, endpoint, message):
        self.sent.append((endpoint.target, message))
        self.in_flight[endpoint.target] += 1
        self.max_total = max(self.max_total, self.in_flight.total())
        self.max_in_flight[endpoint.target] = max(self.max_in_flight[endpoint.target], self.in_flight[endpoint.target])
        try:
            outcome = self.outcomes[endpoint.target]
            if callable(outcome):
                return await outcome()
            if isinstance(outcome, asyncio.Event):
                await outcome.wait()
                return OK
            await asyncio.sleep(0.005)
            return outcome
        finally:
            self.in_flight[endpoint.target] -= 1

    async def close(self):
        pass

    def sent_to(self, target):
        return [message for sent_target, message in self.sent if sent_target == target]


async def advance_time(owner, seconds):
    """Move deliveries and endpoints as if this time had passed."""
    await owner.execute(
        "UPDATE deliveries SET next_attempt_at = next_attempt_at - $1 * interval '1 second'"
        " WHERE next_attempt_at IS NOT NULL",
        seconds,
    )
    await owner.execute(
        "UPDATE endpoints SET available_at = available_at - $1 * interval '1 second',"
        " failing_since = failing_since - $1 * interval '1 second'",
        seconds,
    )

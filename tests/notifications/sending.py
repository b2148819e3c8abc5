"""What the tests of the sender send with: a channel that answers as it is told."""

import asyncio
from collections import Counter, defaultdict
from typing import Any

from opsentry.notifications.channel import Message, Outcome

OK = Outcome(response_status=200)
BROKEN = Outcome("answered 500", 500)


class Scripted:
    """A channel of our own making: `answers` says what each target answers, and `sent` what was sent there."""

    signs_messages = False
    has_secret_target = False

    def __init__(self, name="webhook", max_concurrency=None):
        self.name = name
        self.max_concurrency: int | None = max_concurrency
        self.answers: dict[str, Any] = defaultdict(lambda: OK)
        self.sent: list[tuple[str, Message]] = []
        self.open: Counter[str] = Counter()
        self.widest: Counter[str] = Counter()
        self.most = 0

    def validate_target(self, target):
        return target

    def display_target(self, target):
        return target

    async def send(self, endpoint, message):
        self.sent.append((endpoint.target, message))
        self.open[endpoint.target] += 1
        self.most = max(self.most, self.open.total())
        self.widest[endpoint.target] = max(self.widest[endpoint.target], self.open[endpoint.target])
        try:
            answer = self.answers[endpoint.target]
            if callable(answer):
                return await answer()
            if isinstance(answer, asyncio.Event):
                await answer.wait()
                return OK
            await asyncio.sleep(0.005)
            return answer
        finally:
            self.open[endpoint.target] -= 1

    async def close(self):
        pass

    def to(self, target):
        return [message for where, message in self.sent if where == target]


async def hurry(owner, seconds):
    """Let time pass for what waits."""
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

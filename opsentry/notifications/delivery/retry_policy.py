"""Decide when a delivery is tried again, and how far its endpoint is trusted. No clock, no database."""

import random
from typing import NamedTuple

from opsentry.notifications.channel import Outcome

# The pause after the first attempt and after each further one. After the last, the delivery is exhausted.
RETRY_SECONDS = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 36000.0)
# From this number of consecutive failures on, an endpoint gets one message (a probe) every PROBE_SECONDS.
PROBE_AFTER_FAILURES = 10
PROBE_SECONDS = 300.0
# A subscription whose endpoint fails for this long is disabled.
DISABLE_AFTER_DAYS = 5
# The limit of messages in flight at one endpoint.
MAX_CONCURRENCY = 8

# The pause after a failure of our own side, such as a mail relay that is down or a secret that no key decrypts.
INTERNAL_RETRY_SECONDS = 60.0
# The pause while the database is slow or a read model lags. It is short, because both usually recover at once.
UNAVAILABLE_RETRY_SECONDS = 5.0
# The pause while the subscriptions read model is halted or paused, so that nobody knows where to send.
UNKNOWN_SUBSCRIPTION_SECONDS = 30.0

# A slower response costs the endpoint its concurrency.
_SLOW_SECONDS = 2.0
_JITTER = 0.2


class EndpointHealth(NamedTuple):
    """The record of an endpoint, as `endpoints` stores it.

    Attributes:
        consecutive_failures: Failed attempts since the last success.
        concurrency: The messages that it may have in flight at once; 1 until it has answered well.
        backoff_seconds: The pause from now, stored as `backoff_until`; `None` for no pause.
    """

    consecutive_failures: int = 0
    concurrency: int = 1
    backoff_seconds: float | None = None

    @property
    def is_probed(self) -> bool:
        """Return whether the endpoint gets only one message at a time, because it keeps failing."""
        return self.consecutive_failures >= PROBE_AFTER_FAILURES


class HealthTracker:
    """Derive an endpoint's health from the attempts of one turn.

    Args:
        health: The health before the turn.
        max_concurrency: The limit for this endpoint.

    Attributes:
        has_failed: True after a failure that counts against the endpoint.
        endpoint_gone: True once the endpoint said that it no longer exists.
    """

    def __init__(self, health: EndpointHealth, max_concurrency: int) -> None:
        self._failures = health.consecutive_failures
        self._concurrency = min(health.concurrency, max_concurrency)
        self._max_concurrency = max_concurrency
        self._probe_is_left = health.is_probed
        self._retry_after: float | None = None
        self._is_slow = False
        self._has_succeeded = False
        self._has_internal_failure = False
        self.has_failed = False
        self.endpoint_gone = False

    def add_attempt(self, outcome: Outcome, seconds: float) -> None:
        """Take an attempt of this duration into account."""
        self._probe_is_left = False
        self._is_slow = self._is_slow or seconds > _SLOW_SECONDS
        self.endpoint_gone = self.endpoint_gone or outcome.endpoint_gone
        if outcome.internal_failure:
            self._has_internal_failure = True
        elif outcome.error is None:
            self._failures = 0
            self._has_succeeded = True
        else:
            self._failures += 1
            self.has_failed = True
            self._retry_after = outcome.retry_after or self._retry_after

    def add_internal_failure(self) -> None:
        """End the turn without counting a failure against the endpoint."""
        self._has_internal_failure = True

    @property
    def may_continue(self) -> bool:
        """Return whether the next message may be sent in this turn."""
        is_failing = self._failures >= PROBE_AFTER_FAILURES and not self._probe_is_left
        return not (self.endpoint_gone or self._has_internal_failure or is_failing or self._retry_after is not None)

    def health(self) -> EndpointHealth:
        """Return the health after the turn. A success doubles the concurrency; a failure or slowness resets it to 1."""
        if self._failures or self._is_slow:
            concurrency = 1
        else:
            concurrency = min(self._max_concurrency, self._concurrency * (2 if self._has_succeeded else 1))
        backoff = self._retry_after
        if self._failures >= PROBE_AFTER_FAILURES:
            backoff = max(PROBE_SECONDS * jitter(), backoff or 0.0)
        return EndpointHealth(self._failures, concurrency, backoff)


def next_state(outcome: Outcome, attempts_in_round: int) -> tuple[str, float | None]:
    """Return the delivery's state after an attempt, and the seconds until the next one.

    Args:
        outcome: The outcome of the attempt. It is no internal failure.
        attempts_in_round: The attempts before this one, since the delivery was last put back to `pending`.

    Returns:
        A state of `deliveries`, and `None` instead of seconds if the state is final.
    """
    if outcome.error is None:
        return "delivered", None
    if outcome.endpoint_gone:
        return "disabled", None
    if attempts_in_round >= len(RETRY_SECONDS):
        return "exhausted", None
    return "pending", max(RETRY_SECONDS[attempts_in_round] * jitter(), outcome.retry_after or 0.0)


def jitter() -> float:
    """Return a factor around 1 that spreads retries, so that deliveries that failed together do not return together."""
    return random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spreads load, keeps no secret

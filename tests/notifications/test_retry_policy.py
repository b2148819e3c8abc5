"""Retries, backoff and health follow the policy."""

import pytest

from opsentry.notifications.channel import Outcome
from opsentry.notifications.delivery.retry_policy import (
    MAX_CONCURRENCY,
    PROBE_AFTER_FAILURES,
    PROBE_SECONDS,
    RETRY_SECONDS,
    EndpointHealth,
    HealthTracker,
    next_state,
)

SUCCESS = Outcome(response_status=200)
FAILURE = Outcome("answered 500", 500)
GONE = Outcome("answered 410", 410, endpoint_gone=True)


@pytest.mark.parametrize(("attempts", "seconds"), list(enumerate(RETRY_SECONDS)))
def test_each_retry_waits_longer_within_the_jitter(attempts, seconds):
    state, delay = next_state(FAILURE, attempts)
    assert state == "pending"
    assert delay == pytest.approx(seconds, rel=0.2)


def test_final_outcomes_have_no_delay():
    assert next_state(SUCCESS, 3) == ("delivered", None)
    assert next_state(GONE, 0) == ("disabled", None)
    assert next_state(FAILURE, len(RETRY_SECONDS)) == ("exhausted", None)


def test_retry_after_extends_the_delay_and_never_shortens_it():
    assert next_state(FAILURE._replace(retry_after=1000.0), 0) == ("pending", 1000.0)
    _, delay = next_state(FAILURE._replace(retry_after=1.0), 2)
    assert delay == pytest.approx(RETRY_SECONDS[2], rel=0.2)


def track(health, *outcomes, seconds=0.1, max_concurrency=MAX_CONCURRENCY):
    tracker = HealthTracker(health, max_concurrency)
    for outcome in outcomes:
        tracker.add_attempt(outcome, seconds)
    return tracker


def test_a_turn_with_successes_doubles_the_concurrency_up_to_the_limit():
    health = EndpointHealth(3, 1)
    for expected in (2, 4, 8, 8):
        health = track(health, SUCCESS, SUCCESS).health()
        assert health == EndpointHealth(0, expected)
    assert track(EndpointHealth(0, 8), SUCCESS, max_concurrency=3).health() == EndpointHealth(0, 3)


@pytest.mark.parametrize(("outcome", "seconds", "failures"), [(FAILURE, 0.1, 1), (SUCCESS, 2.1, 0)])
def test_a_failure_or_a_slow_response_resets_the_concurrency(outcome, seconds, failures):
    tracker = track(EndpointHealth(0, 8), outcome, seconds=seconds)
    assert tracker.health() == EndpointHealth(failures, 1)
    assert tracker.has_failed == bool(failures)


def test_an_internal_failure_ends_the_turn_and_keeps_the_health():
    health = EndpointHealth(2, 1)
    tracker = track(health, Outcome("the mail relay is down", internal_failure=True))
    assert (tracker.may_continue, tracker.has_failed, tracker.health()) == (False, False, health)


def test_an_endpoint_that_is_gone_ends_the_turn():
    tracker = track(EndpointHealth(), GONE)
    assert (tracker.may_continue, tracker.endpoint_gone) == (False, True)


def test_retry_after_ends_the_turn_and_becomes_the_backoff():
    tracker = track(EndpointHealth(), FAILURE._replace(retry_after=30.0))
    assert not tracker.may_continue
    assert tracker.health() == EndpointHealth(1, 1, 30.0)


def test_a_failing_endpoint_gets_one_probe_and_a_backoff():
    tracker = track(EndpointHealth(PROBE_AFTER_FAILURES, 1))
    assert tracker.may_continue
    tracker.add_attempt(FAILURE, 0.1)
    assert not tracker.may_continue
    assert tracker.health().is_probed
    assert tracker.health().backoff_seconds == pytest.approx(PROBE_SECONDS, rel=0.2)


def test_a_successful_probe_ends_probing():
    tracker = track(EndpointHealth(PROBE_AFTER_FAILURES + 5, 1), SUCCESS)
    assert tracker.may_continue
    assert tracker.health() == EndpointHealth(0, 2)

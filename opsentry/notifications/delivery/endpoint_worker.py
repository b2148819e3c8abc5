"""The courier: sends what is due at one endpoint, and says what came of each message and how it goes there."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from opsentry.domain import subscription
from opsentry.infrastructure.encryption import DecryptionFailed, SecretBox
from opsentry.infrastructure.postgres import DatabaseUnavailable
from opsentry.notifications.channel import Channel, Endpoint, Message, Outcome
from opsentry.notifications.delivery.leases import (
    PROBE_SECONDS,
    RETRY_SECONDS,
    WIDEST,
    Due,
    LeasedEndpoint,
    Release,
    Result,
)
from opsentry.notifications.delivery.ordering import PROBE_AFTER
from opsentry.notifications.messages.builder import MessageBuilder, message_type
from opsentry.projections.engine.projector import PositionNotReached

_log = structlog.get_logger()

# An endpoint has its turn for so long, then others do.
_TURN_SECONDS = 1.0
# One that needs longer for an answer is not given more at once.
_SLOW_SECONDS = 2.0
_JITTER = 0.2
# What fails for a reason of ours is tried again after this: the mail relay is down, or a secret cannot be opened.
_OURS_SECONDS = 60.0
# And this, where the database is slow, or a read model is not there yet.
_SOON_SECONDS = 5.0
# Who is sent to is not known as of the event: something is parked or paused.
_UNKNOWN_SECONDS = 30.0


class EndpointWorker:
    """Sends what is due, an endpoint at a time; any number of them at once.

    Args:
        channel: To send with.
        composer: Says what things looked like.
        sealing: Opens targets and secrets.
        at_most: So many messages are in doubt at once: they go out again if this process dies. A place is taken before
            something is sent; whoever has recorded what came of it calls `recorded`.
    """

    def __init__(self, channel: Channel, composer: MessageBuilder, sealing: SecretBox, at_most: int) -> None:
        self._channel = channel
        self._composer = composer
        self._sealing = sealing
        self._places = asyncio.Semaphore(at_most)
        self._stopping = False
        # What goes through one thing of ours is spread over as many as can be told at once.
        self.widest = min(WIDEST, max(1, at_most // 4)) if channel.max_concurrency is None else 1

    def recorded(self, results: int) -> None:
        """Say that of so many results it is recorded what came of them."""
        for _ in range(results):
            self._places.release()

    def stop(self) -> None:
        """Begin nothing more; what is under way goes on."""
        self._stopping = True

    async def serve(
        self, endpoint: LeasedEndpoint, due: Sequence[Due], begin_until: float, note: Callable[[Result], None]
    ) -> Release:
        """Send what is due at an endpoint, as far as it can take it; return how to give it back.

        Args:
            endpoint: It is leased.
            due: What is due there.
            begin_until: Nothing is begun after this, in seconds of the monotonic clock.
            note: Takes each result at once.
        """
        state = endpoint.subscription
        if state is None or any(each.sequence > endpoint.shown for each in due):
            # Its read model cannot be derived: else it is as far as what is told.
            return Release(endpoint.failures, endpoint.width, hold=_UNKNOWN_SECONDS)
        if state.status not in {"active", "pending"}:
            return Release(0, 1, off=True)
        try:
            target = self._target(endpoint)
        except DecryptionFailed as error:
            for each in due:
                await self._places.acquire()
                note(_ours(each, str(error)))
            return Release(endpoint.failures, endpoint.width, hold=_OURS_SECONDS)
        course = _Course(endpoint.failures)
        until: float | None = None
        confirms = state.status == "pending"
        queue = list(reversed(due))

        async def send_some() -> None:
            nonlocal until
            while queue:
                await self._places.acquire()
                result = None
                try:
                    now = time.monotonic()
                    if until is None:
                        until = min(begin_until, now + _TURN_SECONDS)
                    if queue and course.goes_on and not self._stopping and now < until:
                        result = await self.send(target, queue.pop(), course, confirms=confirms)
                finally:
                    if result is None:
                        self._places.release()
                if result is None:
                    return
                note(result)

        width = min(endpoint.width, self.widest)
        await asyncio.gather(*(send_some() for _ in range(min(width, len(due)))))
        width = min(self.widest, width * (2 if course.does_well else 1)) if course.keeps_up else 1
        return Release(course.failures, width, course.hold, course.failed, course.gone)

    async def send(self, target: Endpoint, due: Due, course: "_Course", *, confirms: bool) -> Result:
        """Send one message, and take into `course` how that went."""
        try:
            message = await self._message(target, due)
        except (DatabaseUnavailable, PositionNotReached) as error:
            course.ours = True
            return Result(due, "waiting", _SOON_SECONDS * _jitter(), error=str(error))
        except Exception:  # noqa: BLE001 - one message that cannot be written must not hold up its endpoint
            _log.exception(
                "a message could not be composed", tenant_id=due.tenant_id, subscription_id=due.subscription_id
            )
            course.ours = True
            return _ours(due, "could not be composed")
        if message is None or confirms != (message.type == "subscription.confirm"):
            return Result(due, "withheld", error="not to be told any more")
        began = time.monotonic()
        try:
            outcome = await self._channel.send(target, message)
        except Exception:  # noqa: BLE001 - a defect of a channel must not end its endpoint's turn
            _log.exception("a channel failed", tenant_id=due.tenant_id, subscription_id=due.subscription_id)
            outcome = Outcome("could not be sent")
        seconds = time.monotonic() - began
        course.note(outcome, seconds)
        if outcome.internal_failure:
            return _ours(due, outcome.error)
        state, delay = _next(outcome, due.attempts)
        return Result(due, state, delay, outcome.response_status, outcome.error, round(seconds * 1000))

    def _target(self, endpoint: LeasedEndpoint) -> Endpoint:
        state, channel = endpoint.subscription, self._channel
        assert state is not None  # noqa: S101 - the caller has looked
        encrypted_secret = [] if state.encrypted_secret is None else [self._sealing.decrypt(state.encrypted_secret)]
        until = state.previous_until
        if (
            channel.signs_messages
            and state.previous_encrypted_secret
            and until is not None
            and until.timestamp() > time.time()
        ):
            encrypted_secret.append(self._sealing.decrypt(state.previous_encrypted_secret))
        return Endpoint(
            endpoint.tenant_id,
            endpoint.subscription_id,
            state.audience,
            encrypted_secret[0] if channel.has_secret_target and encrypted_secret else state.target,
            encrypted_secret if channel.signs_messages else (),
        )

    async def _message(self, target: Endpoint, due: Due) -> Message | None:
        """Return the message, `None` where its audience may not see what it tells any more."""
        subject: Mapping[str, Any] | None
        if due.kind == subscription.KIND:
            subject = {"id": due.subscription_id, "audience": target.audience}
        else:
            subject = await self._composer.build_subject(
                due.tenant_id, due.kind, due.stream_id, due.sequence, target.audience
            )
        if subject is None:
            return None
        return Message(
            id=f"msg_{due.intent_id.hex}",
            type=message_type([change.type for change in due.changes]),
            position=due.sequence,
            changes=due.changes,
            tenant=await self._composer.get_tenant(due.tenant_id),
            subject_kind=due.kind,
            subject=subject,
        )


class _Course:
    """How it goes at an endpoint while it is served."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self._probes = failures >= PROBE_AFTER
        self._slow = False
        self._retry_after: float | None = None
        self.does_well = False
        self.failed = False
        self.gone = False
        self.ours = False

    def note(self, outcome: Outcome, seconds: float) -> None:
        """Take an attempt into account."""
        self._probes = False
        self._slow = self._slow or seconds > _SLOW_SECONDS
        self.gone = self.gone or outcome.endpoint_gone
        self.ours = self.ours or outcome.internal_failure
        if outcome.error is None:
            self.failures = 0
            self.does_well = True
        elif not outcome.internal_failure:
            self.failures += 1
            self.failed = True
            self._retry_after = outcome.retry_after or self._retry_after

    @property
    def goes_on(self) -> bool:
        """Whether more may be sent now: not to what is gone, fails again and again, or asks to be left alone."""
        failing = self.failures >= PROBE_AFTER and not self._probes
        return not (self.gone or self.ours or failing or self._retry_after is not None)

    @property
    def keeps_up(self) -> bool:
        """Whether it may have as much under way as before."""
        return not (self.failures or self._slow)

    @property
    def hold(self) -> float | None:
        """For how many seconds to leave the endpoint alone."""
        if self.failures >= PROBE_AFTER:
            return max(PROBE_SECONDS * _jitter(), self._retry_after or 0.0)
        return self._retry_after


def _next(outcome: Outcome, attempts: int) -> tuple[str, float | None]:
    """Return the state after an attempt that followed so many, and the seconds until the next one, if there is one."""
    if outcome.error is None:
        return "delivered", None
    if outcome.endpoint_gone:
        return "disabled", None
    if attempts >= len(RETRY_SECONDS):
        return "parked", None
    return "waiting", max(RETRY_SECONDS[attempts] * _jitter(), outcome.retry_after or 0.0)


def _ours(due: Due, error: str | None) -> Result:
    """Return what to record of a failure that is ours: it is shown, and is no attempt, which says what *they* did."""
    return Result(due, "waiting", _OURS_SECONDS * _jitter(), error=error)


def _jitter() -> float:
    return random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spreads load, keeps no secret

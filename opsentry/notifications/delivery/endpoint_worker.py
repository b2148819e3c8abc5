"""The endpoint worker: attempt the due deliveries of one endpoint, and derive its health from the outcomes."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from opsentry.domain import subscription
from opsentry.infrastructure.encryption import DecryptionFailed, SecretBox
from opsentry.infrastructure.postgres import DatabaseUnavailable
from opsentry.notifications.channel import Channel, Endpoint, Message, Outcome
from opsentry.notifications.delivery.leases import DueDelivery, LeasedEndpoint
from opsentry.notifications.delivery.results import DeliveryResult, Release
from opsentry.notifications.delivery.retry_policy import (
    INTERNAL_RETRY_SECONDS,
    MAX_CONCURRENCY,
    UNAVAILABLE_RETRY_SECONDS,
    UNKNOWN_SUBSCRIPTION_SECONDS,
    HealthTracker,
    jitter,
    next_state,
)
from opsentry.notifications.messages.builder import MessageBuilder, message_type
from opsentry.projections.engine.projector import PositionNotReached

_log = structlog.get_logger()

# After this time an endpoint's turn ends, so that others get one.
_TURN_SECONDS = 1.0


class EndpointWorker:
    """Serve endpoints of one channel; any number of them concurrently.

    Args:
        channel: The channel to send with.
        message_builder: Builds the messages.
        secret_box: Decrypts targets and signing secrets.
        max_unrecorded: The limit of messages whose result is not recorded yet. If the process dies, these are sent
            again. An attempt takes a slot; `release_slots` gives it back.

    Attributes:
        max_concurrency: The limit of messages in flight at one endpoint.
    """

    def __init__(
        self, channel: Channel, message_builder: MessageBuilder, secret_box: SecretBox, max_unrecorded: int
    ) -> None:
        self._channel = channel
        self._message_builder = message_builder
        self._secret_box = secret_box
        self._unrecorded_slots = asyncio.Semaphore(max_unrecorded)
        self._is_stopping = False
        # Endpoints that share one resource of ours take turns there, rather than one of them taking it over.
        self.max_concurrency = (
            min(MAX_CONCURRENCY, max(1, max_unrecorded // 4)) if channel.max_concurrency is None else 1
        )

    def release_slots(self, count: int) -> None:
        """Give back the slots of this number of results, which are recorded now."""
        for _ in range(count):
            self._unrecorded_slots.release()

    def stop(self) -> None:
        """Start no more attempts; those in flight continue."""
        self._is_stopping = True

    async def serve(
        self,
        endpoint: LeasedEndpoint,
        due: Sequence[DueDelivery],
        start_until: float,
        on_result: Callable[[DeliveryResult], None],
    ) -> Release:
        """Attempt due deliveries until the endpoint's turn ends or it fails; return the way to release it.

        Args:
            endpoint: An endpoint that this process holds the lease of.
            due: Its due deliveries.
            start_until: The time of the last start of an attempt, in seconds of the monotonic clock.
            on_result: Called with each result as soon as it is known.
        """
        state = endpoint.subscription
        if state is None or any(delivery.position > endpoint.projected_position for delivery in due):
            return Release(endpoint.health._replace(backoff_seconds=UNKNOWN_SUBSCRIPTION_SECONDS))
        if state.status not in {"active", "pending"}:
            return Release(is_disabled=True)
        try:
            target = self._decrypt_target(endpoint)
        except DecryptionFailed as error:
            for delivery in due:
                await self._unrecorded_slots.acquire()
                on_result(_internal_failure(delivery, str(error)))
            return Release(endpoint.health._replace(backoff_seconds=INTERNAL_RETRY_SECONDS))
        tracker = HealthTracker(endpoint.health, self.max_concurrency)
        turn_ends: float | None = None
        awaits_confirmation = state.status == "pending"
        queue = list(reversed(due))

        async def attempt_in_turn() -> None:
            nonlocal turn_ends
            while queue:
                await self._unrecorded_slots.acquire()
                result = None
                try:
                    now = time.monotonic()
                    # The turn begins with the first free slot: waiting for slots is not the endpoint's doing.
                    if turn_ends is None:
                        turn_ends = min(start_until, now + _TURN_SECONDS)
                    if queue and tracker.may_continue and not self._is_stopping and now < turn_ends:
                        result = await self.attempt(
                            target, queue.pop(), tracker, awaits_confirmation=awaits_confirmation
                        )
                finally:
                    if result is None:
                        self._unrecorded_slots.release()
                if result is None:
                    return
                on_result(result)

        concurrency = min(endpoint.health.concurrency, self.max_concurrency, len(due))
        await asyncio.gather(*(attempt_in_turn() for _ in range(concurrency)))
        return Release(tracker.health(), tracker.has_failed, tracker.endpoint_gone)

    async def attempt(
        self, target: Endpoint, delivery: DueDelivery, tracker: HealthTracker, *, awaits_confirmation: bool
    ) -> DeliveryResult:
        """Attempt one delivery, and add the outcome to `tracker`.

        Args:
            target: The destination.
            delivery: The delivery.
            tracker: The health of the endpoint during this turn.
            awaits_confirmation: True if the subscription is pending: it gets only the request to confirm.
        """
        log = _log.bind(
            tenant_id=delivery.tenant_id, subscription_id=delivery.subscription_id, intent_id=str(delivery.intent_id)
        )
        try:
            message = await self._build_message(target, delivery)
        except (DatabaseUnavailable, PositionNotReached) as error:
            tracker.add_internal_failure()
            return DeliveryResult(delivery, "pending", UNAVAILABLE_RETRY_SECONDS * jitter(), error=str(error))
        except Exception:
            log.exception("message_building_failed")
            tracker.add_internal_failure()
            return _internal_failure(delivery, "the message could not be built")
        if message is None or awaits_confirmation != (message.type == "subscription.confirm"):
            return DeliveryResult(delivery, "withheld", error="no longer visible to this subscription")
        started = time.monotonic()
        try:
            outcome = await self._channel.send(target, message)
        except Exception:
            log.exception("delivery_failed", channel=self._channel.name)
            outcome = Outcome("the message could not be sent")
        seconds = time.monotonic() - started
        tracker.add_attempt(outcome, seconds)
        if outcome.internal_failure:
            return _internal_failure(delivery, outcome.error)
        state, delay = next_state(outcome, delivery.attempts_in_round)
        return DeliveryResult(delivery, state, delay, outcome.response_status, outcome.error, round(seconds * 1000))

    def _decrypt_target(self, endpoint: LeasedEndpoint) -> Endpoint:
        state, channel = endpoint.subscription, self._channel
        assert state is not None  # noqa: S101 - the caller has checked
        secrets = [] if state.encrypted_secret is None else [self._secret_box.decrypt(state.encrypted_secret)]
        valid_until = state.previous_until
        if (
            channel.signs_messages
            and state.previous_encrypted_secret
            and valid_until is not None
            and valid_until.timestamp() > time.time()
        ):
            secrets.append(self._secret_box.decrypt(state.previous_encrypted_secret))
        return Endpoint(
            endpoint.tenant_id,
            endpoint.subscription_id,
            state.audience,
            secrets[0] if channel.has_secret_target and secrets else state.target,
            secrets if channel.signs_messages else (),
        )

    async def _build_message(self, target: Endpoint, delivery: DueDelivery) -> Message | None:
        """Return the message; `None` if its audience may no longer see the subject."""
        subject: Mapping[str, Any] | None
        if delivery.stream_kind == subscription.KIND:
            subject = {"id": delivery.subscription_id, "audience": target.audience}
        else:
            subject = await self._message_builder.build_subject(
                delivery.tenant_id, delivery.stream_kind, delivery.stream_id, delivery.position, target.audience
            )
        if subject is None:
            return None
        return Message(
            id=f"msg_{delivery.intent_id.hex}",
            type=message_type([change.type for change in delivery.changes]),
            position=delivery.position,
            changes=delivery.changes,
            tenant=await self._message_builder.get_tenant(delivery.tenant_id),
            subject_kind=delivery.stream_kind,
            subject=subject,
        )


def _internal_failure(delivery: DueDelivery, error: str | None) -> DeliveryResult:
    """Return the result of a failure of our own side. It shows the error but is no attempt of the endpoint."""
    return DeliveryResult(delivery, "pending", INTERNAL_RETRY_SECONDS * jitter(), error=error)

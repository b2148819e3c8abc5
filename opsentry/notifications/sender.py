"""The sender: takes what is due, sends it with no transaction open, and records what came of it.

Any number of senders share the work. One takes an *endpoint* for as long as a lease lasts, sends what is due there, and
gives it back. What is recorded late, by a sender that stood still while another took over, is refused. A sender that
dies leaves its leases to run out, and what was under way is sent again with the same ids.

Nobody waits for a slow endpoint. Each has few messages under way: one until it has shown that it answers well, then
twice as many each time, up to `WIDEST`. Endpoints that have not shown it share at most half of the sockets, and a
tenant takes no more than its share while others are there.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any
from uuid import uuid4

import structlog

from opsentry.domain import subscription
from opsentry.domain.decider import TransitionRefused
from opsentry.domain.subscription import DisableSubscription
from opsentry.events.codec import Actor, Meta
from opsentry.events.execute import Commands, ConcurrentChange, NoSuchStream
from opsentry.events.writer import TenantBusy
from opsentry.notifications import ledger
from opsentry.notifications.channel import Channel, Endpoint, Message, Outcome
from opsentry.notifications.composing import Composer, message_type
from opsentry.notifications.ledger import (
    PROBE_AFTER,
    PROBE_SECONDS,
    RETRY_SECONDS,
    WIDEST,
    Claimed,
    Due,
    Release,
    Result,
    Work,
)
from opsentry.notifications.sealing import CannotOpen, Sealing
from opsentry.postgres import Database, DatabaseUnavailable
from opsentry.projections.runner import NotThereYet

_log = structlog.get_logger()

POLL_SECONDS = 0.5
LEASE_SECONDS = 60.0
# Nothing is begun after this part of the lease: what is begun is over before the lease is, in 30 s at most.
_BEGIN_WITHIN = 0.4
# An endpoint gets so many rounds of what it takes at once, then others have their turn.
_ROUNDS = 4
# One that needs longer for an answer is not given more at once.
_SLOW_SECONDS = 2.0
_JITTER = 0.2
# What fails for a reason of ours is tried again after this: the mail relay is down, or a secret cannot be opened.
_OURS_SECONDS = 60.0
# And this, where the database is slow, or a read model is not there yet.
_SOON_SECONDS = 5.0
_FRESH = 50
_TIMEOUT = 10.0
_STOP_SECONDS = 6.0
_META = Meta(Actor("sender"))


class Sender:
    """Sends what is due, until stopped.

    Args:
        database: Where intents and deliveries are.
        commands: Records that a subscription is disabled.
        composer: Says what things looked like.
        channels: By name.
        sealing: Opens targets and secrets.
        sockets: So many messages are under way at once.
        burst: Changes of one thing within so many seconds become one message.
        lease: For so many seconds an endpoint is taken.
    """

    def __init__(
        self,
        database: Database,
        commands: Commands,
        composer: Composer,
        channels: Mapping[str, Channel],
        sealing: Sealing,
        *,
        sockets: int = 256,
        burst: float = 2.0,
        lease: float = LEASE_SECONDS,
    ) -> None:
        self._database = database
        self._commands = commands
        self._composer = composer
        self._channels = channels
        self._sealing = sealing
        self._sockets = sockets
        self._burst = burst
        self._lease_seconds = lease
        self._more = asyncio.Event()
        self._to_do: list[Work] = []
        self._recording = asyncio.Event()
        # Taken before something is sent, given back once it is recorded what came of it: so much may be in doubt, and
        # goes out again, if this process dies.
        self._in_doubt = asyncio.Semaphore(sockets)
        self._recorded = asyncio.Event()
        self._recorded.set()
        self._serving: dict[asyncio.Task[None], Claimed] = {}
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to send, on the running loop."""
        loops = (self._take_over_all, self._claim_all, self._record_all)
        self._loops = [asyncio.create_task(self._surviving(loop)) for loop in loops]

    async def stop(self) -> None:
        """Take nothing more, let what is under way end, record it, and give back what is leased; bounded in time."""
        if not self._loops:
            return
        *taking, recording = self._loops
        for loop in taking:
            loop.cancel()
        try:
            # What takes longer is left to its lease, which runs out by itself.
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await asyncio.gather(*taking, *self._serving, return_exceptions=True)
                    await self._recorded.wait()
        finally:
            recording.cancel()
            await asyncio.gather(recording, *self._serving, return_exceptions=True)
            self._loops = []

    # ---------------------------------------------------------------------------------------- taking

    async def _take_over_all(self) -> None:
        after = lanes = 0
        while True:
            async with self._database.connection(_TIMEOUT) as connection:
                found = await ledger.fresh(connection, after, _FRESH)
            if found:
                async with self._database.transaction(_TIMEOUT) as connection:
                    lanes += await ledger.take_over(connection, found, self._burst)
                self._more.set()
                after = found[-1]
                continue
            # All were gone through. What is left, if nothing new came of it, others are at.
            if not lanes:
                await asyncio.sleep(POLL_SECONDS)
            after = lanes = 0

    async def _claim_all(self) -> None:
        while True:
            self._more.clear()
            if not await self._claim():
                # Woken by an endpoint that is given back; else whatever is due is found at the next look.
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._more.wait()

    async def _claim(self) -> int:
        used, unproven = self._in_use()
        free, half = self._sockets - used.total(), self._sockets // 2
        proven_only = unproven.total() >= half
        if free < (WIDEST if proven_only else 1):
            return 0
        # There is always a share left for one more tenant.
        shares = len(used) + 1
        satisfied = [
            tenant_id for tenant_id, sockets in used.items() if sockets >= max(WIDEST, self._sockets // shares)
        ]
        timid = [tenant_id for tenant_id, sockets in unproven.items() if sockets >= max(1, half // shares)]
        at_most = max(1, free // WIDEST)
        async with self._database.transaction(_TIMEOUT) as connection:
            began = time.monotonic()
            claimed = await ledger.claim(
                connection,
                uuid4(),
                seconds=self._lease_seconds,
                at_most=at_most,
                passing_over=satisfied,
                proven=proven_only,
                proven_of=timid,
            )
            due = await ledger.take(connection, [(each, _quantum(each)) for each in claimed], self._burst)
        waiting: dict[tuple[int, int], list[Due]] = {}
        for each in due:
            waiting.setdefault((each.tenant_id, each.subscription_id), []).append(each)
        for endpoint in claimed:
            messages = waiting.get((endpoint.tenant_id, endpoint.subscription_id), [])
            task = asyncio.create_task(self._serve(endpoint, messages, began + self._lease_seconds * _BEGIN_WITHIN))
            self._serving[task] = endpoint
            task.add_done_callback(self._served)
        return len(claimed)

    def _in_use(self) -> tuple[Counter[int], Counter[int]]:
        """Return the sockets that each tenant has in use: all, and at endpoints that have not shown to answer well."""
        used: Counter[int] = Counter()
        unproven: Counter[int] = Counter()
        for endpoint in self._serving.values():
            used[endpoint.tenant_id] += endpoint.width
            unproven[endpoint.tenant_id] += endpoint.width == 1
        return used, unproven

    def _served(self, task: "asyncio.Task[None]") -> None:
        del self._serving[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect; the lease runs out, and others, or newer code, try again.
            _log.error("an endpoint could not be served", exc_info=error)
        self._more.set()

    # ---------------------------------------------------------------------------------------- sending

    async def _serve(self, endpoint: Claimed, due: Sequence[Due], begin_until: float) -> None:
        """Send what is due at an endpoint, and give it back."""
        state = endpoint.subscription
        behind = any(each.sequence > endpoint.shown for each in due)
        if state is None or behind or (channel := self._channels.get(state.channel)) is None:
            # Its read model is being derived, or newer code than this knows the channel.
            self._note(endpoint, (), Release(endpoint.failures, endpoint.width, hold=_SOON_SECONDS))
            return
        confirms = state.status == "pending"
        if state.status not in {"active", "pending"}:
            self._note(endpoint, (), Release(0, 1, off=True))
            return
        try:
            target = self._target(endpoint, channel)
        except CannotOpen as error:
            for each in due:
                await self._in_doubt.acquire()
                self._note(endpoint, [_ours(each, str(error), None)])
            self._note(endpoint, (), Release(endpoint.failures, endpoint.width, hold=_OURS_SECONDS))
            return
        course = _Course(endpoint.failures)
        queue = list(reversed(due))

        async def send_some() -> None:
            while queue:
                await self._in_doubt.acquire()
                result = None
                try:
                    if queue and course.goes_on and time.monotonic() < begin_until:
                        result = await self._send(channel, target, queue.pop(), course, confirms=confirms)
                finally:
                    if result is None:
                        self._in_doubt.release()
                if result is None:
                    return
                self._note(endpoint, [result])

        await asyncio.gather(*(send_some() for _ in range(min(endpoint.width, len(due)))))
        if course.gone:
            await self._disable(endpoint, "gone")
        width = 1 if course.failures or course.slow else min(WIDEST, endpoint.width * (2 if course.taken else 1))
        hold = course.retry_after
        if course.failures >= PROBE_AFTER:
            hold = max(PROBE_SECONDS * _jitter(), hold or 0.0)
        self._note(endpoint, (), Release(course.failures, width, hold=hold, off=course.gone))

    def _target(self, endpoint: Claimed, channel: Channel) -> Endpoint:
        state = endpoint.subscription
        assert state is not None  # noqa: S101 - the caller has looked
        sealed = [] if state.sealed is None else [self._sealing.open(state.sealed)]
        until = state.previous_until
        if channel.signs and state.previous_sealed and until is not None and until.timestamp() > time.time():
            sealed.append(self._sealing.open(state.previous_sealed))
        return Endpoint(
            endpoint.tenant_id,
            endpoint.subscription_id,
            state.audience,
            sealed[0] if channel.hides and sealed else state.target,
            sealed if channel.signs else (),
        )

    async def _send(self, channel: Channel, target: Endpoint, due: Due, course: "_Course", *, confirms: bool) -> Result:
        try:
            message = await self._message(target, due)
        except (DatabaseUnavailable, NotThereYet) as error:
            course.ours = True
            return Result(due, "waiting", _SOON_SECONDS * _jitter(), error=str(error))
        except Exception:  # noqa: BLE001 - one message that cannot be written must not hold up its endpoint
            _log.exception(
                "a message could not be composed", tenant_id=due.tenant_id, subscription_id=due.subscription_id
            )
            course.ours = True
            return _ours(due, "could not be composed", None)
        if message is None or confirms != (message.type == "subscription.confirm"):
            return Result(due, "withheld", error="not to be told any more")
        began = time.monotonic()
        outcome = await channel.send(target, message)
        seconds = time.monotonic() - began
        milliseconds = round(seconds * 1000)
        course.note(outcome, seconds)
        if outcome.error is None:
            return Result(due, "delivered", None, outcome.answer, None, milliseconds, counted=True)
        if outcome.gone:
            return Result(due, "disabled", None, outcome.answer, outcome.error, milliseconds, counted=True)
        if outcome.ours:
            return _ours(due, outcome.error, milliseconds)
        if due.attempts >= len(RETRY_SECONDS):
            return Result(due, "parked", None, outcome.answer, outcome.error, milliseconds, counted=True)
        delay = max(RETRY_SECONDS[due.attempts] * _jitter(), outcome.retry_after or 0.0)
        return Result(due, "waiting", delay, outcome.answer, outcome.error, milliseconds, counted=True)

    async def _message(self, target: Endpoint, due: Due) -> Message | None:
        """Return the message, `None` where its audience may not see what it tells any more."""
        subject: Mapping[str, Any] | None
        if due.kind == subscription.KIND:
            subject = {"id": due.subscription_id, "audience": target.audience}
        else:
            subject = await self._composer.compose(
                due.tenant_id, due.kind, due.stream_id, due.sequence, target.audience
            )
        if subject is None:
            return None
        return Message(
            id=f"msg_{due.intent_id.hex}",
            type=message_type([change.type for change in due.changes]),
            sequence=due.sequence,
            changes=due.changes,
            tenant=await self._composer.tenant(due.tenant_id),
            kind=due.kind,
            subject=subject,
        )

    async def _disable(self, endpoint: Claimed, reason: str) -> None:
        """Put on the tenant's record that nothing is sent there any more. Doing so again changes nothing."""
        command = DisableSubscription(reason=reason)
        with suppress(TransitionRefused, NoSuchStream):  # removed meanwhile
            await self._commands.execute(
                subscription.DECIDER, endpoint.tenant_id, endpoint.subscription_id, command, _META
            )
        _log.info(
            "subscription disabled",
            tenant_id=endpoint.tenant_id,
            subscription_id=endpoint.subscription_id,
            reason=reason,
        )

    # ---------------------------------------------------------------------------------------- recording

    def _note(self, endpoint: Claimed, results: Sequence[Result], release: Release | None = None) -> None:
        self._to_do.append(Work(endpoint, results, release))
        self._recorded.clear()
        self._recording.set()

    async def _record_all(self) -> None:
        """Record what has come of deliveries, all that there is in one transaction, while the next are sent."""
        while True:
            await self._recording.wait()
            self._recording.clear()
            if not (work := list(self._to_do)):
                continue
            async with self._database.transaction(_TIMEOUT) as connection:
                hopeless = await ledger.record(connection, work, self._burst)
            del self._to_do[: len(work)]
            for _ in (result for each in work for result in each.results):
                self._in_doubt.release()
            if not self._to_do:
                self._recorded.set()
            self._more.set()
            for endpoint in hopeless:
                await self._disable(endpoint, "failing")
                async with self._database.transaction(_TIMEOUT) as connection:
                    await ledger.turn_off(connection, endpoint)

    async def _surviving(self, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await loop()
            except (DatabaseUnavailable, TenantBusy, ConcurrentChange) as error:
                _log.warning("will try again", task="send", error=str(error))
            except Exception:  # noqa: BLE001 - a loop that dies of a defect would end all sending
                _log.exception("unexpected error; will try again", task="send")
            # What could not be recorded is still there.
            self._recording.set()
            await asyncio.sleep(POLL_SECONDS)


class _Course:
    """How it goes at an endpoint while it is served."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self._probes = failures >= PROBE_AFTER
        self.gone = False
        self.slow = False
        self.taken = False
        self.ours = False
        self.retry_after: float | None = None

    def note(self, outcome: Outcome, seconds: float) -> None:
        """Take an attempt into account."""
        self._probes = False
        self.slow = self.slow or seconds > _SLOW_SECONDS
        self.gone = self.gone or outcome.gone
        self.ours = self.ours or outcome.ours
        if outcome.error is None:
            self.failures = 0
            self.taken = True
        elif not outcome.ours:
            self.failures += 1
            self.retry_after = outcome.retry_after or self.retry_after

    @property
    def goes_on(self) -> bool:
        """Whether more may be sent now: not to what is gone, fails again and again, or asks to be left alone."""
        failing = self.failures >= PROBE_AFTER and not self._probes
        return not (self.gone or self.ours or failing or self.retry_after is not None)


def _quantum(endpoint: Claimed) -> int:
    """Return how many messages an endpoint may have in one go: a single one while it is probed."""
    return 1 if endpoint.failures >= PROBE_AFTER else endpoint.width * _ROUNDS


def _ours(due: Due, error: str, milliseconds: int | None) -> Result:
    return Result(due, "waiting", _OURS_SECONDS * _jitter(), None, error, milliseconds)


def _jitter() -> float:
    return random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spreads load, keeps no secret

"""The dispatcher: takes endpoints of one channel, has a courier serve each, and records what came of it.

Nobody waits for a slow endpoint. Each has few messages under way: one until it has shown that it answers well, then
twice as many each time, up to `WIDEST`. Endpoints that have not shown it share at most half of the sockets, and a
tenant takes no more than its share while others are there.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import cast
from uuid import UUID, uuid4

import structlog

from opsentry.domain import subscription
from opsentry.domain.decider import IllegalTransition
from opsentry.domain.subscription import DisableSubscription, Subscription, SubscriptionEvent
from opsentry.events.codec import Actor, Meta, RecordedEvent
from opsentry.events.command_handler import CommandHandler, StreamNotFound
from opsentry.infrastructure.periodic import log_failure, run_forever
from opsentry.infrastructure.postgres import Database, is_transient
from opsentry.notifications.channel import Channel
from opsentry.notifications.delivery import leases
from opsentry.notifications.delivery.endpoint_worker import EndpointWorker
from opsentry.notifications.delivery.leases import Due, LeasedEndpoint, Release, Result, Work
from opsentry.notifications.delivery.ordering import PROBE_AFTER

_log = structlog.get_logger()

POLL_SECONDS = 0.5
TIMEOUT = 10.0
# Nothing is begun after this part of the lease: what is begun is over before the lease is, in 30 s at most.
_BEGIN_WITHIN = 0.4
# So many endpoints are taken at once: while the next ones are, these are sent to.
_CLAIMED = 16
# An endpoint gets so many rounds of what it takes at once, if its turn lasts so long.
_ROUNDS = 16
# So much is recorded in one transaction at most; where more waits for that, nothing more is taken.
_RECORDED = 500
# What could not be recorded is sent again after so long.
_LOST_SECONDS = 60.0
# What comes of messages is collected for so long before it is recorded: more of it shares a transaction.
_COLLECT_SECONDS = 0.01
# When it stops: so long for what is under way, and then for recording it.
_STOP_SECONDS = 6.0
_RECORD_SECONDS = 2.0
_META = Meta(Actor("sender"))
# An endpoint whose subscription could not be disabled just now is left alone for so long.
_SOON_SECONDS = 5.0
# A claim that takes so long because of all those that it passes by is made again after some times as long.
_LONG_SECONDS = 0.05
_PATIENCE = 3


class Dispatcher:
    """Sends what is due on one channel, until stopped.

    Args:
        database: Where deliveries are.
        commands: Records that a subscription is disabled.
        channel: The channel.
        courier: Sends with it.
        sockets: So many messages are under way at once.
        burst: Changes of one thing within so many seconds become one message.
        lease: For so many seconds an endpoint is taken.
    """

    def __init__(
        self,
        database: Database,
        commands: CommandHandler,
        channel: Channel,
        courier: EndpointWorker,
        *,
        sockets: int,
        burst: float,
        lease: float,
    ) -> None:
        self._database = database
        self._commands = commands
        self._channel = channel
        self._courier = courier
        self._sockets = sockets
        self._burst = burst
        self._lease_seconds = lease
        self._more = asyncio.Event()
        self._to_do: list[Work] = []
        # Endpoints, as they are leased, where something could not be recorded.
        self._lost: set[tuple[int, int, UUID]] = set()
        self._recording = asyncio.Event()
        self._recorded = asyncio.Event()
        self._recorded.set()
        # With each endpoint that is served, how many messages are under way there.
        self._serving: dict[asyncio.Task[None], tuple[LeasedEndpoint, int]] = {}
        self._disabling: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to send, on the running loop."""
        loops = (self._claim_all, self._record_all)
        self._loops = [asyncio.create_task(run_forever(loop, pause_seconds=POLL_SECONDS)) for loop in loops]

    def look(self) -> None:
        """Look at once whether something is due, which is done every half second anyway."""
        self._more.set()

    async def stop(self) -> None:
        """Take nothing more, let what is under way end, record it, and give back what is leased; bounded in time."""
        if not self._loops:
            return
        claiming, recording = self._loops
        self._courier.stop()
        claiming.cancel()
        try:
            # What takes longer is cancelled, and left to its lease, which runs out by itself.
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await asyncio.gather(claiming, *self._serving, *self._disabling, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(_RECORD_SECONDS):
                    await self._recorded.wait()
        finally:
            for task in (recording, *self._disabling):
                task.cancel()
            await asyncio.gather(recording, *self._serving, *self._disabling, return_exceptions=True)
            self._loops = []

    # ---------------------------------------------------------------------------------------- taking

    async def _claim_all(self) -> None:
        while True:
            self._more.clear()
            began = time.monotonic()
            claimed, passed_by = await self._claim()
            if not claimed:
                if passed_by and (took := time.monotonic() - began) > _LONG_SECONDS:
                    await asyncio.sleep(min(POLL_SECONDS, _PATIENCE * took))
                # Woken by an endpoint that is given back; else whatever is due is found at the next look.
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._more.wait()

    async def _claim(self) -> tuple[int, bool]:
        """Take endpoints; return how many, and whether some were passed by that have their share."""
        used, unproven = self._in_use()
        free, half = self._sockets - used.total(), self._sockets // 2
        # Where all goes through one thing of ours, no endpoint is slow by itself.
        alike = self._channel.max_concurrency is not None
        proven_only = not alike and unproven.total() >= half
        widest = self._courier.widest
        if free < widest or len(self._to_do) >= _RECORDED:
            return 0, False
        # There is always a share left for one more tenant.
        shares = len(used) + 1
        satisfied = [tenant_id for tenant_id, count in used.items() if count >= max(widest, self._sockets // shares)]
        timid = [tenant_id for tenant_id, count in unproven.items() if not alike and count >= max(1, half // shares)]
        async with self._database.transaction(TIMEOUT) as connection:
            began = time.monotonic()
            claimed = await leases.claim(
                connection,
                uuid4(),
                self._channel.name,
                seconds=self._lease_seconds,
                at_most=min(_CLAIMED, free // widest),
                passing_over=satisfied,
                proven=proven_only,
                proven_of=timid,
            )
            due = await leases.take(connection, [(each, _quantum(each)) for each in claimed], self._burst)
        waiting: dict[tuple[int, int], list[Due]] = {}
        for each in due:
            waiting.setdefault((each.tenant_id, each.subscription_id), []).append(each)
        for endpoint in claimed:
            messages = waiting.get((endpoint.tenant_id, endpoint.subscription_id), [])
            task = asyncio.create_task(self._serve(endpoint, messages, began + self._lease_seconds * _BEGIN_WITHIN))
            self._serving[task] = endpoint, min(endpoint.width, widest, len(messages))
            task.add_done_callback(self._served)
        return len(claimed), bool(satisfied or timid or proven_only)

    def _in_use(self) -> tuple[Counter[int], Counter[int]]:
        """Return the sockets that each tenant has in use: all, and at endpoints that have not shown to answer well."""
        used: Counter[int] = Counter()
        unproven: Counter[int] = Counter()
        for endpoint, under_way in self._serving.values():
            used[endpoint.tenant_id] += under_way
            unproven[endpoint.tenant_id] += endpoint.width == 1
        return used, unproven

    async def _serve(self, endpoint: LeasedEndpoint, due: Sequence[Due], begin_until: float) -> None:
        """Have what is due at an endpoint be sent, and give it back."""
        gone: list[Result] = []

        def note(result: Result) -> None:
            if result.state == "disabled":
                gone.append(result)
            else:
                self._note(endpoint, [result])

        release = await self._courier.serve(endpoint, due, begin_until, note)
        if gone and not await self._is_gone(endpoint):
            # It has another target by now, or what it answered is asked for again.
            gone = [result._replace(state="waiting", delay=_SOON_SECONDS) for result in gone]
            release = release._replace(off=False, hold=_SOON_SECONDS)
        self._note(endpoint, gone, release)

    def _served(self, task: "asyncio.Task[None]") -> None:
        del self._serving[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect; the lease runs out, and others, or newer code, try again.
            _log.error("an endpoint could not be served", exc_info=error)
        self._more.set()

    # ---------------------------------------------------------------------------------------- recording

    def _note(self, endpoint: LeasedEndpoint, results: Sequence[Result], release: Release | None = None) -> None:
        self._to_do.append(Work(endpoint, results, release))
        self._recorded.clear()
        self._recording.set()

    async def _record_all(self) -> None:
        """Record what has come of deliveries, much of it in one transaction, while the next are sent."""
        while True:
            if not self._to_do:
                self._recording.clear()
                await self._recording.wait()
            await asyncio.sleep(_COLLECT_SECONDS)
            work = self._to_do[:_RECORDED]
            try:
                await self._record(work)
            except Exception as error:
                if is_transient(error):
                    raise
                # What cannot be recorded must not hold up what can.
                _log.exception("results could not be recorded together; each by itself")
                await self._record_each(work)

    async def _record_each(self, work: Sequence[Work]) -> None:
        for each in work:
            try:
                await self._record([each])
            except Exception as error:
                if is_transient(error):
                    raise
                # A defect; it is sent again, but not at once.
                endpoint = each.endpoint
                self._lost.add(_key(endpoint))
                _log.exception(
                    "a result could not be recorded",
                    tenant_id=endpoint.tenant_id,
                    subscription_id=endpoint.subscription_id,
                )
                self._forget([each])

    async def _record(self, work: Sequence[Work]) -> None:
        async with self._database.transaction(TIMEOUT) as connection:
            hopeless = await leases.record(connection, [self._put_off(each) for each in work], self._burst)
        self._forget(work)
        for endpoint in hopeless:
            # Not waited for: commands may take long. Forgotten by a crash, it is found again at the next probe.
            task = asyncio.create_task(self._give_up(endpoint))
            self._disabling.add(task)
            task.add_done_callback(self._disabling.discard)

    def _put_off(self, work: Work) -> Work:
        """Return work whose endpoint is left alone for a while if something of it could not be recorded."""
        if work.release is None or _key(work.endpoint) not in self._lost:
            return work
        return work._replace(release=work.release._replace(hold=_LOST_SECONDS))

    def _forget(self, work: Sequence[Work]) -> None:
        """Strike off what was recorded, which is the oldest."""
        del self._to_do[: len(work)]
        self._courier.recorded(sum(len(each.results) for each in work))
        self._lost -= {_key(each.endpoint) for each in work if each.release is not None}
        if not self._to_do:
            self._recorded.set()
        self._more.set()

    # ---------------------------------------------------------------------------------------- disabling

    async def _is_gone(self, endpoint: LeasedEndpoint) -> bool:
        try:
            return await self._disable(endpoint, "endpoint_gone")
        except Exception as error:  # noqa: BLE001 - the next answer says it again
            log_failure("disable", error)
            return False

    async def _give_up(self, endpoint: LeasedEndpoint) -> None:
        try:
            if await self._disable(endpoint, "endpoint_failing"):
                async with self._database.transaction(TIMEOUT) as connection:
                    await leases.turn_off(connection, endpoint)
        except Exception as error:  # noqa: BLE001 - nobody waits for it
            log_failure("disable", error)

    async def _disable(self, endpoint: LeasedEndpoint, reason: str) -> bool:
        """Put on the tenant's record that nothing is sent there any more; return whether that is so.

        It is not where the subscription names another endpoint by now. Doing it again changes nothing.
        """
        key = endpoint.tenant_id, endpoint.subscription_id

        def command(history: Sequence[RecordedEvent]) -> DisableSubscription:
            state = subscription.DECIDER.fold(cast("SubscriptionEvent", recorded.event) for recorded in history)
            if _where(state) != _where(endpoint.subscription):
                raise _SentElsewhere
            return DisableSubscription(reason=reason)

        try:
            executed = await self._commands.execute(subscription.DECIDER, *key, command, _META)
        except (IllegalTransition, StreamNotFound):  # removed meanwhile
            return True
        except _SentElsewhere:
            return False
        if executed.appended:
            _log.info("subscription disabled", tenant_id=key[0], subscription_id=key[1], reason=reason)
        return executed.state.status not in {"active", "pending"}


def _key(endpoint: LeasedEndpoint) -> tuple[int, int, UUID]:
    return endpoint.tenant_id, endpoint.subscription_id, endpoint.lease


class _SentElsewhere(Exception):
    """The subscription names another endpoint than the one that a message was sent to."""


def _where(state: Subscription | None) -> tuple[str, str | None] | None:
    """Return what tells one endpoint from another: the target, encrypted_secret where it is a secret."""
    return None if state is None else (state.target, state.encrypted_secret)


def _quantum(endpoint: LeasedEndpoint) -> int:
    """Return how many messages an endpoint may have in one go: a single one while it is probed."""
    return 1 if endpoint.failures >= PROBE_AFTER else endpoint.width * _ROUNDS

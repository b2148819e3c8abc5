"""Execute commands as the scheduler, which acts for no person."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from opsentry.domain.decider import Decider, Event, IllegalTransition
from opsentry.events.codec import Actor, Meta, RecordedEvent
from opsentry.events.command_handler import CommandHandler, ConcurrencyConflict, StreamNotFound
from opsentry.infrastructure.periodic import log_failure
from opsentry.projections.engine.projector import Projector

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)

_META = Meta(Actor("scheduler"))

_log = structlog.get_logger()


class Scheduler:
    """Execute commands of periodic tasks, and log the events and the failures of each."""

    def __init__(self, commands: CommandHandler, projector: Projector) -> None:
        self._commands = commands
        self._projector = projector

    async def execute(
        self,
        task: str,
        decider: Decider[S, C, E],
        tenant_id: int,
        stream_id: int,
        command: C | Callable[[Sequence[RecordedEvent]], C],
    ) -> None:
        """Execute one command. Its failure is logged under `task`, so that a busy tenant delays no other tenant."""
        try:
            await self._execute(decider, tenant_id, stream_id, command)
        except Exception as error:  # noqa: BLE001 - a failure of one tenant must not stop the others
            log_failure(task, error, tenant_id=tenant_id, **{f"{decider.kind}_id": stream_id})

    async def _execute(
        self,
        decider: Decider[S, C, E],
        tenant_id: int,
        stream_id: int,
        command: C | Callable[[Sequence[RecordedEvent]], C],
    ) -> None:
        try:
            executed = await self._commands.execute(decider, tenant_id, stream_id, command, _META)
        except (IllegalTransition, ConcurrencyConflict, StreamNotFound):
            # Another worker or a person was faster. The due row was stale: catching up corrects it.
            await self._projector.catch_up(tenant_id, 0)
            return
        await self._projector.catch_up(tenant_id, executed.position)
        for recorded in executed.history[len(executed.history) - executed.appended :]:
            event_name = recorded.event.TYPE.replace(".", "_")
            _log.info(event_name, tenant_id=tenant_id, **{f"{decider.kind}_id": stream_id})

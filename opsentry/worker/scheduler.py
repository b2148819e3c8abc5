"""Run commands as the scheduler, which acts for no person."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from opsentry.application import pipeline
from opsentry.application.application import Application
from opsentry.application.caller import Caller
from opsentry.application.errors import ConcurrencyConflict, NotFound
from opsentry.domain.decider import Decider, Event, IllegalTransition
from opsentry.events.codec import Actor, RecordedEvent
from opsentry.infrastructure.periodic import log_failure

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=Event)

SCHEDULER = Actor("scheduler")

_log = structlog.get_logger()


class Scheduler:
    """Run commands of periodic tasks, and log the events and the failure of each."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def run(
        self,
        task: str,
        decider: Decider[S, C, E],
        tenant_id: int,
        stream_id: int,
        command: C | Callable[[S, Sequence[RecordedEvent]], C],
    ) -> None:
        """Run one command. Its failure is logged under `task`, so that a busy tenant delays no other tenant."""
        fields = {"tenant_id": tenant_id, f"{decider.kind}_id": stream_id}
        caller = Caller(tenant_id=tenant_id, actor=SCHEDULER)
        try:
            result = (await pipeline.run(self._app, caller, decider, command, stream_id=stream_id)).result
        except (IllegalTransition, ConcurrencyConflict, NotFound):
            # Another worker or a person was faster. The due row is stale, and catching up corrects it.
            await self._catch_up(task, tenant_id)
        except Exception as error:  # noqa: BLE001 - a failure of one tenant must not stop the others
            log_failure(task, error, **fields)
        else:
            for recorded in result.history[len(result.history) - result.appended :]:
                _log.info(recorded.event.TYPE.replace(".", "_"), **fields)

    async def _catch_up(self, task: str, tenant_id: int) -> None:
        try:
            await self._app.projector.catch_up(tenant_id, 0)
        except Exception as error:  # noqa: BLE001 - likewise
            log_failure(task, error, tenant_id=tenant_id)

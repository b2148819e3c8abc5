"""A process that appends messages to streams and prints each acknowledged one.

Arguments: database URL, tenant, the process's name, writers, messages of each, stream ids.
"""

import asyncio
import json
import sys

from opsentry.domain import incident
from opsentry.domain.decider import Decider
from opsentry.domain.incident import IncidentEvent, IncidentUpdated, PostUpdate
from opsentry.events.appender import Appender, TenantBusy
from opsentry.events.codec import Actor, Meta
from opsentry.events.command_handler import CommandHandler, CommandOptions, ConcurrencyConflict
from opsentry.infrastructure.postgres import Database
from tests.waiting import GENEROUS_SECONDS

# Only the store is under test: a stream of messages needs no opening event.
DECIDER: Decider[None, PostUpdate, IncidentEvent] = Decider(
    kind=incident.KIND,
    evolve=lambda _state, _event: None,
    decide=lambda _state, command: [IncidentUpdated(message=command.message, status="monitoring")],
)


async def main(url: str, tenant: int, name: str, writers: int, count: int, *streams: int) -> None:
    database = Database(url, size=8, timeout_seconds=GENEROUS_SECONDS)
    await database.open()
    handler = CommandHandler(database, Appender(database))
    options = CommandOptions(Meta(Actor("operator")))

    async def write(appender: int) -> None:
        stream = streams[appender % len(streams)]
        for i in range(count):
            command = PostUpdate(message=f"{name}/{appender}/{i}")
            while True:
                try:
                    done = await handler.change(DECIDER, tenant, stream, command, options)
                except (ConcurrencyConflict, TenantBusy):
                    continue  # nothing was recorded
                break
            print(json.dumps([command.message, done.position, done.version]), flush=True)  # noqa: T201

    await asyncio.gather(*map(write, range(writers)))
    await database.close()


if __name__ == "__main__":
    url, tenant, name, *numbers = sys.argv[1:]
    asyncio.run(main(url, int(tenant), name, *map(int, numbers)))

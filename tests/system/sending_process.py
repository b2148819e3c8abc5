"""Run a sender that kills itself at a given point between leasing and recording.

Arguments: the seconds of a lease, the point or `-`, and the number of the passing that kills the process.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from opsentry import bootstrap
from opsentry.notifications.delivery import leases, results
from opsentry.notifications.delivery.endpoint_worker import EndpointWorker
from opsentry.notifications.messages.builder import MessageBuilder
from opsentry.settings import Settings

# Each point is a call, and True to die after it instead of before. Leases and results are not committed yet when their
# call ends.
POINTS: dict[str, tuple[Any, str, bool]] = {
    "taking": (leases, "take_deliveries", True),
    "reserved": (EndpointWorker, "serve", False),
    "composed": (MessageBuilder, "build_subject", True),
    "sending": (EndpointWorker, "attempt", False),
    "sent": (EndpointWorker, "attempt", True),
    "recording": (results, "record_results", True),
}


def plant(point: str, nth: int) -> None:
    """Kill the process at the `nth` passing of a point."""
    where, name, after = POINTS[point]
    do: Callable[..., Any] = getattr(where, name)
    passed = 0

    @wraps(do)
    async def doing(*arguments: Any, **options: Any) -> Any:
        nonlocal passed
        if not after:
            passed += 1
            die(passed)
        done = await do(*arguments, **options)
        if after and (name == "record_results" or done):
            passed += 1
            die(passed)
        return done

    def die(passed: int) -> None:
        if passed == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(where, name, doing)


async def main(lease: float, point: str, nth: int) -> None:
    settings = Settings.from_environment()
    if point != "-":
        plant(point, nth)
    bootstrap.configure_logging(settings.log_level)
    async with bootstrap.core(settings) as parts, bootstrap.sending(parts, lease=lease):
        print("sending", flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main(float(sys.argv[1]), sys.argv[2], int(sys.argv[3])))

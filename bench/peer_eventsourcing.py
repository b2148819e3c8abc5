"""Saves one new aggregate at a time with pyeventsourcing, from as many threads as asked for; prints saves per second.

Runs in an environment of its own: `python peer_eventsourcing.py HOST DATABASE WAITING SECONDS`.
"""

import json
import sys
import threading
import time

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event


class Incident(Aggregate):
    @event("Opened")
    def __init__(self, title: str, description: str, severity: str, visibility: str, service_ids: list[int]) -> None:
        self.title = title
        self.description = description
        self.severity = severity
        self.visibility = visibility
        self.service_ids = service_ids


def main() -> None:
    host, database, waiting, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    app = Application(
        env={
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": database,
            "POSTGRES_HOST": host,
            "POSTGRES_PORT": "5432",
            "POSTGRES_USER": "postgres",
            "POSTGRES_PASSWORD": "",
            "POSTGRES_POOL_SIZE": str(waiting),
            "POSTGRES_MAX_OVERFLOW": "4",
        }
    )

    def once() -> None:
        app.save(Incident("Deploy failed", "Health checks failing post-deploy", "degraded", "public", [42]))

    for _ in range(50):
        once()
    began = time.perf_counter()
    end = began + seconds
    counts = [0] * waiting

    def loop(number: int) -> None:
        while time.perf_counter() < end:
            once()
            counts[number] += 1

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(waiting)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"rate": sum(counts) / (time.perf_counter() - began)}))
    app.close()


if __name__ == "__main__":
    main()

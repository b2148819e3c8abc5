"""Projects incidents into one PostgreSQL table with pyeventsourcing's projection; prints events projected per second.

Runs in an environment of its own: `python peer_projection.py HOST DATABASE FILE`, where FILE has a JSON array of
streams, each an array of [event type, fields].
"""

import json
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import Tracking
from eventsourcing.postgres import PostgresDatastore, PostgresTrackingRecorder
from eventsourcing.projection import Projection, ProjectionRunner
from psycopg.sql import SQL, Identifier


class Incident(Aggregate):
    @event("Opened")
    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields

    @event("Changed")
    def change(self, type_: str, fields: dict[str, Any]) -> None:
        self.type = type_
        self.fields = {**self.fields, **fields}


class Incidents(Application):
    snapshotting_intervals = None


class Table(PostgresTrackingRecorder):
    """One row for each incident: what it shows, as JSON."""

    def __init__(self, datastore: PostgresDatastore, **options: object) -> None:
        super().__init__(datastore, **options)
        self.table = Identifier("shown_incidents")
        self.sql_create_statements.append(
            SQL("CREATE TABLE IF NOT EXISTS {} (id uuid PRIMARY KEY, version int, status text, body text)").format(
                self.table
            )
        )
        self.upsert = SQL(
            "INSERT INTO {0} VALUES (%(id)s, %(version)s, %(status)s, %(body)s)"
            " ON CONFLICT (id) DO UPDATE SET version = %(version)s, status = %(status)s, body = {0}.body || %(body)s"
        ).format(self.table)

    def show(self, number: UUID, version: int, status: str, body: str, tracking: Tracking) -> None:
        with self.datastore.transaction(commit=True) as cursor:
            self._insert_tracking(cursor, tracking)
            cursor.execute(
                self.upsert, {"id": number, "version": version, "status": status, "body": body}, prepare=True
            )


class Shown(Projection):
    def process_event(self, domain_event: Aggregate.Event, tracking: Tracking) -> None:
        fields = domain_event.fields
        status = fields.get("status", "investigating")
        self.view.show(
            domain_event.originator_id, domain_event.originator_version, status, json.dumps(fields), tracking
        )


def main() -> None:
    host, database, file = sys.argv[1:4]
    env = {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": database,
        "POSTGRES_HOST": host,
        "POSTGRES_PORT": "5432",
        "POSTGRES_USER": "postgres",
        "POSTGRES_PASSWORD": "",
    }
    app = Incidents(env)
    events = 0
    last = 0
    for stream in json.loads(Path(file).read_text()):
        incident = Incident(stream[0][1])
        for type_, fields in stream[1:]:
            incident.change(type_, fields)
        last = app.save(incident)[-1].notification.id
        events += len(stream)
    began = time.perf_counter()
    with ProjectionRunner(application_class=Incidents, projection_class=Shown, view_class=Table, env=env) as projector:
        projector.wait(last, timeout=300)
        print(json.dumps({"rate": events / (time.perf_counter() - began)}))
    app.close()


if __name__ == "__main__":
    main()

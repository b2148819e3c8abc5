"""Helpers for tests of the store: short commands, and rows as stored."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from opsentry.domain.incident import IncidentUpdated
from opsentry.events import store
from opsentry.events.codec import Actor, Meta, to_microseconds
from opsentry.events.hash_chain import GENESIS, Link, Violation, check
from opsentry.events.store import Append, NewEvent, Outcome
from opsentry.infrastructure.postgres import Connection
from tests.waiting import GENEROUS_SECONDS

META = Meta(Actor("operator"))

ODD_TEXTS = [
    " leading, trailing and  double spaces ",
    "tab\tnewline\nreturn\r\nvertical\v form\f nul-escape \\u0000 backslash \\ quote \" ' $1 %s",
    "Zürich 日本語 العربية 🧯👩‍👩‍👧 e\u0301 vs é \u200b\u2028\u2029\ufeff\x7f\x1b[31m",
    '{"looks": "like json"}',
    "]]>--;DROP TABLE events",
]


def note(text: str, occurred_at: datetime | None = None) -> NewEvent:
    return NewEvent(IncidentUpdated(message=text, status="monitoring"), META, occurred_at)


def notes(
    tenant_id: int,
    *texts: str,
    stream: int = 0,
    expected: int = 0,
    kind: str = "incident",
    reservation: str | None = None,
) -> Append:
    return Append(
        tenant_id=tenant_id,
        kind=kind,
        stream_id=stream,
        expected_version=expected,
        events=[note(text) for text in texts],
        reservation=reservation,
    )


async def append(connection: Connection, command: Append, *, wait: bool = True) -> Outcome:
    (outcome,) = await store.append_events(connection, [command], wait=wait)
    return outcome


async def new_tenant(connection: Connection, slug: str) -> int:
    return int(await connection.fetchval("INSERT INTO tenants (slug, name) VALUES ($1, $1) RETURNING tenant_id", slug))


async def rows(connection: Connection, tenant_id: int) -> Sequence[Any]:
    return list(await connection.fetch("SELECT * FROM events WHERE tenant_id = $1 ORDER BY position", tenant_id))


def links(stored: Iterable[Mapping[str, Any]]) -> list[Link]:
    times = ("occurred_at", "recorded_at")
    columns: list[list[Any]] = [[to_microseconds(r[f]) if f in times else r[f] for f in Link._fields] for r in stored]
    return [Link._make(row) for row in columns]


def violation(stored: Iterable[Mapping[str, Any]], previous: bytes = GENESIS, position: int = 0) -> Violation | None:
    return check(links(stored), previous, position)


def first_broken(stored: Iterable[Mapping[str, Any]], previous: bytes = GENESIS, position: int = 0) -> int | None:
    found = violation(stored, previous, position)
    return None if found is None else found.position


async def messages(connection: Connection, tenant_id: int) -> list[str]:
    recorded = await store.read_after(connection, tenant_id, 0, 100_000)
    return [r.event.message for r in recorded if isinstance(r.event, IncidentUpdated)]


@asynccontextmanager
async def held(connection: Connection, tenant_id: int) -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    await append(connection, notes(tenant_id, "never committed"))
    try:
        yield
    finally:
        await transaction.rollback()


async def blocked_backend(watcher: Connection) -> int:
    async with asyncio.timeout(GENEROUS_SECONDS):
        while True:
            pid = await watcher.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            if pid is not None:
                return int(pid)

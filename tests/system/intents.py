"""Who must be told of what, worked out once more from a ledger's rows alone, one event after the other."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

LEVELS = ("informational", "degraded", "partial_outage", "major_outage", "critical")
TOLD = {
    "incident.opened",
    "incident.updated",
    "incident.resolved",
    "maintenance.scheduled",
    "maintenance.started",
    "maintenance.completed",
}


class Told(NamedTuple):
    """A message that somebody must get, or would have to were it not for a window."""

    seq: int
    subscription_id: int
    channel: str
    suppressed: bool


def told(ledger: Iterable[Mapping[str, Any]]) -> list[Told]:
    """Return what a tenant's whole ledger gives; it has no events but those that are named here."""
    wishes: dict[int, Any] = {}
    topics: dict[tuple[str, int], Any] = {}
    silencing: dict[int, set[int]] = {}
    found = []
    for row in ledger:
        kind, number, data = row["stream_kind"], row["stream_id"], json.loads(row["data"])
        match row["type"]:
            case "subscription.created":
                wishes[number] = data
            case "incident.opened" | "maintenance.scheduled":
                topics[kind, number] = data
            case "maintenance.started" if topics[kind, number]["suppress_alerts"]:
                silencing[number] = set(topics[kind, number]["service_ids"])
            case "maintenance.completed":
                silencing.pop(number, None)
            case "incident.updated" | "incident.resolved" | "maintenance.started":
                pass
            case other:
                assert not other.startswith(("subscription.", "incident.", "maintenance.")), other
        if row["type"] not in TOLD:
            continue
        topic = topics[kind, number]
        services = set(topic["service_ids"])
        suppressed = kind == "incident" and bool(services) and any(services <= each for each in silencing.values())
        for wish_id, wish in wishes.items():
            public = topic["visibility"] == "public" and data.get("is_public", True)
            if (
                wish["incidents" if kind == "incident" else "maintenance"]
                and (public or wish["audience"] == "internal")
                and (not wish["service_ids"] or services & set(wish["service_ids"]))
                and ("severity" not in topic or _severe(topic, wish))
            ):
                found.append(Told(row["seq"], wish_id, wish["channel"], suppressed))
    return found


def _severe(topic: Mapping[str, Any], wish: Mapping[str, Any]) -> bool:
    return LEVELS.index(topic["severity"]) >= LEVELS.index(wish["lowest_severity"])


async def check_intents(owner: Any, tenant_id: int) -> int:
    """Check that the outbox holds just what the ledger gives up to where it stands; return how many that is."""
    async with owner.transaction(isolation="repeatable_read", readonly=True):
        position = await owner.fetchval(
            "SELECT position FROM checkpoints WHERE tenant_id = $1 AND projection = 'outbox'", tenant_id
        )
        ledger = await owner.fetch(
            "SELECT seq, stream_kind, stream_id, type, data FROM events WHERE tenant_id = $1 AND seq <= $2"
            " ORDER BY seq",
            tenant_id,
            position,
        )
        rows = await owner.fetch(
            "SELECT intent_id, seq, subscription_id, channel, suppressed FROM outbox_intents WHERE tenant_id = $1",
            tenant_id,
        )
    assert len({row["intent_id"] for row in rows}) == len(rows)
    assert len({(row["seq"], row["subscription_id"], row["channel"]) for row in rows}) == len(rows)
    expected = told(ledger)
    assert sorted(Told(*tuple(row)[1:]) for row in rows) == sorted(expected)
    return len(expected)

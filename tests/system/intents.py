"""Derive the notifications that a ledger requires from its rows alone, independently of the outbox."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

LEVELS = ("informational", "degraded", "partial_outage", "major_outage", "critical")
NOTIFIED = {
    "incident.opened",
    "incident.updated",
    "incident.status_changed",
    "incident.severity_changed",
    "incident.resolved",
    "incident.reopened",
    "maintenance.scheduled",
    "maintenance.rescheduled",
    "maintenance.reminded",
    "maintenance.updated",
    "maintenance.started",
    "maintenance.completed",
    "maintenance.cancelled",
}
# Events that change no filter, no topic and no window.
REST = {
    "incident.edited",
    "incident.redacted",
    "maintenance.edited",
    "maintenance.redacted",
    "subscription.secret_rotated",
    "subscription.redacted",
    *NOTIFIED,
}


class ExpectedIntent(NamedTuple):
    """One notification to one subscription; `suppressed` by an active window or not."""

    position: int
    subscription_id: int
    channel: str
    topic: str
    stream_kind: str
    stream_id: int
    suppressed: bool


class IntentModel:
    """Hold the filters, incidents and windows after the events read so far."""

    def __init__(self) -> None:
        self.filters: dict[int, Any] = {}
        self.things: dict[tuple[str, int], Any] = {}
        self.silencing: dict[int, set[int]] = {}
        # Open incidents whose last notification was suppressed.
        self.unheard: set[int] = set()

    def read(self, row: Mapping[str, Any]) -> Iterator[ExpectedIntent]:
        """Apply one event; yield the intents that it requires."""
        kind, number, name = row["stream_kind"], row["stream_id"], row["type"]
        data = json.loads(row["data"])
        loud = not json.loads(row["meta"]).get("silent", False)
        thing: Any = self.things.get((kind, number))
        over = name == "maintenance.completed" and self.silencing.pop(number, None) is not None
        match name:
            case "subscription.created":
                self.filters[number] = {**data, "active": not data.get("pending", False)}
                if data.get("pending", False) and loud:
                    yield ExpectedIntent(row["position"], number, data["channel"], name, kind, number, suppressed=False)
            case "subscription.confirmed" | "subscription.enabled":
                self.filters[number]["active"] = True
            case "subscription.disabled":
                self.filters[number]["active"] = False
            case "subscription.changed":
                self.filters[number] |= data
            case "subscription.removed":
                del self.filters[number]
            case "subscription.test_requested":
                if loud:
                    channel = self.filters[number]["channel"]
                    yield ExpectedIntent(row["position"], number, channel, name, kind, number, suppressed=False)
            case "incident.opened" | "maintenance.scheduled":
                self.things[kind, number] = thing = {**data, "worst": data.get("severity", "critical")}
            case "incident.visibility_changed" | "incident.services_changed" | "maintenance.changed":
                thing |= data
            case "incident.severity_changed":
                thing["severity"] = data["severity"]
                thing["worst"] = max(thing["worst"], data["severity"], key=LEVELS.index)
            case "incident.reopened":
                thing["worst"] = thing["severity"]
            case "maintenance.started":
                if thing["suppress_alerts"]:
                    self.silencing[number] = set(thing["service_ids"])
            case _:
                assert name in REST or not name.startswith(("subscription.", "incident.", "maintenance.")), name
        if name in NOTIFIED and loud:
            withheld = kind == "incident" and self.withheld(thing)
            for subscription_id, channel in self.who(kind, thing, public=data.get("is_public", True)):
                yield ExpectedIntent(row["position"], subscription_id, channel, name, kind, number, withheld)
            if kind == "incident":
                (self.unheard.add if withheld else self.unheard.discard)(number)
        if name == "incident.resolved":
            self.unheard.discard(number)
        if over and loud:
            for unheard in sorted(self.unheard):
                topic = self.things["incident", unheard]
                if not self.withheld(topic):
                    self.unheard.remove(unheard)
                    for subscription_id, channel in self.who("incident", topic, public=True):
                        yield ExpectedIntent(
                            row["position"],
                            subscription_id,
                            channel,
                            "incident.still_open",
                            "incident",
                            unheard,
                            suppressed=False,
                        )

    def withheld(self, thing: Mapping[str, Any]) -> bool:
        services = set(thing["service_ids"])
        return bool(services) and any(services <= each for each in self.silencing.values())

    def who(self, kind: str, thing: Mapping[str, Any], *, public: bool) -> Iterator[tuple[int, str]]:
        public = public and thing["visibility"] == "public"
        for subscription_id, subscriber_filter in self.filters.items():
            if (
                subscriber_filter["active"]
                and subscriber_filter["notify_incidents" if kind == "incident" else "notify_maintenance"]
                and (public or subscriber_filter["audience"] == "internal")
                and (
                    not subscriber_filter["service_ids"]
                    or set(thing["service_ids"]) & set(subscriber_filter["service_ids"])
                )
                and LEVELS.index(thing["worst"]) >= LEVELS.index(subscriber_filter["min_severity"])
            ):
                yield subscription_id, subscriber_filter["channel"]


def expected_intents(ledger: Iterable[Mapping[str, Any]]) -> list[ExpectedIntent]:
    """Return the intents that a tenant's whole ledger requires."""
    model = IntentModel()
    return [each for row in ledger for each in model.read(row)]


async def check_intents(owner: Any, tenant_id: int) -> int:
    """Check that the outbox holds exactly the intents of the ledger up to its checkpoint; return their number."""
    async with owner.transaction(isolation="repeatable_read", readonly=True):
        position = await owner.fetchval(
            "SELECT position FROM checkpoints WHERE tenant_id = $1 AND projection = 'outbox'", tenant_id
        )
        ledger = await owner.fetch(
            "SELECT position, stream_kind, stream_id, type, data, meta FROM events WHERE tenant_id = $1 AND"
            " position <= $2"
            " ORDER BY position",
            tenant_id,
            position,
        )
        rows = await intents(owner, tenant_id)
    expected = expected_intents(ledger)
    assert rows == sorted(expected)
    return len(expected)


async def intents(connection: Any, tenant_id: int) -> list[ExpectedIntent]:
    """Return the intents of the outbox in order; check that their ids are distinct."""
    rows = await connection.fetch(
        f"SELECT intent_id, {', '.join(ExpectedIntent._fields)} FROM outbox_intents WHERE tenant_id = $1", tenant_id
    )
    assert len({row["intent_id"] for row in rows}) == len(rows)
    return sorted(ExpectedIntent(*tuple(row)[1:]) for row in rows)

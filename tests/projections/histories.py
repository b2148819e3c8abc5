"""Histories that the deciders produce, as the ledger of a tenant would hold them."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from hypothesis import strategies as st

from opsentry.domain import incident, maintenance, service, subscription
from opsentry.domain.decider import Decider, DomainError
from opsentry.domain.incident import (
    ChangeIncident,
    IncidentRedacted,
    OpenIncident,
    PostUpdate,
    RedactIncident,
    ResolveIncident,
)
from opsentry.domain.maintenance import (
    CancelMaintenance,
    ChangeMaintenance,
    CompleteMaintenance,
    MaintenanceRedacted,
    RedactMaintenance,
    RemindMaintenance,
    ScheduleMaintenance,
    StartMaintenance,
)
from opsentry.domain.redaction import HistoryEntry, erasable_versions, plan_redaction
from opsentry.domain.service import ChangeService, RegisterService, RetireService
from opsentry.domain.subscription import (
    ChangeSubscription,
    ConfirmSubscription,
    CreateSubscription,
    DisableSubscription,
    RemoveSubscription,
    RequestTest,
    RotateSecret,
    SubscriptionRedacted,
)
from opsentry.domain.visibility import VISIBILITIES
from opsentry.events.codec import Actor, Meta, RecordedEvent, decode, encode
from opsentry.infrastructure.postgres import Connection
from opsentry.projections.engine.projection import Projection
from opsentry.projections.engine.projection import apply as apply_events

DECIDERS: Mapping[str, Decider[Any, Any, Any]] = {
    d.kind: d for d in (incident.DECIDER, maintenance.DECIDER, service.DECIDER, subscription.DECIDER)
}
TABLES = (
    "services",
    "incidents",
    "incident_counts",
    "incident_updates",
    "incident_snapshots",
    "maintenance",
    "maintenance_updates",
    "subscriptions",
    "impact_states",
    "service_impacts",
    "outbox_intents",
    "outbox_state",
)
META = Meta(Actor("operator"))
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(hours: float) -> datetime:
    return BEGIN + timedelta(hours=hours)


class History:
    """What happened in one tenant. Event n is recorded n minutes after the beginning."""

    def __init__(self, tenant_id: int = 1) -> None:
        self.tenant_id = tenant_id
        self.events: list[RecordedEvent] = []
        self.states: dict[tuple[str, int], Any] = {}
        self.versions: dict[tuple[str, int], int] = {}

    def do(
        self, kind: str, stream_id: int, command: Any, *, when: datetime | None = None, meta: Meta = META
    ) -> Sequence[RecordedEvent]:
        key = (kind, stream_id)
        decider = DECIDERS[kind]
        new = []
        for event in decider.decide(self.states.get(key), command):
            self.states[key] = decider.evolve(self.states.get(key), event)
            self.versions[key] = self.versions.get(key, 0) + 1
            recorded_at = BEGIN + timedelta(minutes=len(self.events) + 1)
            new.append(
                RecordedEvent(
                    tenant_id=self.tenant_id,
                    position=len(self.events) + 1,
                    kind=kind,
                    stream_id=stream_id,
                    version=self.versions[key],
                    event=event,
                    occurred_at=when or recorded_at,
                    recorded_at=recorded_at,
                    meta=meta,
                )
            )
            self.events.append(new[-1])
        return new

    def erased(self) -> list[RecordedEvent]:
        """The events as the log holds them in the end: without the words that some of them ordered to be erased."""
        gone = {
            (e.kind, e.stream_id, version)
            for e in self.events
            if isinstance(e.event, IncidentRedacted | MaintenanceRedacted | SubscriptionRedacted)
            for version in e.event.versions
        }
        return [_without_words(e) if (e.kind, e.stream_id, e.version) in gone else e for e in self.events]

    def incident(self, stream_id: int, command: Any, **options: Any) -> Sequence[RecordedEvent]:
        return self.do(incident.KIND, stream_id, command, **options)

    def window(self, stream_id: int, command: Any, **options: Any) -> Sequence[RecordedEvent]:
        return self.do(maintenance.KIND, stream_id, command, **options)

    def service(self, stream_id: int, command: Any, **options: Any) -> Sequence[RecordedEvent]:
        return self.do(service.KIND, stream_id, command, **options)

    def subscription(self, stream_id: int, command: Any, **options: Any) -> Sequence[RecordedEvent]:
        return self.do(subscription.KIND, stream_id, command, **options)


def _without_words(recorded: RecordedEvent) -> RecordedEvent:
    encoded = encode(recorded.event)
    event = decode(encoded.type, encoded.schema_version, encoded.data, None)
    return msgspec.structs.replace(recorded, event=event)


def schedule(**fields: Any) -> ScheduleMaintenance:
    return ScheduleMaintenance(**{"title": "Move", "scheduled_start": at(10), "scheduled_end": at(12), **fields})


async def apply(connection: Connection, projection: Projection, events: Iterable[RecordedEvent]) -> None:
    """Give `projection` those of `events`, all of one tenant, that it reads."""
    if wanted := [event for event in events if event.kind in projection.kinds]:
        await apply_events(connection, projection, wanted[0].tenant_id, wanted)


async def clear(connection: Connection, projection: Projection, tenant_id: int) -> None:
    """Delete all of the tenant's rows of a projection."""
    for table in projection.tables:
        await connection.execute(f"DELETE FROM {table.name} WHERE tenant_id = $1", tenant_id)


async def dump(connection: Connection, tables: Iterable[str] = TABLES) -> dict[str, list[str]]:
    return {
        table: [row["line"] for row in await connection.fetch(f"SELECT t::text AS line FROM {table} t ORDER BY 1")]
        for table in tables
    }


def written(history: History, kind: str, stream_id: int) -> list[HistoryEntry]:
    return [
        HistoryEntry(e.version, e.position, e.event)
        for e in history.events
        if (e.kind, e.stream_id) == (kind, stream_id)
    ]


def redaction(history: History, kind: str, stream_id: int, **asked: Any) -> RedactIncident | RedactMaintenance:
    """The command that erases what is asked for, by default all words that the stream itself has had."""
    own, command = (
        (incident.REDACTABLE_FIELDS, RedactIncident)
        if kind == incident.KIND
        else (maintenance.REDACTABLE_FIELDS, RedactMaintenance)
    )
    plan = plan_redaction(written(history, kind, stream_id), own, asked.get("fields", own), asked.get("positions", ()))
    return command(plan=plan, reason="asked to")


_TITLES = st.sampled_from(["Down", 'with "services":[] in it', '"author":null', "Ünïcode 🧯 \\ \t \x7f \u2028"])
_SERVICES = st.sets(st.integers(1, 2)).map(tuple)
_SEVERITY = st.sampled_from(incident.SEVERITIES)
_VISIBILITY = st.sampled_from(VISIBILITIES)
_STATUS = st.sampled_from(incident.STATUSES)
_FLAG = st.booleans()
_OPEN = st.builds(
    OpenIncident,
    title=_TITLES,
    description=st.none() | _TITLES,
    severity=_SEVERITY,
    visibility=_VISIBILITY,
    service_ids=_SERVICES,
)
_SCHEDULE = st.builds(
    schedule,
    title=_TITLES,
    visibility=_VISIBILITY,
    service_ids=_SERVICES,
    exclude_from_sla=_FLAG,
    suppress_alerts=_FLAG,
    auto_start=_FLAG,
    auto_complete=_FLAG,
)
_REGISTER = st.builds(RegisterService, slug=st.sampled_from("abc"), name=_TITLES, visibility=_VISIBILITY)
_SUBSCRIBE = st.builds(
    CreateSubscription,
    channel=st.sampled_from(["webhook", "email", "slack"]),
    target=st.just("x"),
    audience=st.sampled_from(subscription.AUDIENCES),
    service_ids=st.just(()) | _SERVICES,
    min_severity=_SEVERITY,
    encrypted_secret=st.none() | st.just("encrypted_secret"),
    pending=_FLAG,
)
_REMOVE = "remove"
_BEGINNINGS: Mapping[str, st.SearchStrategy[Any]] = {
    incident.KIND: _OPEN,
    maintenance.KIND: _SCHEDULE,
    service.KIND: _REGISTER,
    subscription.KIND: _SUBSCRIBE,
}
_COMMANDS: Mapping[str, st.SearchStrategy[Any]] = {
    incident.KIND: st.one_of(
        _OPEN,
        st.builds(ChangeIncident, title=_TITLES, severity=_SEVERITY),
        st.builds(ChangeIncident, visibility=_VISIBILITY, service_ids=_SERVICES, description=st.none() | _TITLES),
        st.builds(PostUpdate, message=_TITLES, status=st.none() | _STATUS, is_public=_FLAG),
        st.builds(ChangeIncident, status=_STATUS),
        st.builds(ResolveIncident, root_cause=_TITLES),
        st.sampled_from(incident.REDACTABLE_FIELDS),
    ),
    maintenance.KIND: st.one_of(
        _SCHEDULE,
        st.just(StartMaintenance()),
        st.just(StartMaintenance()),
        st.just(CompleteMaintenance()),
        st.just(CompleteMaintenance()),
        st.just(RemindMaintenance()),
        st.builds(ChangeMaintenance, title=_TITLES, scheduled_end=st.sampled_from([at(12), at(13)])),
        st.builds(ChangeMaintenance, scheduled_start=st.sampled_from([at(9), at(11)]), auto_start=_FLAG),
        st.builds(
            ChangeMaintenance,
            visibility=_VISIBILITY,
            service_ids=_SERVICES,
            suppress_alerts=_FLAG,
            exclude_from_sla=_FLAG,
        ),
        st.just(CancelMaintenance()),
        st.sampled_from(maintenance.REDACTABLE_FIELDS),
    ),
    service.KIND: st.one_of(
        _REGISTER,
        st.builds(ChangeService, name=_TITLES, tags=st.just(("a", "b")) | st.just(())),
        st.just(RetireService()),
    ),
    subscription.KIND: st.one_of(
        _SUBSCRIBE,
        st.just(ConfirmSubscription()),
        st.builds(ChangeSubscription, target=st.sampled_from("xy"), encrypted_secret=st.just("resealed")),
        st.builds(ChangeSubscription, audience=st.sampled_from(subscription.AUDIENCES), service_ids=_SERVICES),
        st.builds(ChangeSubscription, notify_incidents=_FLAG, min_severity=_SEVERITY, enabled=_FLAG),
        st.builds(DisableSubscription, reason=st.sampled_from(subscription.REASONS)),
        st.just(RotateSecret(encrypted_secret="rotated", previous_until=at(24))),
        st.just(RequestTest()),
        st.just(ChangeSubscription(enabled=True)),
        st.just(RemoveSubscription()),
        st.just(_REMOVE),
    ),
}
# Incidents have the longest streams, so they get most of the commands.
_KINDS = [*[incident.KIND] * 4, *[maintenance.KIND] * 2, service.KIND, *[subscription.KIND] * 2]
_METAS = st.sampled_from([META, META, msgspec.structs.replace(META, silent=True), Meta(Actor("token", 1))])


@st.composite
def histories(draw: st.DrawFn, tenants: int = 2) -> list[History]:
    """Valid histories of tenants 1, 2, …, in which streams of all kinds interleave."""
    made = [History(tenant_id) for tenant_id in range(1, tenants + 1)]
    for _ in range(draw(st.integers(1, 50))):
        history = draw(st.sampled_from(made))
        kind = draw(st.sampled_from(_KINDS))
        stream_id = draw(st.integers(1, 2))
        begun = (kind, stream_id) in history.states
        command = draw((_COMMANDS if begun else _BEGINNINGS)[kind])
        when = draw(st.none() | st.integers(0, 500).map(lambda hours: at(hours / 7)))
        if command == _REMOVE:
            command = RemoveSubscription(
                versions=erasable_versions(written(history, kind, stream_id)), unsubscribed=draw(_FLAG)
            )
        elif isinstance(command, str):
            command = redaction(history, kind, stream_id, fields=[command])
        with suppress(DomainError):  # a refused command adds nothing to a ledger
            history.do(kind, stream_id, command, when=when, meta=draw(_METAS))
    return made


@st.composite
def batches(draw: st.DrawFn, made: Sequence[History]) -> list[list[RecordedEvent]]:
    """All events in batches of one tenant each, in an order that keeps each tenant's events in theirs."""
    waiting = {history.tenant_id: list(history.events) for history in made}
    cut = []
    while left := [tenant_id for tenant_id in waiting if waiting[tenant_id]]:
        tenant_id = draw(st.sampled_from(left))
        size = draw(st.sampled_from([1, 1, 2, 3, 9]))
        cut.append(waiting[tenant_id][:size])
        del waiting[tenant_id][:size]
    return cut

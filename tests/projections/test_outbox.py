import msgspec
import pytest

from opsentry.domain import subscription
from opsentry.domain.incident import DECIDER, ChangeIncident, OpenIncident, PostUpdate, ResolveIncident
from opsentry.domain.maintenance import (
    CancelMaintenance,
    ChangeMaintenance,
    CompleteMaintenance,
    RemindMaintenance,
    StartMaintenance,
)
from opsentry.domain.subscription import ChangeSubscription, CreateSubscription
from opsentry.projections.outbox.projection import Outbox
from tests import commands
from tests.projections.histories import META, apply, at, clear, schedule


def subscriber_filter(**fields):
    return CreateSubscription(
        **{"channel": "webhook", "target": "https://example.org", "audience": "internal"} | fields
    )


def incident(**fields):
    return OpenIncident(**{"title": "Down", "severity": "major_outage", "service_ids": (1,)} | fields)


@pytest.fixture
async def intents(app_connection, history):
    async def project(events=None):
        await apply(app_connection, Outbox(), history.events if events is None else events)
        return await app_connection.fetch(
            "SELECT * FROM outbox_intents WHERE tenant_id = $1 ORDER BY position, subscription_id, topic DESC",
            history.tenant_id,
        )

    return project


def told(rows):
    return [(row["subscription_id"], row["topic"]) for row in rows]


async def test_each_subscription_gets_an_intent_for_each_event(intents, history):
    history.subscription(1, subscriber_filter())
    history.subscription(2, subscriber_filter(channel="email"))
    history.incident(7, incident())
    history.incident(7, ResolveIncident())
    rows = await intents()
    assert told(rows) == [
        (1, "incident.opened"),
        (2, "incident.opened"),
        (1, "incident.resolved"),
        (2, "incident.resolved"),
    ]
    first = rows[0]
    assert (first["position"], first["channel"], first["stream_kind"], first["stream_id"]) == (
        3,
        "webhook",
        "incident",
        7,
    )
    assert first["created_at"] == history.events[2].recorded_at
    assert rows[1]["channel"] == "email"
    assert not any(row["suppressed"] for row in rows)


async def test_notifiable_events_lead_to_intents(intents, history):
    history.subscription(1, subscriber_filter())
    history.incident(7, incident(description="It is down"))
    history.incident(7, ChangeIncident(title="t", service_ids=(1, 2), visibility="internal"))
    history.incident(7, ChangeIncident(severity="critical", status="identified"))
    history.incident(7, PostUpdate(message="m"))
    history.incident(7, ChangeIncident(status="resolved"))
    history.incident(7, ChangeIncident(status="investigating"))
    for number in (1, 2):
        history.window(number, schedule(service_ids=(1,)))
    history.window(1, ChangeMaintenance(title="t", visibility="internal", service_ids=(1, 2), auto_start=False))
    history.window(1, ChangeMaintenance(scheduled_end=at(13)))
    history.window(1, RemindMaintenance())
    history.window(1, StartMaintenance())
    history.window(1, CompleteMaintenance())
    history.window(2, CancelMaintenance())
    assert [topic for _, topic in told(await intents())] == [
        "incident.opened",
        "incident.updated",
        "incident.severity_changed",
        "incident.status_changed",
        "incident.updated",
        "incident.resolved",
        "incident.reopened",
        "maintenance.scheduled",
        "maintenance.scheduled",
        "maintenance.rescheduled",
        "maintenance.reminded",
        "maintenance.started",
        "maintenance.completed",
        "maintenance.cancelled",
    ]


async def test_subscriptions_filter_by_service(intents, history):
    history.subscription(1, subscriber_filter(service_ids=(1, 5)))
    history.subscription(2, subscriber_filter(service_ids=(2,)))
    history.subscription(3, subscriber_filter())
    history.incident(7, incident(service_ids=(1, 3)))
    history.incident(8, incident(service_ids=()))
    history.incident(7, ChangeIncident(service_ids=(2,)))
    history.incident(7, ResolveIncident())
    assert told(await intents()) == [
        (1, "incident.opened"),
        (3, "incident.opened"),
        (3, "incident.opened"),
        (2, "incident.resolved"),
        (3, "incident.resolved"),
    ]


async def test_subscriptions_filter_by_the_worst_severity_since_opening(intents, history):
    history.subscription(1, subscriber_filter(min_severity="major_outage"))
    history.incident(7, incident(severity="partial_outage"))
    history.incident(7, ChangeIncident(severity="critical"))
    history.incident(7, PostUpdate(message="m"))
    history.incident(7, ChangeIncident(severity="degraded"))
    history.incident(7, ResolveIncident())
    history.incident(7, ChangeIncident(status="investigating"))
    history.incident(7, ResolveIncident())
    history.window(1, schedule(service_ids=(1,)))
    # A subscriber who was notified of the worst severity is notified until the end. Reopening starts over.
    assert [(row["position"], row["topic"]) for row in await intents()] == [
        (3, "incident.severity_changed"),
        (4, "incident.updated"),
        (5, "incident.severity_changed"),
        (6, "incident.resolved"),
        (9, "maintenance.scheduled"),
    ]


async def test_subscriptions_choose_between_incidents_and_maintenance(intents, history):
    history.subscription(1, subscriber_filter(notify_incidents=False))
    history.subscription(2, subscriber_filter(notify_maintenance=False))
    history.incident(7, incident())
    history.window(1, schedule(service_ids=(1,)))
    assert told(await intents()) == [(2, "incident.opened"), (1, "maintenance.scheduled")]


async def test_the_public_audience_is_notified_of_public_events_only(intents, history):
    history.subscription(1, subscriber_filter(audience="public"))
    history.subscription(2, subscriber_filter(audience="internal"))
    history.incident(7, incident(visibility="internal"))
    history.incident(7, ChangeIncident(visibility="public"))
    history.incident(7, PostUpdate(message="private", is_public=False))
    history.incident(7, PostUpdate(message="public"))
    history.incident(7, ChangeIncident(visibility="internal"))
    history.incident(7, ResolveIncident())
    history.window(1, schedule(visibility="internal"))
    history.window(2, schedule(visibility="public"))
    rows = await intents()
    assert [topic for subscription_id, topic in told(rows) if subscription_id == 1] == [
        "incident.updated",
        "maintenance.scheduled",
    ]
    public = [row for row in rows if row["subscription_id"] == 1]
    assert [(row["position"], row["stream_id"]) for row in public] == [(6, 7), (10, 2)]
    assert len(rows) - len(public) == 6


async def test_silent_events_lead_to_no_intents(intents, history):
    silent = msgspec.structs.replace(META, silent=True)
    history.subscription(1, subscriber_filter())
    history.incident(7, incident(), meta=silent)
    history.incident(7, ChangeIncident(severity="critical"), meta=silent)
    history.incident(7, ResolveIncident())
    assert told(await intents()) == [(1, "incident.resolved")]


async def test_a_window_suppresses_alerts_while_it_is_active(intents, history):
    history.subscription(1, subscriber_filter())
    history.window(1, schedule(service_ids=(1, 2), suppress_alerts=True))
    history.incident(1, incident())
    history.window(1, StartMaintenance())
    history.incident(2, incident())
    history.incident(1, ResolveIncident())
    history.window(1, CompleteMaintenance())
    history.incident(2, ResolveIncident())
    assert [(row["topic"], row["stream_id"], row["suppressed"]) for row in await intents()] == [
        ("maintenance.scheduled", 1, False),
        ("incident.opened", 1, False),
        ("maintenance.started", 1, False),
        ("incident.opened", 2, True),
        ("incident.resolved", 1, True),
        ("maintenance.completed", 1, False),
        ("incident.still_open", 2, False),
        ("incident.resolved", 2, False),
    ]


@pytest.mark.parametrize(
    ("suppress", "service_ids", "suppressed"),
    [(True, (1,), True), (True, (1, 2), True), (True, (1, 3), False), (True, (), False), (False, (1,), False)],
)
async def test_a_window_suppresses_only_incidents_whose_services_it_covers(
    intents, history, suppress, service_ids, suppressed
):
    history.subscription(1, subscriber_filter(notify_maintenance=False))
    history.window(1, schedule(service_ids=(1, 2), suppress_alerts=suppress))
    history.window(1, StartMaintenance())
    history.incident(1, incident(service_ids=service_ids))
    assert [row["suppressed"] for row in await intents()] == [suppressed]


async def test_intent_ids_do_not_depend_on_batches(intents, app_connection, history):
    for number in (1, 2):
        history.subscription(number, subscriber_filter())
    history.incident(7, incident(description="d"))
    history.incident(7, ResolveIncident())
    whole = await intents()
    assert len({row["intent_id"] for row in whole}) == 6
    assert {row["intent_id"].version for row in whole} == {8}
    await clear(app_connection, Outbox(), history.tenant_id)
    assert await intents([]) == []
    for event in history.events:
        singly = await intents([event])
    assert singly == whole


async def test_all_subscriptions_are_loaded_only_for_notifiable_events(app_connection, history, monkeypatch):
    read = []
    fetch = type(app_connection).fetch

    async def counting(self, query, *arguments):
        rows = await fetch(self, query, *arguments)
        read.append(sum(row["kind"] == subscription.KIND for row in rows))
        return rows

    monkeypatch.setattr(type(app_connection), "fetch", counting)

    async def cost(since):
        read.clear()
        await apply(app_connection, Outbox(), history.events[since:])
        return sum(read)

    for number in range(1, 101):
        history.subscription(number, subscriber_filter())
    assert await cost(0) == 0
    history.subscription(7, ChangeSubscription(notify_incidents=False))
    history.incident(1, incident(), meta=msgspec.structs.replace(META, silent=True))
    assert await cost(100) == 1
    history.incident(1, PostUpdate(message="m"))
    assert await cost(102) == 100


async def test_intents_of_two_tenants_never_share_an_id(intents, app_connection, history, other_history):
    for each in (history, other_history):
        each.subscription(1, subscriber_filter())
        each.incident(7, incident())
    (mine,) = await intents()
    await apply(app_connection, Outbox(), other_history.events)
    theirs = await app_connection.fetchrow("SELECT * FROM outbox_intents WHERE tenant_id = $1", other_history.tenant_id)
    assert (mine["position"], mine["subscription_id"]) == (theirs["position"], theirs["subscription_id"])
    assert mine["intent_id"] != theirs["intent_id"]


async def test_the_outbox_stores_no_erasable_text(app_connection, history):
    history.subscription(1, subscriber_filter(target="https://example.org/secret", encrypted_secret="secret"))
    history.subscription(2, subscriber_filter(target="secret", pending=True))
    history.subscription(
        1, ChangeSubscription(target="https://example.com/secret", encrypted_secret="secret", audience="public")
    )
    history.incident(7, incident(title="secret", description="secret"))
    history.window(1, schedule(title="secret", suppress_alerts=True, service_ids=(1,)))
    history.window(1, StartMaintenance())
    await apply(app_connection, Outbox(), history.events)
    for table, count in (("outbox_intents", 5), ("outbox_state", 5)):
        rows = await app_connection.fetch(f"SELECT t::text AS line FROM {table} t")
        assert len(rows) == count
        assert not [row for row in rows if "secret" in row["line"]]


async def test_a_subscription_that_a_command_creates_is_notified(parts, acme, app_connection):
    created = await commands.create(parts, subscription.DECIDER, acme.id, subscriber_filter(audience="public"), META)
    opened = await commands.create(parts, DECIDER, acme.id, incident(), META)
    await parts.projector.catch_up(acme.id, opened.position)
    (row,) = await app_connection.fetch("SELECT * FROM outbox_intents")
    assert (row["subscription_id"], row["position"], row["topic"]) == (
        created.stream_id,
        opened.position,
        "incident.opened",
    )
    assert row["created_at"] == opened.history[-1].recorded_at

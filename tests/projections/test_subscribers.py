"""Intents follow the subscriptions as of each event, and the incidents that a window withheld."""

import msgspec
import pytest

from opsentry.domain.incident import ChangeIncident, PostUpdate, ResolveIncident
from opsentry.domain.maintenance import ChangeMaintenance, CompleteMaintenance, StartMaintenance
from opsentry.domain.subscription import (
    ChangeSubscription,
    ConfirmSubscription,
    DisableSubscription,
    RemoveSubscription,
    RequestTest,
    RotateSecret,
)
from opsentry.projections.outbox.projection import Outbox
from tests.projections.histories import META, apply, at, schedule
from tests.projections.test_outbox import incident, subscriber_filter, told

SILENT = msgspec.structs.replace(META, silent=True)
STILL_OPEN = "incident.still_open"


@pytest.fixture
async def intents(app_connection, history):
    """What comes of the history, event by event."""

    async def project():
        for event in history.events:
            await apply(app_connection, Outbox(), [event])
        return await app_connection.fetch(
            "SELECT * FROM outbox_intents WHERE tenant_id = $1 ORDER BY position, subscription_id, stream_id",
            history.tenant_id,
        )

    return project


# ------------------------------------------------------------------------------------------------ subscriptions


async def test_a_subscription_is_notified_only_between_creation_and_removal(intents, history):
    history.incident(7, incident())
    history.subscription(1, subscriber_filter())
    history.incident(7, ChangeIncident(status="identified"))
    history.subscription(1, RemoveSubscription())
    history.incident(7, ResolveIncident())
    assert told(await intents()) == [(1, "incident.status_changed")]


async def test_a_pending_subscription_gets_only_the_request_to_confirm(intents, history):
    history.subscription(3, subscriber_filter(channel="email", pending=True))
    history.incident(7, incident())
    history.subscription(3, ConfirmSubscription())
    history.incident(7, ResolveIncident())
    asked, resolved = await intents()
    assert (asked["position"], asked["topic"], asked["channel"]) == (1, "subscription.created", "email")
    assert (asked["stream_kind"], asked["stream_id"], asked["subscription_id"]) == ("subscription", 3, 3)
    assert not asked["suppressed"]
    assert (resolved["position"], resolved["topic"]) == (4, "incident.resolved")


async def test_a_changed_pending_subscription_matches_by_the_change_once_confirmed(intents, history):
    history.subscription(1, subscriber_filter(pending=True, service_ids=(1,)))
    history.subscription(1, ChangeSubscription(service_ids=(2,)))
    history.incident(7, incident(service_ids=(2,)))
    history.subscription(1, ConfirmSubscription())
    history.incident(8, incident(service_ids=(1,)))
    history.incident(9, incident(service_ids=(2,)))
    assert [(row["topic"], row["stream_id"]) for row in await intents()] == [
        ("subscription.created", 1),
        ("incident.opened", 9),
    ]


async def test_an_active_subscription_gets_no_request_to_confirm(intents, history):
    history.subscription(1, subscriber_filter())
    assert await intents() == []


async def test_intents_follow_changes_of_the_filter(intents, history):
    history.subscription(1, subscriber_filter(audience="public"))
    history.incident(7, incident(visibility="internal"))
    history.subscription(1, ChangeSubscription(audience="internal"))
    history.incident(7, PostUpdate(message="m"))
    history.subscription(
        1, ChangeSubscription(min_severity="critical", notify_incidents=False, notify_maintenance=False)
    )
    history.incident(7, ChangeIncident(status="monitoring"))
    history.window(1, schedule())
    history.subscription(1, ChangeSubscription(notify_incidents=True, service_ids=(2,)))
    history.incident(8, incident(severity="critical", service_ids=(1,)))
    history.incident(9, incident(severity="critical", service_ids=(2,)))
    assert [(row["position"], row["topic"]) for row in await intents()] == [
        (4, "incident.updated"),
        (10, "incident.opened"),
    ]


@pytest.mark.parametrize("reason", ["disabled_by_owner", "endpoint_gone", "endpoint_failing"])
async def test_a_disabled_subscription_gets_no_intents_until_it_is_enabled(intents, history, reason):
    history.subscription(1, subscriber_filter())
    history.subscription(1, DisableSubscription(reason=reason))
    history.incident(7, incident())
    history.subscription(1, ChangeSubscription(enabled=True))
    history.incident(7, ResolveIncident())
    assert told(await intents()) == [(1, "incident.resolved")]


async def test_a_new_secret_or_target_keeps_the_filter(intents, history, app_connection):
    history.subscription(1, subscriber_filter(encrypted_secret="s"))
    history.subscription(1, RotateSecret(encrypted_secret="t", previous_until=at(5)))
    history.subscription(1, ChangeSubscription(target="https://example.com"))
    history.incident(7, incident())
    assert told(await intents()) == [(1, "incident.opened")]
    state = await app_connection.fetchval("SELECT state FROM outbox_state WHERE kind = 'subscription'")
    assert msgspec.json.decode(state)["since_position"] == 1


async def test_a_test_goes_to_its_subscription_alone(intents, history):
    history.subscription(1, subscriber_filter(notify_incidents=False, notify_maintenance=False))
    history.subscription(2, subscriber_filter(channel="email"))
    history.subscription(1, RequestTest())
    (row,) = await intents()
    assert (row["subscription_id"], row["channel"], row["topic"]) == (1, "webhook", "subscription.test_requested")
    assert (row["stream_kind"], row["stream_id"], row["suppressed"]) == ("subscription", 1, False)


async def test_a_removed_subscription_leaves_no_state(intents, history, app_connection):
    history.subscription(1, subscriber_filter(pending=True))
    history.subscription(1, RemoveSubscription(versions=(1,)))
    await intents()
    assert await app_connection.fetchval("SELECT count(*) FROM outbox_state") == 0


# ------------------------------------------------------------------------------------------------ windows


@pytest.fixture
def within(history):
    """A subscription to incidents, and an active window that suppresses alerts of services 1 and 2."""
    history.subscription(1, subscriber_filter(notify_maintenance=False))
    history.window(1, schedule(service_ids=(1, 2), suppress_alerts=True))
    history.window(1, StartMaintenance())
    return history


async def test_each_incident_still_open_at_the_end_of_a_window_is_announced_once(intents, app_connection, within):
    for number in (7, 8):
        within.incident(number, incident(service_ids=(1,)))
        within.incident(number, PostUpdate(message="m"))
    within.incident(9, incident(service_ids=(3,)))
    (over,) = within.window(1, CompleteMaintenance())
    within.window(2, schedule(service_ids=(1,), suppress_alerts=True))
    within.window(2, StartMaintenance())
    within.window(2, CompleteMaintenance())
    rows = [row for row in await intents() if row["topic"] == STILL_OPEN]
    assert [(row["position"], row["stream_kind"], row["stream_id"]) for row in rows] == [
        (over.position, "incident", 7),
        (over.position, "incident", 8),
    ]
    assert {(row["created_at"], row["suppressed"], row["subscription_id"]) for row in rows} == {
        (over.recorded_at, False, 1)
    }
    withheld = "SELECT count(*) FROM outbox_state WHERE state LIKE '%is_withheld%'"
    assert await app_connection.fetchval(withheld) == 0


@pytest.mark.parametrize(
    ("since", "still_open"),
    [
        ([], True),
        ([ResolveIncident()], False),
        ([ResolveIncident(), ChangeIncident(status="investigating")], True),
        ([ChangeIncident(service_ids=(1, 3)), PostUpdate(message="heard")], False),
        ([ChangeIncident(service_ids=(1, 3))], True),
        ([ChangeIncident(service_ids=())], True),
    ],
)
async def test_an_incident_that_was_notified_or_resolved_is_not_announced_again(intents, within, since, still_open):
    within.incident(7, incident())
    for command in since:
        within.incident(7, command)
    within.window(1, CompleteMaintenance())
    assert [row["topic"] for row in await intents()].count(STILL_OPEN) == int(still_open)


async def test_an_incident_notified_before_the_window_is_not_announced(intents, history):
    history.subscription(1, subscriber_filter(notify_maintenance=False))
    history.incident(7, incident())
    history.window(1, schedule(service_ids=(1,), suppress_alerts=True))
    history.window(1, StartMaintenance())
    history.window(1, CompleteMaintenance())
    assert told(await intents()) == [(1, "incident.opened")]


async def test_an_incident_stays_withheld_until_the_last_window_ends(intents, within):
    within.window(2, schedule(service_ids=(1,), suppress_alerts=True))
    within.window(2, StartMaintenance())
    for number, services in ((7, (1,)), (8, (2,))):
        within.incident(number, incident(service_ids=services))
    (first,) = within.window(1, CompleteMaintenance())
    (second,) = within.window(2, CompleteMaintenance())
    assert [(row["position"], row["stream_id"]) for row in await intents() if row["topic"] == STILL_OPEN] == [
        (first.position, 8),
        (second.position, 7),
    ]


async def test_a_silent_end_of_a_window_announces_nothing(intents, within):
    within.incident(7, incident())
    within.window(1, CompleteMaintenance(), meta=SILENT)
    assert [row["suppressed"] for row in await intents()] == [True]


async def test_the_subscriptions_at_the_end_of_a_window_get_its_announcements(intents, within):
    within.incident(7, incident())
    within.subscription(2, subscriber_filter(notify_maintenance=False))
    within.subscription(3, subscriber_filter(notify_maintenance=False, service_ids=(2,)))
    within.subscription(4, subscriber_filter(notify_maintenance=False, min_severity="critical"))
    within.subscription(1, RemoveSubscription())
    within.window(1, CompleteMaintenance())
    assert [(row["subscription_id"], row["topic"]) for row in await intents() if not row["suppressed"]] == [
        (2, STILL_OPEN)
    ]


async def test_the_public_audience_gets_no_announcement_of_an_internal_incident(intents, within):
    within.subscription(2, subscriber_filter(notify_maintenance=False, audience="public"))
    within.incident(7, incident())
    within.incident(7, ChangeIncident(visibility="internal"))
    within.window(1, CompleteMaintenance())
    assert [row["subscription_id"] for row in await intents() if row["topic"] == STILL_OPEN] == [1]


@pytest.mark.parametrize(
    ("suppress", "services", "withheld"), [(True, (1,), True), (False, (1,), False), (True, (2,), False)]
)
async def test_a_window_suppresses_by_its_services_at_its_start(intents, history, suppress, services, withheld):
    history.subscription(1, subscriber_filter(notify_maintenance=False))
    history.window(1, schedule(service_ids=(9,), suppress_alerts=not suppress))
    history.window(1, ChangeMaintenance(suppress_alerts=suppress, service_ids=services))
    history.window(1, StartMaintenance())
    history.incident(7, incident())
    assert [row["suppressed"] for row in await intents()] == [withheld]

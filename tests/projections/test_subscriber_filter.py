"""Intents of random histories equal those of a second, simpler implementation."""

from collections.abc import Iterable
from typing import Any

import msgspec
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from opsentry.domain import incident, maintenance, subscription
from opsentry.domain.incident import ChangeIncident, OpenIncident, PostUpdate, ResolveIncident
from opsentry.domain.maintenance import ChangeMaintenance, CompleteMaintenance, StartMaintenance
from opsentry.domain.subscription import ChangeSubscription, CreateSubscription
from opsentry.events.codec import RecordedEvent, encode, encode_meta
from opsentry.projections.outbox.projection import Outbox
from tests.projections.histories import META, History, apply, batches, dump, histories, schedule
from tests.system.intents import expected_intents, intents

with_a_database = hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ledger(history: History) -> list[dict[str, Any]]:
    """The rows that a history would be in the ledger."""
    return [
        {
            "position": recorded.position,
            "stream_kind": recorded.kind,
            "stream_id": recorded.stream_id,
            "type": recorded.event.TYPE,
            "data": encode(recorded.event).data,
            "meta": encode_meta(recorded.meta),
        }
        for recorded in history.events
    ]


async def check(connection: Any, made: Iterable[History], cut: Iterable[list[RecordedEvent]]) -> None:
    """Check what comes of histories; each batch comes twice, and in the end all of them once more."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        cut = list(cut)
        for events in cut:
            for _ in range(2):
                await apply(connection, Outbox(), events)
        rows = await dump(connection, ["outbox_intents", "outbox_state"])
        for history in made:
            assert await intents(connection, history.tenant_id) == sorted(expected_intents(ledger(history)))
        for events in cut:
            await apply(connection, Outbox(), events)
        assert await dump(connection, ["outbox_intents", "outbox_state"]) == rows
    finally:
        await transaction.rollback()


@with_a_database
@given(data=st.data())
async def test_any_history_notifies_the_subscriptions_that_match(app_connection, data):
    made = data.draw(histories())
    await check(app_connection, made, data.draw(batches(made)))


SERVICES = st.sampled_from([(1,), (2,), (1, 2)])
BEGINNINGS = {
    subscription.KIND: st.builds(
        CreateSubscription,
        channel=st.just("webhook"),
        target=st.just("x"),
        audience=st.sampled_from(subscription.AUDIENCES),
        min_severity=st.sampled_from(["informational", "critical"]),
    ),
    maintenance.KIND: st.builds(schedule, service_ids=SERVICES, suppress_alerts=st.sampled_from([True])),
    incident.KIND: st.builds(OpenIncident, title=st.just("Down"), service_ids=SERVICES),
}
# Commands by the state of the stream, so that few are refused.
STEPS = {
    "scheduled": st.just(StartMaintenance()) | st.builds(ChangeMaintenance, service_ids=SERVICES),
    "active": st.just(CompleteMaintenance()),
    "resolved": st.just(ChangeIncident(status="investigating")),
    "investigating": st.one_of(
        st.sampled_from([PostUpdate(message="m"), PostUpdate(message="m", is_public=False), ResolveIncident()]),
        st.sampled_from([ChangeIncident(severity="critical"), ChangeIncident(severity="degraded")]),
        st.builds(ChangeIncident, service_ids=SERVICES),
    ),
    subscription.KIND: st.one_of(
        st.builds(ChangeSubscription, enabled=st.booleans(), service_ids=SERVICES),
        st.builds(ChangeSubscription, audience=st.sampled_from(subscription.AUDIENCES)),
    ),
}
KINDS = [*[maintenance.KIND] * 3, *[incident.KIND] * 3, subscription.KIND]


@st.composite
def withholding(draw: st.DrawFn) -> History:
    """A history in which windows that suppress alerts overlap, and incidents come and go within them."""
    history = History()
    windows = [1, 2]
    for _ in range(draw(st.integers(10, 40))):
        kind = draw(st.sampled_from(KINDS))
        number = draw(st.sampled_from(windows if kind == maintenance.KIND else [1, 2]))
        state = history.states.get((kind, number))
        if state is None:
            command = draw(BEGINNINGS[kind])
        else:
            command = draw(STEPS[kind if kind == subscription.KIND else state.status])
        if isinstance(command, CompleteMaintenance):
            windows[windows.index(number)] = max(windows) + 1
        silent = draw(st.sampled_from([False, False, False, True])) and kind != subscription.KIND
        history.do(kind, number, command, meta=msgspec.structs.replace(META, silent=silent))
    return history


@with_a_database
@given(data=st.data())
async def test_a_withheld_incident_that_stays_open_is_announced_once(app_connection, data):
    made = [data.draw(withholding())]
    await check(app_connection, made, data.draw(batches(made)))

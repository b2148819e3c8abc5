"""Frequent queries use their indexes and read no more rows than they return."""

import pytest

from opsentry.bootstrap import projections
from opsentry.domain.incident import SEVERITIES, OpenIncident, ResolveIncident
from opsentry.domain.maintenance import CompleteMaintenance, StartMaintenance
from opsentry.domain.service import RegisterService
from opsentry.domain.subscription import CreateSubscription, RemoveSubscription
from opsentry.events import store
from opsentry.notifications.delivery import history
from opsentry.projections import impact, incidents, maintenance, services, subscriptions
from opsentry.projections.incident_view import IncidentFilter
from opsentry.projections.maintenance_view import MaintenanceFilter
from opsentry.projections.outbox import projection
from opsentry.projections.page_request import PageRequest
from tests.projections.histories import History, apply, at, schedule
from tests.projections.plans import Explained, ExplainedOnce, assert_goes_by, most_rows, plan_of, plans_inside
from tests.projections.planting import plant

COUNT = 4000


@pytest.fixture
async def full(owner, app_connection, history, other_history):
    """Two tenants with thousands of rows each, of which few are open, and statistics as autovacuum leaves them."""
    for each in (history, other_history):
        fill(each)
        for each_projection in projections():
            await apply(owner, each_projection, each.events)
        for name in ("services", "incidents", "maintenance", "subscriptions", "impact", "outbox"):
            await owner.execute("INSERT INTO checkpoints VALUES ($1, $2, $3)", each.tenant_id, name, 1)
        await plant(owner, each.tenant_id, 1, 1)
    await owner.execute(
        "INSERT INTO incident_counts SELECT tenant_id + other, status, severity, incidents"
        " FROM incident_counts, generate_series(1000, 2000) AS other WHERE tenant_id = $1",
        history.tenant_id,
    )
    await owner.execute("VACUUM ANALYZE")
    return history


def fill(history: History) -> None:
    for number in range(1, 201):
        history.service(number, RegisterService(slug=f"s{number}", name=f"Service {number}"))
    for number in range(1, COUNT + 1):
        history.incident(number, opened(number), when=at(number))
        if number % 400:
            history.incident(number, ResolveIncident(), when=at(number + 1))
    for number in range(1, COUNT // 4 + 1):
        history.window(number, schedule(scheduled_start=at(number), scheduled_end=at(number + 1)), when=at(-number))
        history.window(number, StartMaintenance())
        if number % 100:
            history.window(number, CompleteMaintenance())


def opened(number: int) -> OpenIncident:
    severity = SEVERITIES[number % 7 % len(SEVERITIES)]
    return OpenIncident(title="i", description="d", severity=severity, service_ids=(number % 200 + 1,))


async def test_subscriptions_are_found_by_id_and_by_target(app_connection, owner, history):
    for number in range(1, COUNT + 1):
        history.subscription(number, CreateSubscription(channel="email", target=f"{number}@example.org"))
        if number % 2:
            history.subscription(number, RemoveSubscription())
    tenant_id = history.tenant_id
    await apply(owner, subscriptions.Subscriptions(), history.events)
    await owner.execute("INSERT INTO checkpoints VALUES ($1, 'subscriptions', $2)", tenant_id, len(history.events))
    await owner.execute("VACUUM ANALYZE subscriptions")

    one = await plan_of(app_connection, lambda c: subscriptions.select_subscription(c, tenant_id, 8))
    assert_goes_by(one, "subscriptions", "subscriptions_pkey", reads=1)

    async def of_target(connection):
        return await subscriptions.select_by_target(connection, tenant_id, "email", "8@example.org")

    for how in (Explained, ExplainedOnce):
        plan = await plan_of(app_connection, of_target, how)
        assert_goes_by(plan, "subscriptions", "subscriptions_by_target", reads=1)


@pytest.mark.parametrize("how", [Explained, ExplainedOnce])
async def test_a_page_of_deliveries_reads_only_its_rows(app_connection, owner, how):
    await owner.execute(
        "INSERT INTO deliveries (tenant_id, intent_id, subscription_id, stream_kind, stream_id,"
        " position, channel, topic, created_at, state, finalized_at)"
        " SELECT 1, gen_random_uuid(), n % 20, 'incident', n, n, 'webhook', 't', now(),"
        " 'delivered', now() FROM generate_series(1, $1) AS n",
        5 * COUNT,
    )
    await owner.execute("VACUUM ANALYZE deliveries")

    async def page(connection):
        return await history.list_deliveries(connection, 1, 7, state=None, before=None, limit=50)

    plan = await plan_of(app_connection, page, how)
    assert_goes_by(plan, "deliveries", "deliveries_of_subscription", reads=51)
    assert not [n for n in plan if n["Node Type"] == "Sort" and n["Actual Rows"] > 51]


async def test_frequent_queries_use_their_indexes(app_connection, full):
    tenant_id = full.tenant_id

    active = await plan_of(app_connection, lambda c: incidents.select_active_incidents(c, tenant_id))
    assert_goes_by(active, "incidents", "incidents_open", reads=COUNT // 400)

    one = await plan_of(app_connection, lambda c: incidents.select_incident(c, tenant_id, 7))
    assert_goes_by(one, "incidents", "incidents_pkey", reads=1)
    assert_goes_by(one, "incident_updates", "incident_updates_pkey", reads=1)

    window = await plan_of(app_connection, lambda c: maintenance.select_window(c, tenant_id, 7))
    assert_goes_by(window, "maintenance", "maintenance_pkey", reads=1)

    due = await plan_of(app_connection, lambda c: maintenance.select_due_windows(c, 2.0, 200))
    assert_goes_by(due, "maintenance", "maintenance_due", reads=2 * COUNT // 400)

    remind = await plan_of(app_connection, lambda c: maintenance.select_windows_to_remind(c, 3600.0, 200))
    assert_goes_by(remind, "maintenance", "maintenance_to_remind", reads=0)

    # A partial index finds the withheld incidents among all.
    withheld = await plan_of(app_connection, lambda c: c.fetch(projection._LOAD_WITHHELD, tenant_id))
    assert_goes_by(withheld, "outbox_state", "outbox_state_withheld", reads=0)

    service = await plan_of(app_connection, lambda c: services.select_service(c, tenant_id, 7))
    assert_goes_by(service, "services", "services_pkey", reads=1)
    assert most_rows(service, "service_impacts") <= COUNT // 200 + COUNT // 800

    refs = await plan_of(app_connection, lambda c: services.select_service_links(c, tenant_id, [7, 8]))
    assert_goes_by(refs, "services", "services_pkey", reads=2)


@pytest.mark.parametrize("how", [Explained, ExplainedOnce])
async def test_uptime_reads_impacts_of_its_window_and_of_the_week_before(app_connection, full, how):
    async def of_all_time(connection):
        return await impact.select_service_impacts(connection, full.tenant_id, 7, None, None, 36500, COUNT)

    async def of_a_day_long_past(connection):
        return await impact.select_service_impacts(connection, full.tenant_id, 7, at(600), at(624), 30, COUNT)

    for query, reads in ((of_all_time, COUNT // 200), (of_a_day_long_past, 2)):
        plan = await plan_of(app_connection, query, how)
        assert_goes_by(plan, "service_impacts", "service_impacts_brief", "service_impacts_long", reads=reads)
        assert most_rows(plan, "service_impacts") > 0


async def test_the_first_page_of_windows_reads_only_its_rows(app_connection, full):
    plan = await plan_of(
        app_connection, lambda c: maintenance.select_windows(c, full.tenant_id, MaintenanceFilter(), PageRequest(20))
    )
    # An index-only scan for the count reads no row.
    (scan,) = [n for n in plan if n.get("Index Name") == "maintenance_newest" and n["Node Type"] == "Index Scan"]
    assert scan["Actual Rows"] * scan["Actual Loops"] == 20
    assert not [n for n in plan if n["Node Type"] == "Sort" and n["Actual Rows"] > 20]


@pytest.mark.parametrize("how", [Explained, ExplainedOnce])
@pytest.mark.parametrize(
    ("status", "severity", "offset", "index"),
    [
        (None, None, 0, "incidents_newest"),
        (None, None, COUNT // 2, "incidents_newest"),
        ("resolved", None, COUNT // 2, "incidents_newest"),
        ("investigating", None, 2, "incidents_open"),
        ("monitoring", None, 0, "incidents_open"),
        (None, "critical", 100, "incidents_of_severity"),
        ("resolved", "critical", 100, "incidents_of_severity"),
        ("investigating", "critical", 0, "incidents_open"),
    ],
)
async def test_a_page_reads_its_ids_from_an_index_alone(app_connection, full, how, status, severity, offset, index):
    async def page(connection):
        filter_ = IncidentFilter(status, severity)
        return await incidents.select_incidents(connection, full.tenant_id, filter_, PageRequest(20, offset))

    plan = await plan_of(app_connection, page, how)
    ids, bodies = [n for n in plan if n.get("Relation Name") == "incidents"]
    assert (ids["Node Type"], ids["Index Name"], ids["Heap Fetches"]) == ("Index Only Scan", index, 0)
    met = ids["Actual Rows"] + ids.get("Rows Removed by Filter", 0)
    assert met <= (COUNT // 400 if index == "incidents_open" else offset + 20 + COUNT // 400)
    assert (bodies["Node Type"], bodies["Index Name"]) == ("Index Scan", "incidents_pkey")
    assert bodies["Actual Rows"] * bodies["Actual Loops"] <= 20
    assert_goes_by(plan, "incident_counts", "incident_counts_pkey", reads=20)


async def test_rows_are_written_through_their_keys(owner, full):
    made = full.incident(COUNT + 1, OpenIncident(title="i", severity="critical", service_ids=(1, 2)))
    done = full.incident(COUNT + 1, ResolveIncident())

    async def write():
        for events in (made, done):
            for each in projections():
                await apply(owner, each, events)

    plan = await plans_inside(owner, write)
    assert_goes_by(plan, "incidents", "incidents_pkey", reads=1)
    assert_goes_by(plan, "incident_counts", "incident_counts_pkey", reads=20)
    assert_goes_by(plan, "service_impacts", "service_impacts_ongoing", reads=30)
    assert_goes_by(plan, "outbox_state", "outbox_state_few", "outbox_state_pkey", reads=20)


async def test_checkpoints_advance_through_their_keys(owner, full):
    await owner.execute(
        "INSERT INTO checkpoints (tenant_id, projection) SELECT tenant_id + other, projection"
        " FROM checkpoints, generate_series(1000, 2000) AS other WHERE tenant_id = $1",
        full.tenant_id,
    )
    await owner.execute(
        "INSERT INTO projection_backlog SELECT $1 + other, 1 FROM generate_series(1000, 2000) AS other", full.tenant_id
    )
    await owner.execute("ANALYZE checkpoints, projection_backlog")
    query = "SELECT advance_checkpoints($1, $2, $3, ARRAY[NULL, NULL]::timestamptz[], 1, 2)"
    plan = await plans_inside(owner, lambda: owner.fetchval(query, full.tenant_id, ["impact", "incidents"], [1, 1]))
    assert_goes_by(plan, "checkpoints", "checkpoints_pkey", reads=8)
    assert_goes_by(plan, "projection_backlog", "projection_backlog_pkey", reads=1)


async def test_the_ledger_is_read_through_its_keys(app_connection, owner, full):
    for number in range(2, 2002):
        await plant(owner, full.tenant_id, number % 100 + 1, number // 100 + 2)
    await owner.execute("VACUUM ANALYZE events")
    following = await plan_of(app_connection, lambda c: store.read_after(c, full.tenant_id, 1000, 50))
    assert_goes_by(following, "events", "events_pkey", reads=50)
    stream = await plan_of(app_connection, lambda c: store.read_stream(c, full.tenant_id, "incident", 7, after=10))
    assert_goes_by(stream, "events", "events_stream_version", reads=20)

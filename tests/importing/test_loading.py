import asyncio
import json

from opsentry.application.imports import ImportResult, SkippedRecord
from opsentry.domain import subscription
from opsentry.domain.incident import DECIDER as INCIDENTS
from opsentry.domain.incident import OpenIncident
from opsentry.domain.subscription import CreateSubscription
from tests import commands
from tests.conftest import META
from tests.events.ledger import first_broken
from tests.importing.pages import (
    at,
    component,
    incident,
    ledger,
    link,
    load,
    page,
    small_page,
    update,
    window,
    write,
)
from tests.system.processes import environment, opsentry

KINDS = ("service", "incident", "maintenance")


async def imported(connection, tenant_id):
    return [row for row in await ledger(connection, tenant_id) if row["stream_kind"] in KINDS]


async def updates(api, path):
    _, found, _ = await api.get(path)
    return [(entry["status"], entry["message"], entry["created_at"]) for entry in found["updates"]]


async def test_imported_records_are_served_by_the_api(parts, acme, api, tmp_path):
    result = await load(parts, acme.id, write(tmp_path, small_page()))
    assert result == ImportResult(services=3, incidents=2, maintenance=1, updates=9, events=21)
    _, listed, _ = await api.get("/incidents")
    second, first = listed["incidents"]
    assert (first["title"], first["severity"], first["status"]) == ("Incident i1", "partial_outage", "resolved")
    assert (first["occurred_at"], first["resolved_at"]) == (at(0), at(9))
    assert [s["slug"] for s in first["services"]] == ["main-api", "web"]
    assert (second["severity"], second["occurred_at"], second["resolved_at"]) == ("major_outage", at(20), at(30))
    assert await updates(api, f"/incidents/{first['id']}") == [
        ("investigating", "We are looking.", at(1)),
        ("monitoring", "A fix is out.", at(5)),
        ("resolved", "It is over.", at(9)),
    ]
    _, listed, _ = await api.get("/maintenance")
    (found,) = listed["maintenance"]
    assert (found["started_at"], found["completed_at"], found["status"]) == (at(61), at(115), "completed")
    assert [status for status, _, _ in await updates(api, f"/maintenance/{found['id']}")] == [
        "scheduled",
        "active",
        "completed",
    ]
    _, listed, _ = await api.get("/services")
    assert [(s["slug"], s["description"], s["current_status"]) for s in listed["services"]] == [
        ("jobs", "Batch", "operational"),
        ("main-api", None, "operational"),
        ("web", None, "operational"),
    ]


async def test_a_second_import_adds_nothing(parts, acme, owner, tmp_path):
    file = write(tmp_path, small_page())
    await load(parts, acme.id, file)
    before = await ledger(owner, acme.id)
    assert await load(parts, acme.id, file) == ImportResult(unchanged=6)
    assert await ledger(owner, acme.id) == before


async def test_a_later_file_of_the_page_adds_only_new_records(parts, acme, api, tmp_path):
    content = small_page()
    content["incidents"][1]["incident_updates"] = content["incidents"][1]["incident_updates"][1:]
    content["incidents"][1]["status"] = "identified"
    await load(parts, acme.id, write(tmp_path, content))
    later = small_page()
    later["incidents"].append(incident("i3", update("x1", "investigating", 300, "New."), created_at=at(300)))
    later["components"].append(component("c4", "Mail"))
    result = await load(parts, acme.id, write(tmp_path, later))
    assert result == ImportResult(services=1, incidents=1, updates=2, events=5, unchanged=5)
    _, listed, _ = await api.get("/incidents")
    assert [(i["title"], i["status"]) for i in listed["incidents"]] == [
        ("Incident i3", "investigating"),
        ("Incident i2", "resolved"),
        ("Incident i1", "resolved"),
    ]


async def test_equal_ids_of_another_page_are_other_incidents(parts, acme, tmp_path):
    await load(parts, acme.id, write(tmp_path, small_page()))
    result = await load(parts, acme.id, write(tmp_path, small_page() | {"page": {"id": "p2"}}))
    assert (result.services, result.incidents, result.maintenance) == (0, 2, 1)


async def test_skipped_records_are_reported(parts, acme, api, tmp_path):
    content = page(
        components=[component("g", "Group", group=True), component("c", "API")],
        incidents=[
            incident(
                "i",
                update("u1", "identified", 1, " "),
                update("u2", "resolved", 2, "over"),
                components=[link("c"), link("gone"), link("g")],
                impact="maintenance",
            )
        ],
        scheduled_maintenances=[window("m", update("w", "scheduled", 1, None))],
    )
    result = await load(parts, acme.id, write(tmp_path, content))
    assert sorted(result.skipped, key=lambda s: s.record) == [
        SkippedRecord("component g (Group)", "groups are not services"),
        SkippedRecord("component g (g) of incident i (Incident i)", "not among the file's components"),
        SkippedRecord("component gone (gone) of incident i (Incident i)", "not among the file's components"),
        SkippedRecord("impact of incident i (Incident i)", "maintenance is no severity; imported as informational"),
        SkippedRecord("update u1 of incident i (Incident i)", "it has no text; only its status was imported"),
        SkippedRecord("update w of maintenance m (Window m)", "it has no text; only its status was imported"),
    ]
    _, listed, _ = await api.get("/incidents")
    assert [[s["slug"] for s in i["services"]] for i in listed["incidents"]] == [["api"]]
    assert (await load(parts, acme.id, write(tmp_path, content))).events == 0


async def test_a_service_is_registered_no_later_than_the_history_starts(parts, acme, owner, tmp_path):
    content = page(
        components=[
            component("a", "Old", created_at=at(-9000)),
            component("b", "Unknown"),
            component("c", "Later", created_at=at(9000)),
        ],
        incidents=[incident("i", created_at=at(-5)), incident("j", created_at=at(5))],
    )
    await load(parts, acme.id, write(tmp_path, content))
    rows = await ledger(owner, acme.id, "service")
    assert [row["occurred_at"].isoformat().replace("+00:00", "Z") for row in rows] == [at(-9000), at(-5), at(-5)]


async def test_an_import_notifies_nobody(parts, acme, owner, tmp_path):
    subscribe = CreateSubscription(channel="webhook", target="https://example.com/hook", audience="internal")
    await commands.create(parts, subscription.DECIDER, acme.id, subscribe, META)
    await load(parts, acme.id, write(tmp_path, small_page()))
    assert await owner.fetchval("SELECT count(*) FROM outbox_intents") == 0
    # The same subscription is notified of an incident that is not imported.
    executed = await commands.create(parts, INCIDENTS, acme.id, OpenIncident(title="Now"), META)
    await parts.projector.catch_up(acme.id, executed.position)
    assert await owner.fetchval("SELECT count(*) FROM outbox_intents") == 1


async def test_two_imports_at_once_add_each_record_once(settings, acme, owner, tmp_path):
    content = page(
        components=[component(f"c{n}", f"Service {n}") for n in range(20)],
        incidents=[
            incident(f"i{n}", *(update(f"u{n}-{k}", "investigating", k) for k in range(5)), components=[link("c1")])
            for n in range(200)
        ],
    )
    arguments = ("import", "statuspage", str(write(tmp_path, content)), "--tenant", "acme", "--json")
    ran = await asyncio.gather(*(opsentry(environment(settings), *arguments) for _ in range(2)))
    assert [one.code for one in ran] == [0, 0], ran
    results = [json.loads(one.out) for one in ran]
    assert sum(result["incidents"] for result in results) == 200
    assert sum(result["services"] for result in results) == 20
    assert sum(result["updates"] for result in results) == 1000
    rows = await imported(owner, acme.id)
    assert len(rows) == sum(result["events"] for result in results) == 20 + 200 * 6
    assert first_broken(await ledger(owner, acme.id)) is None


async def test_the_command_prints_a_summary(settings, acme, tmp_path):
    content = small_page()
    content["components"].append(component("g", "Group", group=True))
    arguments = ("import", "statuspage", str(write(tmp_path, content)), "--tenant", "acme")
    ran = await opsentry(environment(settings), *arguments)
    assert (ran.code, ran.out) == (
        0,
        (
            "skipped component g (Group): groups are not services\n"
            "added 21 events: 3 services, 2 incidents, 1 maintenance windows, 9 updates; 0 records were there already\n"
        ),
    )

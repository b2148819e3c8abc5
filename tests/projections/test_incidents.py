import msgspec
import pytest

from opsentry.domain.incident import ChangeIncident, OpenIncident, PostUpdate, ResolveIncident
from opsentry.domain.service import RegisterService, RetireService
from opsentry.events.codec import Actor, Meta
from opsentry.projections import incidents
from opsentry.projections.incident_view import IncidentFilter
from opsentry.projections.incidents import Incidents
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import Services
from tests.projections.histories import apply, at


def decoded(row):
    return msgspec.json.decode(b"[" + (row["items"] or b"") + b"]")


@pytest.fixture
async def given(app_connection):
    async def project(*histories):
        for history in histories:
            for projection in (Services(), Incidents()):
                await apply(app_connection, projection, history.events)

    return project


@pytest.fixture
async def one(app_connection, history):
    async def read(incident_id, tenant_id=history.tenant_id):
        row = await incidents.select_incident(app_connection, tenant_id, incident_id)
        return row["body"] and msgspec.json.decode(row["body"])

    return read


async def test_an_opened_incident_shows_all_its_fields(given, one, history):
    history.service(3, RegisterService(slug="web", name="Web"))
    history.incident(
        5,
        OpenIncident(title="Down", description="All", severity="critical", visibility="internal", service_ids=(9, 3)),
        when=at(-1),
    )
    await given(history)
    assert await one(5) == {
        "id": 5,
        "title": "Down",
        "description": "All",
        "status": "investigating",
        "severity": "critical",
        "visibility": "internal",
        "services": [{"id": 3, "slug": "web", "name": "Web"}],
        "service_ids": [3, 9],
        "root_cause": None,
        "postmortem": None,
        "occurred_at": "2025-12-31T23:00:00Z",
        "created_at": "2026-01-01T00:02:00Z",
        "updated_at": "2026-01-01T00:03:00Z",
        "resolved_at": None,
        "updates": [
            {
                "id": 3,
                "status": "investigating",
                "message": "All",
                "is_public": True,
                "author": "operator",
                "created_at": "2025-12-31T23:00:00Z",
            }
        ],
    }


async def test_each_change_shows_and_moves_only_updated_at(given, one, history):
    history.incident(5, OpenIncident(title="Down"), when=at(-1))
    history.incident(
        5,
        ChangeIncident(
            title="Up and down",
            description="d",
            severity="critical",
            visibility="internal",
            status="monitoring",
            service_ids=(1,),
            root_cause="r",
            postmortem="p",
        ),
    )
    await given(history)
    shown = await one(5)
    assert {name: shown[name] for name in ("title", "description", "root_cause", "postmortem")} == {
        "title": "Up and down",
        "description": "d",
        "root_cause": "r",
        "postmortem": "p",
    }
    assert (shown["severity"], shown["visibility"], shown["status"], shown["service_ids"]) == (
        "critical",
        "internal",
        "monitoring",
        [1],
    )
    assert (shown["occurred_at"], shown["created_at"]) == ("2025-12-31T23:00:00Z", "2026-01-01T00:01:00Z")
    assert shown["updated_at"] == f"2026-01-01T00:{len(history.events):02}:00Z"


async def test_resolved_at_is_cleared_when_an_incident_is_reopened(given, one, history):
    history.incident(5, OpenIncident(title="Down"))
    history.incident(5, ResolveIncident(root_cause="DNS"), when=at(3))
    history.incident(5, ChangeIncident(title="Was down"))
    history.incident(6, OpenIncident(title="Down"))
    history.incident(6, ResolveIncident(), when=at(3))
    history.incident(6, ChangeIncident(status="investigating"))
    history.incident(7, OpenIncident(title="Down"))
    for hour in (3, 4):
        history.incident(7, ChangeIncident(status="resolved"), when=at(hour))
        history.incident(7, ChangeIncident(status="investigating" if hour == 3 else "resolved"))
    await given(history)
    shown = [await one(number) for number in (5, 6, 7)]
    assert [(s["status"], s["resolved_at"]) for s in shown] == [
        ("resolved", "2026-01-01T03:00:00Z"),
        ("investigating", None),
        ("resolved", "2026-01-01T04:00:00Z"),
    ]


async def test_the_timeline_shows_authors_oldest_entry_first(given, one, owner, history):
    token = await owner.fetchval(
        "INSERT INTO api_tokens (tenant_id, token_id, prefix, digest, name, scopes)"
        " VALUES ($1, 1, 'p', 'd', 'CI \"x\"', '{}') RETURNING token_id",
        history.tenant_id,
    )
    history.incident(5, OpenIncident(title="Down"))
    for actor in (Actor("token", token), Actor("token", token + 1), Actor("scheduler"), Actor("importer")):
        history.incident(5, PostUpdate(message=actor.kind, is_public=False), meta=Meta(actor))
    await given(history)
    updates = (await one(5))["updates"]
    assert [(u["id"], u["author"], u["is_public"]) for u in updates] == [
        (2, 'CI "x"', False),
        (3, "token", False),
        (4, "scheduler", False),
        (5, "importer", False),
    ]


async def test_service_links_follow_the_services(given, one, history):
    history.service(3, RegisterService(slug="web", name='"services":[]'))
    history.service(4, RegisterService(slug="db", name="DB"))
    history.service(4, RetireService())
    history.incident(5, OpenIncident(title='"services":[]', service_ids=(4, 3, 99)))
    await given(history)
    shown = await one(5)
    assert shown["title"] == '"services":[]'
    assert [(link["slug"], link["name"]) for link in shown["services"]] == [("web", '"services":[]'), ("db", "DB")]


async def test_lists_are_newest_first_filtered_and_paged(given, app_connection, history):
    for number, (hour, severity) in enumerate([(1, "critical"), (3, "degraded"), (2, "critical"), (3, "critical")], 1):
        history.incident(number, OpenIncident(title="i", severity=severity), when=at(hour))
    history.incident(3, ResolveIncident())
    await given(history)

    async def page(status=None, severity=None, limit=10, offset=0):
        row = await incidents.select_incidents(
            app_connection, history.tenant_id, IncidentFilter(status, severity), PageRequest(limit, offset)
        )
        return row["total"], [item["id"] for item in decoded(row)]

    assert await page() == (4, [4, 2, 3, 1])
    assert await page(limit=2, offset=1) == (4, [2, 3])
    assert await page(offset=4) == (4, [])
    assert await page(status="resolved") == (1, [3])
    assert await page(status="resolved", severity="critical") == (1, [3])
    assert await page(status="resolved", severity="degraded") == (0, [])
    assert await page(status="investigating", limit=2, offset=1) == (3, [2, 1])
    assert await page(severity="critical") == (3, [4, 3, 1])
    assert await page(severity="critical", status="investigating") == (2, [4, 1])
    assert await page(status="monitoring") == (0, [])
    assert [
        item["id"] for item in decoded(await incidents.select_active_incidents(app_connection, history.tenant_id))
    ] == [4, 2, 1]


async def test_no_incidents_are_an_empty_list(app_connection, history, one):
    assert decoded(await incidents.select_active_incidents(app_connection, history.tenant_id)) == []
    assert await one(1) is None


async def test_tenants_see_their_own_incidents_only(given, one, app_connection, history, other_history):
    other_history.service(3, RegisterService(slug="theirs", name="Theirs"))
    other_history.incident(5, OpenIncident(title="Theirs", description="Theirs"))
    history.incident(6, OpenIncident(title="Mine", service_ids=(3,)))
    await given(history, other_history)
    assert await one(5) is None
    assert (await one(6))["services"] == []
    assert [
        item["id"] for item in decoded(await incidents.select_active_incidents(app_connection, history.tenant_id))
    ] == [6]
    row = await incidents.select_incidents(app_connection, history.tenant_id, IncidentFilter(), PageRequest(9))
    assert (row["total"], [item["id"] for item in decoded(row)]) == (1, [6])

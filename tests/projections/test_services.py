import msgspec
import pytest

from opsentry.domain.incident import OpenIncident, ResolveIncident
from opsentry.domain.maintenance import StartMaintenance
from opsentry.domain.service import ChangeService, RegisterService, RetireService
from opsentry.projections import services
from opsentry.projections.impact import Impact
from opsentry.projections.page_request import PageRequest
from opsentry.projections.services import ServiceFilter, Services
from tests.projections.histories import apply, at, schedule


@pytest.fixture
async def given(app_connection):
    async def project(*histories):
        for history in histories:
            for projection in (Services(), Impact()):
                await apply(app_connection, projection, history.events)

    return project


@pytest.fixture
async def listed(app_connection, history):
    async def page(*, limit=100, offset=0, **fields):
        row = await services.select_services(
            app_connection, history.tenant_id, ServiceFilter(**fields), PageRequest(limit, offset)
        )
        items = msgspec.json.decode(b"[" + (row["items"] or b"") + b"]")
        return row["total"], [item["slug"] for item in items], items

    return page


async def test_a_registered_service_shows_all_its_fields(given, listed, history):
    history.service(
        7, RegisterService(slug="web", name="Web", description="Shop", visibility="internal", tags=("a",)), when=at(-5)
    )
    await given(history)
    _, _, items = await listed()
    assert items == [
        {
            "id": 7,
            "slug": "web",
            "name": "Web",
            "current_status": "operational",
            "visibility": "internal",
            "tags": ["a"],
            "description": "Shop",
            "created_at": "2025-12-31T19:00:00Z",
        }
    ]


async def test_a_change_shows_and_keeps_the_other_fields(given, app_connection, history):
    history.service(7, RegisterService(slug="web", name="Web", description="Shop"), when=at(-5))
    history.service(7, ChangeService(name="Website", tags=("x", "y")))
    history.service(7, ChangeService(description=None, visibility="internal"))
    await given(history)
    row = await services.select_service(app_connection, history.tenant_id, 7)
    body = msgspec.json.decode(row["body"])
    assert (body["name"], body["tags"], body["description"], body["visibility"], body["slug"]) == (
        "Website",
        ["x", "y"],
        None,
        "internal",
        "web",
    )
    assert (row["etag"], body["created_at"]) == ("3", "2025-12-31T19:00:00Z")


async def test_a_retired_service_leaves_the_list_and_keeps_its_links(given, listed, app_connection, history):
    history.service(7, RegisterService(slug="old", name="Old"))
    history.service(8, RegisterService(slug="new", name="New"))
    history.service(7, RetireService())
    await given(history)
    total, slugs, _ = await listed()
    assert (total, slugs) == (1, ["new"])
    assert (await services.select_service(app_connection, history.tenant_id, 7))["body"] is None
    row = await services.select_service_links(app_connection, history.tenant_id, [7, 8, 9])
    links, versions = services.links_from_row(row, [7, 8, 9])
    assert links.keys() == {7, 8}
    assert versions == [2, 1]
    assert bytes(links[7]) == b'{"id":7,"slug":"old","name":"Old"}'
    assert row["retired"] == [7]


async def test_no_services_are_an_empty_page(given, listed, app_connection, history):
    assert await listed() == (0, [], [])
    assert services.links_from_row(
        await services.select_service_links(app_connection, history.tenant_id, [1]), [1]
    ) == ({}, [])


async def test_services_are_listed_by_name_and_page_by_page(given, listed, history):
    for number, name in enumerate(["b", "a", "C", "ä", "a"], 1):
        history.service(number, RegisterService(slug=f"s{number}", name=name))
    await given(history)
    by_name = ["s3", "s2", "s5", "s1", "s4"]
    assert (await listed())[:2] == (5, by_name)
    assert (await listed(limit=2))[:2] == (5, by_name[:2])
    assert (await listed(limit=2, offset=4))[:2] == (5, by_name[4:])
    assert (await listed(offset=5))[:2] == (5, [])


async def test_services_are_found_by_name_slug_and_visibility(given, listed, history):
    history.service(1, RegisterService(slug="web-shop", name="100% uptime"))
    history.service(2, RegisterService(slug="db", name="Shop_DB", visibility="internal"))
    history.service(3, RegisterService(slug="mail", name="back\\slash"))
    await given(history)
    for search, found in {
        "SHOP": {"web-shop", "db"},
        "%": {"web-shop"},
        "_": {"db"},
        "\\": {"mail"},
        "nothing": set(),
        "": {"web-shop", "db", "mail"},
    }.items():
        total, slugs, _ = await listed(search=search)
        assert (total, set(slugs)) == (len(found), found), search
    assert (await listed(visibility="internal"))[:2] == (1, ["db"])
    assert (await listed(visibility="internal", search="up"))[:2] == (0, [])


@pytest.mark.parametrize(
    ("severity", "status"),
    [
        ("informational", "operational"),
        ("degraded", "degraded_performance"),
        ("partial_outage", "partial_outage"),
        ("major_outage", "major_outage"),
        ("critical", "major_outage"),
    ],
)
async def test_the_worst_open_incident_decides_the_status(given, listed, history, severity, status):
    history.service(1, RegisterService(slug="web", name="Web"))
    history.service(2, RegisterService(slug="db", name="DB"))
    history.incident(1, OpenIncident(title="i", severity="informational", service_ids=(1,)))
    history.incident(2, OpenIncident(title="i", severity=severity, service_ids=(1,)))
    history.incident(3, OpenIncident(title="i", severity="critical", service_ids=(1,)))
    history.incident(3, ResolveIncident())
    await given(history)
    _, _, items = await listed()
    assert {item["slug"]: item["current_status"] for item in items} == {"web": status, "db": "operational"}
    expected = ["web"] if status != "operational" else ["db", "web"]
    assert sorted((await listed(status=status))[1]) == expected


async def test_an_active_window_shows_unless_an_incident_is_worse(given, listed, history):
    for number in (1, 2, 3, 4):
        history.service(number, RegisterService(slug=f"s{number}", name=f"s{number}"))
    history.window(1, schedule(service_ids=(1, 2, 3)))
    history.window(2, schedule(service_ids=(4,)))
    history.window(1, StartMaintenance())
    history.incident(1, OpenIncident(title="i", severity="degraded", service_ids=(2,)))
    history.incident(2, OpenIncident(title="i", severity="informational", service_ids=(3,)))
    await given(history)
    _, _, items = await listed()
    assert [item["current_status"] for item in items] == [
        "under_maintenance",
        "degraded_performance",
        "under_maintenance",
        "operational",
    ]


async def test_tenants_see_their_own_services_only(given, listed, app_connection, history, other_history):
    history.service(1, RegisterService(slug="mine", name="Mine"))
    other_history.service(1, RegisterService(slug="theirs", name="Theirs"))
    other_history.service(2, RegisterService(slug="theirs-too", name="Theirs"))
    other_history.incident(1, OpenIncident(title="i", severity="critical", service_ids=(1,)))
    await given(history, other_history)
    total, slugs, items = await listed()
    assert (total, slugs, items[0]["current_status"]) == (1, ["mine"], "operational")
    assert (await services.select_service(app_connection, history.tenant_id, 2))["body"] is None
    assert services.links_from_row(
        await services.select_service_links(app_connection, history.tenant_id, [2]), [2]
    ) == ({}, [])

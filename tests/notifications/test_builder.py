import asyncio
from datetime import UTC, datetime, timedelta
from itertools import permutations

import msgspec
import pytest

from opsentry.domain import incident, maintenance, service
from opsentry.domain.events import EVENT_TYPES
from opsentry.domain.incident import (
    ChangeIncident,
    OpenIncident,
    PostUpdate,
    RedactIncident,
    ResolveIncident,
)
from opsentry.domain.maintenance import ScheduleMaintenance, StartMaintenance
from opsentry.domain.redaction import RedactionPlan
from opsentry.domain.service import ChangeService
from opsentry.identity.tenants import TenantNotFound
from opsentry.infrastructure.postgres import Database, DatabaseUnavailable
from opsentry.notifications.messages.builder import MessageBuilder, message_type
from opsentry.notifications.messages.text import MESSAGE_TYPES
from opsentry.notifications.messages.webhook_payload import Payload, PayloadEncoder
from opsentry.projections.as_of import AsOfQueries
from opsentry.projections.engine.projector import PositionNotReached
from tests import commands
from tests.conftest import META, make_service
from tests.notifications.messages import message
from tests.waiting import GENEROUS_SECONDS


@pytest.fixture
def builder(parts):
    return MessageBuilder(AsOfQueries(parts.database, parts.projector), parts.database)


@pytest.fixture
def fresh(parts):
    """Build a subject with empty caches."""

    async def build(*wanted):
        return await MessageBuilder(AsOfQueries(parts.database, parts.projector), parts.database).build_subject(*wanted)

    return build


@pytest.fixture
def execute(parts, acme):
    """Execute commands on one stream, which the first creates; return its id and the position after each command."""

    async def run(kind, first, *others, stream_id=None):
        reached = []
        if stream_id is None:
            executed = await commands.create(parts, kind.DECIDER, acme.id, first, META)
            stream_id = executed.stream_id
            reached.append(executed.position)
        else:
            others = (first, *others)
        for command in others:
            executed = await commands.change(parts, kind.DECIDER, acme.id, stream_id, command, META)
            reached.append(executed.position)
        await parts.projector.catch_up(acme.id, reached[-1])
        return stream_id, reached

    return run


def opened(**fields):
    return OpenIncident(title="Down", description="All of it", severity="critical", **fields)


def scheduled(**fields):
    start = datetime.now(UTC) + timedelta(hours=1)
    return ScheduleMaintenance(
        title="Upgrade", scheduled_start=start, scheduled_end=start + timedelta(hours=1), **fields
    )


async def test_the_public_audience_gets_the_public_part(builder, execute, parts, acme):
    shown = await make_service(parts, acme.id, "web")
    hidden = await make_service(parts, acme.id, "vault", visibility="internal")
    number, (_, _, _, last) = await execute(
        incident,
        opened(service_ids=(shown, hidden)),
        PostUpdate(message="Customers: we know.", status="identified"),
        PostUpdate(message="Colleagues: it was Kim.", is_public=False),
        ResolveIncident(root_cause="Kim", postmortem="Kim again"),
    )
    whole = await builder.build_subject(acme.id, "incident", number, last, "internal")
    assert [service["id"] for service in whole["services"]] == whole["service_ids"] == [shown, hidden]
    assert (whole["root_cause"], whole["visibility"]) == ("Kim", "public")
    assert [update["author"] for update in whole["updates"]] == ["operator"] * 3
    part = await builder.build_subject(acme.id, "incident", number, last, "public")
    assert [service["id"] for service in part["services"]] == part["service_ids"] == [shown]
    assert [update["message"] for update in part["updates"]] == ["All of it", "Customers: we know."]
    assert set(whole) - set(part) == {"visibility", "root_cause", "postmortem"}
    assert set(whole["updates"][0]) - set(part["updates"][0]) == {"author", "is_public"}
    assert "Kim" not in str(part)
    for subject in (whole, part):
        # Subjects match the schema of webhooks.
        body = PayloadEncoder().encode(message(subject, position=last))
        decoded = msgspec.json.decode(body, type=Payload)
        assert msgspec.json.decode(msgspec.json.encode(decoded)) == msgspec.json.decode(body)


async def test_a_subject_is_as_of_its_position(fresh, execute, acme):
    number, (first, second, third) = await execute(
        incident, opened(), PostUpdate(message="Looking", status="identified"), ResolveIncident()
    )
    seen = [await fresh(acme.id, "incident", number, position, "public") for position in (first, second, third)]
    assert [each["status"] for each in seen] == ["investigating", "identified", "resolved"]
    assert [len(each["updates"]) for each in seen] == [1, 2, 2]


async def test_a_subject_that_was_or_is_internal_is_withheld_from_the_public(fresh, execute, acme):
    number, (first, second, third) = await execute(
        incident,
        opened(visibility="internal"),
        ChangeIncident(visibility="public"),
        PostUpdate(message="Looking"),
    )
    assert await fresh(acme.id, "incident", number, first, "public") is None
    assert await fresh(acme.id, "incident", number, first, "internal")
    assert await fresh(acme.id, "incident", number, third, "public")
    await execute(incident, ChangeIncident(visibility="internal"), stream_id=number)
    assert await fresh(acme.id, "incident", number, second, "public") is None
    assert await fresh(acme.id, "incident", number, third, "public") is None
    assert await fresh(acme.id, "incident", number, third, "internal")


async def test_a_change_to_internal_takes_effect_within_a_second(builder, execute, parts, acme, clock):
    shown = await make_service(parts, acme.id, "web")
    number, (position,) = await execute(incident, opened(service_ids=(shown,)))
    assert (await builder.build_subject(acme.id, "incident", number, position, "public"))["service_ids"] == [shown]
    executed = await commands.change(parts, service.DECIDER, acme.id, shown, ChangeService(visibility="internal"), META)
    await parts.projector.catch_up(acme.id, executed.position)
    clock.now += 1
    part = await builder.build_subject(acme.id, "incident", number, position, "public")
    assert (part["service_ids"], part["services"]) == ([], [])
    await execute(incident, ChangeIncident(visibility="internal"), stream_id=number)
    clock.now += 1
    assert await builder.build_subject(acme.id, "incident", number, position, "public") is None


async def test_redacted_texts_appear_in_no_subject(builder, execute, acme, clock):
    number, (first, second) = await execute(incident, opened(), PostUpdate(message="Call Kim: 555 1234"))
    assert "555" in str(await builder.build_subject(acme.id, "incident", number, second, "public"))
    plan = RedactionPlan(versions=(1, 2, 3), fields=("title", "description"), restated={})
    await execute(incident, RedactIncident(plan=plan, reason="Asked"), stream_id=number)
    clock.now += 1
    for position in (first, second):
        part = await builder.build_subject(acme.id, "incident", number, position, "public")
        assert part["title"] == part["description"] == "[redacted]"
        assert "555" not in str(part)


async def test_maintenance_windows_have_a_public_part(builder, execute, parts, acme):
    shown = await make_service(parts, acme.id, "web")
    hidden = await make_service(parts, acme.id, "vault", visibility="internal")
    number, (first, second) = await execute(maintenance, scheduled(service_ids=(shown, hidden)), StartMaintenance())
    part = await builder.build_subject(acme.id, "maintenance", number, second, "public")
    assert (part["status"], part["service_ids"], part["updates"]) == ("active", [shown], [])
    whole = await builder.build_subject(acme.id, "maintenance", number, first, "internal")
    assert (whole["status"], whole["service_ids"]) == ("scheduled", [shown, hidden])
    assert set(whole) - set(part) == {"visibility"}
    internal, (position,) = await execute(maintenance, scheduled(visibility="internal"))
    assert await builder.build_subject(acme.id, "maintenance", internal, position, "public") is None


async def test_a_subject_of_another_tenant_is_not_found(builder, execute, globex):
    number, (position,) = await execute(incident, opened())
    assert await builder.build_subject(globex.id, "incident", number, 1, "internal") is None
    assert await builder.build_subject(globex.id, "maintenance", number, position, "public") is None


async def test_equal_look_ups_share_one_answer(builder, execute, acme):
    number, (position,) = await execute(incident, opened())
    one, *others = await asyncio.gather(
        *(builder.build_subject(acme.id, "incident", number, position, "public") for _ in range(100))
    )
    assert all(other is one for other in others)


@pytest.mark.production_timeouts
async def test_a_subject_that_is_not_projected_yet_is_not_reached(fresh, execute, owner, acme):
    number, (position,) = await execute(incident, opened())
    with pytest.raises(PositionNotReached):
        await fresh(acme.id, "incident", number, position + 1, "public")
    number, (position,) = await execute(maintenance, scheduled())
    await owner.execute("DELETE FROM maintenance")
    with pytest.raises(PositionNotReached):
        await fresh(acme.id, "maintenance", number, position, "public")


async def test_a_service_that_is_not_projected_yet_is_not_reached(fresh, execute, parts, owner, acme):
    shown = await make_service(parts, acme.id, "web")
    number, (position,) = await execute(incident, opened(service_ids=(shown,)))
    await owner.execute("DELETE FROM services")
    with pytest.raises(PositionNotReached):
        await fresh(acme.id, "incident", number, position, "public")


async def test_a_lost_database_is_unavailable(settings, parts, acme):
    lost = Database("postgresql://opsentry@127.0.0.1:1/none", size=2, timeout_seconds=GENEROUS_SECONDS)
    await lost.open()
    builder = MessageBuilder(AsOfQueries(lost, parts.projector), lost)
    with pytest.raises(DatabaseUnavailable):
        await builder.build_subject(acme.id, "maintenance", 1, 1, "public")
    with pytest.raises(DatabaseUnavailable):
        await builder.get_tenant(acme.id)
    await lost.close()


async def test_a_tenant_has_its_slug_and_name(builder, acme):
    assert await builder.get_tenant(acme.id) == {"slug": "acme", "name": "Acme"}
    with pytest.raises(TenantNotFound):
        await builder.get_tenant(10**9)


@pytest.mark.parametrize(
    ("topics", "expected"),
    [
        ("incident.opened", "incident.opened"),
        ("incident.opened incident.updated incident.severity_changed", "incident.opened"),
        ("incident.opened incident.resolved", "incident.resolved"),
        ("incident.opened incident.resolved incident.reopened incident.updated", "incident.reopened"),
        ("incident.resolved incident.reopened incident.resolved", "incident.resolved"),
        ("incident.updated incident.severity_changed incident.updated", "incident.severity_changed"),
        ("incident.updated incident.status_changed", "incident.updated"),
        ("incident.status_changed", "incident.updated"),
        ("incident.services_changed incident.visibility_changed", "incident.updated"),
        ("incident.still_open", "incident.still_open"),
        ("incident.still_open incident.updated", "incident.updated"),
        ("maintenance.scheduled maintenance.updated", "maintenance.scheduled"),
        ("maintenance.scheduled maintenance.rescheduled", "maintenance.rescheduled"),
        ("maintenance.scheduled maintenance.started maintenance.updated", "maintenance.started"),
        ("maintenance.started maintenance.completed", "maintenance.completed"),
        ("maintenance.scheduled maintenance.cancelled", "maintenance.cancelled"),
        ("maintenance.reminded", "maintenance.reminder"),
        ("maintenance.reminded maintenance.updated", "maintenance.updated"),
        ("maintenance.reminded maintenance.started", "maintenance.started"),
        ("maintenance.updated maintenance.edited", "maintenance.updated"),
        ("subscription.created", "subscription.confirm"),
        ("subscription.test_requested", "subscription.test"),
    ],
)
def test_the_most_important_event_decides_the_type(topics, expected):
    assert message_type(topics.split()) == expected


def test_every_type_has_a_label():
    types = [name for name in EVENT_TYPES if name.partition(".")[0] in {"incident", "maintenance"}]
    for topics in permutations([*types, "maintenance.reminded", "incident.still_open"], 2):
        if topics[0].partition(".")[0] == topics[1].partition(".")[0]:
            assert message_type(topics) in MESSAGE_TYPES

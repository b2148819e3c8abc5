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
from tests.conftest import META, make_service
from tests.notifications.messages import message
from tests.waiting import GENEROUS_SECONDS


@pytest.fixture
def composer(parts):
    return MessageBuilder(AsOfQueries(parts.database, parts.projector), parts.database)


@pytest.fixture
def fresh(parts):
    """Compose without anything looked up before."""

    async def compose(*wanted):
        return await MessageBuilder(AsOfQueries(parts.database, parts.projector), parts.database).compose(*wanted)

    return compose


@pytest.fixture
def tell(parts, acme):
    """Carry out commands on one thing, the first of which begins it; return its id and the positions reached."""

    async def carry_out(kind, first, *others, stream_id=None):
        reached = []
        if stream_id is None:
            executed = await parts.commands.create(kind.DECIDER, acme.id, first, META)
            stream_id = executed.stream_id
            reached.append(executed.position)
        else:
            others = (first, *others)
        for command in others:
            executed = await parts.commands.execute(kind.DECIDER, acme.id, stream_id, command, META)
            reached.append(executed.position)
        await parts.projector.catch_up(acme.id, reached[-1])
        return stream_id, reached

    return carry_out


def opened(**fields):
    return OpenIncident(title="Down", description="All of it", severity="critical", **fields)


def scheduled(**fields):
    start = datetime.now(UTC) + timedelta(hours=1)
    return ScheduleMaintenance(
        title="Upgrade", scheduled_start=start, scheduled_end=start + timedelta(hours=1), **fields
    )


async def test_the_public_is_told_what_is_public(composer, tell, parts, acme):
    shown = await make_service(parts, acme.id, "web")
    hidden = await make_service(parts, acme.id, "vault", visibility="internal")
    number, (_, _, _, last) = await tell(
        incident,
        opened(service_ids=(shown, hidden)),
        PostUpdate(message="Customers: we know.", status="identified"),
        PostUpdate(message="Colleagues: it was Kim.", is_public=False),
        ResolveIncident(root_cause="Kim", postmortem="Kim again"),
    )
    whole = await composer.compose(acme.id, "incident", number, last, "internal")
    assert [service["id"] for service in whole["services"]] == whole["service_ids"] == [shown, hidden]
    assert (whole["root_cause"], whole["visibility"]) == ("Kim", "public")
    assert [update["author"] for update in whole["updates"]] == ["operator"] * 3
    part = await composer.compose(acme.id, "incident", number, last, "public")
    assert [service["id"] for service in part["services"]] == part["service_ids"] == [shown]
    assert [update["message"] for update in part["updates"]] == ["All of it", "Customers: we know."]
    assert set(whole) - set(part) == {"visibility", "root_cause", "postmortem"}
    assert set(whole["updates"][0]) - set(part["updates"][0]) == {"author", "is_public"}
    assert "Kim" not in str(part)
    for told in (whole, part):
        # What is composed is what the schema of webhooks describes.
        body = PayloadEncoder().encode(message(told, position=last))
        decoded = msgspec.json.decode(body, type=Payload)
        assert msgspec.json.decode(msgspec.json.encode(decoded)) == msgspec.json.decode(body)


async def test_things_are_told_as_they_were(fresh, tell, acme):
    number, (first, second, third) = await tell(
        incident, opened(), PostUpdate(message="Looking", status="identified"), ResolveIncident()
    )
    seen = [await fresh(acme.id, "incident", number, position, "public") for position in (first, second, third)]
    assert [each["status"] for each in seen] == ["investigating", "identified", "resolved"]
    assert [len(each["updates"]) for each in seen] == [1, 2, 2]


async def test_what_was_internal_then_or_is_now_is_withheld(fresh, tell, acme):
    number, (first, second, third) = await tell(
        incident,
        opened(visibility="internal"),
        ChangeIncident(visibility="public"),
        PostUpdate(message="Looking"),
    )
    assert await fresh(acme.id, "incident", number, first, "public") is None
    assert await fresh(acme.id, "incident", number, first, "internal")
    assert await fresh(acme.id, "incident", number, third, "public")
    await tell(incident, ChangeIncident(visibility="internal"), stream_id=number)
    assert await fresh(acme.id, "incident", number, second, "public") is None
    assert await fresh(acme.id, "incident", number, third, "public") is None
    assert await fresh(acme.id, "incident", number, third, "internal")


async def test_what_becomes_internal_is_not_told_on_for_longer_than_a_second(composer, tell, parts, acme, clock):
    shown = await make_service(parts, acme.id, "web")
    number, (position,) = await tell(incident, opened(service_ids=(shown,)))
    assert (await composer.compose(acme.id, "incident", number, position, "public"))["service_ids"] == [shown]
    executed = await parts.commands.execute(service.DECIDER, acme.id, shown, ChangeService(visibility="internal"), META)
    await parts.projector.catch_up(acme.id, executed.position)
    clock.now += 1
    told = await composer.compose(acme.id, "incident", number, position, "public")
    assert (told["service_ids"], told["services"]) == ([], [])
    await tell(incident, ChangeIncident(visibility="internal"), stream_id=number)
    clock.now += 1
    assert await composer.compose(acme.id, "incident", number, position, "public") is None


async def test_erased_words_are_not_told(composer, tell, acme, clock):
    number, (first, second) = await tell(incident, opened(), PostUpdate(message="RequestContext Kim: 555 1234"))
    assert "555" in str(await composer.compose(acme.id, "incident", number, second, "public"))
    erasure = RedactionPlan(versions=(1, 2, 3), fields=("title", "description"), restated={})
    await tell(incident, RedactIncident(erasure=erasure, reason="Asked"), stream_id=number)
    clock.now += 1
    for position in (first, second):
        told = await composer.compose(acme.id, "incident", number, position, "public")
        assert told["title"] == told["description"] == "[redacted]"
        assert "555" not in str(told)


async def test_windows_are_told_too(composer, tell, parts, acme):
    shown = await make_service(parts, acme.id, "web")
    hidden = await make_service(parts, acme.id, "vault", visibility="internal")
    number, (first, second) = await tell(maintenance, scheduled(service_ids=(shown, hidden)), StartMaintenance())
    part = await composer.compose(acme.id, "maintenance", number, second, "public")
    assert (part["status"], part["service_ids"], part["updates"]) == ("active", [shown], [])
    whole = await composer.compose(acme.id, "maintenance", number, first, "internal")
    assert (whole["status"], whole["service_ids"]) == ("scheduled", [shown, hidden])
    assert set(whole) - set(part) == {"visibility"}
    internal, (position,) = await tell(maintenance, scheduled(visibility="internal"))
    assert await composer.compose(acme.id, "maintenance", internal, position, "public") is None


async def test_another_tenant_s_things_are_nothing(composer, tell, globex):
    number, (position,) = await tell(incident, opened())
    assert await composer.compose(globex.id, "incident", number, 1, "internal") is None
    assert await composer.compose(globex.id, "maintenance", number, position, "public") is None


async def test_many_who_are_told_the_same_cost_one_look_up(composer, tell, acme):
    number, (position,) = await tell(incident, opened())
    one, *others = await asyncio.gather(
        *(composer.compose(acme.id, "incident", number, position, "public") for _ in range(100))
    )
    assert all(other is one for other in others)


@pytest.mark.production_timeouts
async def test_what_read_models_do_not_show_yet_is_told_later(fresh, tell, owner, acme):
    number, (position,) = await tell(incident, opened())
    with pytest.raises(PositionNotReached):
        await fresh(acme.id, "incident", number, position + 1, "public")
    number, (position,) = await tell(maintenance, scheduled())
    await owner.execute("DELETE FROM maintenance")
    with pytest.raises(PositionNotReached):
        await fresh(acme.id, "maintenance", number, position, "public")


async def test_a_service_that_is_not_known_to_be_public_is_waited_for(fresh, tell, parts, owner, acme):
    shown = await make_service(parts, acme.id, "web")
    number, (position,) = await tell(incident, opened(service_ids=(shown,)))
    await owner.execute("DELETE FROM services")
    with pytest.raises(PositionNotReached):
        await fresh(acme.id, "incident", number, position, "public")


async def test_a_database_that_is_lost_is_said(settings, parts, acme):
    lost = Database("postgresql://opsentry@127.0.0.1:1/none", size=2, timeout_seconds=GENEROUS_SECONDS)
    await lost.open()
    composer = MessageBuilder(AsOfQueries(lost, parts.projector), lost)
    with pytest.raises(DatabaseUnavailable):
        await composer.compose(acme.id, "maintenance", 1, 1, "public")
    with pytest.raises(DatabaseUnavailable):
        await composer.tenant(acme.id)
    await lost.close()


async def test_a_tenant_is_named(composer, acme):
    assert await composer.tenant(acme.id) == {"slug": "acme", "name": "Acme"}
    with pytest.raises(TenantNotFound):
        await composer.tenant(10**9)


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
def test_what_kind_of_news_several_events_are(topics, expected):
    assert message_type(topics.split()) == expected


def test_every_type_has_a_heading():
    told = [name for name in EVENT_TYPES if name.partition(".")[0] in {"incident", "maintenance"}]
    for topics in permutations([*told, "maintenance.reminded", "incident.still_open"], 2):
        if topics[0].partition(".")[0] == topics[1].partition(".")[0]:
            assert message_type(topics) in MESSAGE_TYPES

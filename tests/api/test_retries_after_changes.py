"""Check that a retry keeps its answer after later changes, and never shows redacted fields."""

import asyncio

from opsentry.bootstrap import core
from opsentry.domain import service
from opsentry.domain.service import ChangeService, RetireService
from opsentry.identity.scopes import SCOPES
from tests.api.conftest import (
    carry_out,
    each_keyed_request,
    head,
    keyed_request,
    make_token,
    rename,
    send_keyed,
)
from tests.conftest import Client
from tests.waiting import until

# Whether exactly $1 sessions wait for a lock. A transaction sees one snapshot of this view, so poll outside of it.
WAITERS = """
SELECT count(*) = $1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


@each_keyed_request
async def test_a_repeat_keeps_its_answer_after_later_changes(api, parts, acme, linked, name):
    first = await send_keyed(api, keyed_request(name, linked))
    made = first.told["Location"].rsplit("/")[-1] if name == "declare" else linked["incident"]
    for body in ({"title": "Later", "visibility": "internal", "service_ids": []}, {"status": "monitoring"}):
        await api.patch(f"/incidents/{made}", body)
    await api.post(f"/incidents/{made}/updates", {"message": "Later"})
    await api.post(f"/incidents/{made}/resolve", {"postmortem": "Later"})
    await api.post(f"/maintenance/{linked['scheduled']}/start")
    await api.post(f"/maintenance/{linked['active']}/complete")
    assert await send_keyed(api, keyed_request(name, linked)) == first._replace(replayed="true")


@each_keyed_request
async def test_a_repeat_keeps_its_answer_after_a_service_was_changed(api, parts, acme, linked, name):
    await rename(parts, acme, linked["service"], "Portal of then")
    first = await send_keyed(api, keyed_request(name, linked))
    assert b"Portal of then" in first.octets
    for command in (ChangeService(name="Renamed"), RetireService()):
        await carry_out(parts, service.DECIDER, acme.id, linked["service"], command)
        appended = await head(parts, acme.id)
        assert await send_keyed(api, keyed_request(name, linked)) == first._replace(replayed="true")
        assert await head(parts, acme.id) == appended


async def test_a_repeat_of_an_empty_change_keeps_its_service_links(api, parts, acme, linked):
    await rename(parts, acme, linked["service"], "Portal of then")
    unchanging = ("PATCH", f"/incidents/{linked['incident']}", {"title": "A"})
    first = await send_keyed(api, unchanging)
    assert b"Portal of then" in first.octets
    await rename(parts, acme, linked["service"])
    assert await send_keyed(api, unchanging) == first._replace(replayed="true")


async def test_a_repeat_keeps_the_links_of_a_service_renamed_while_the_command_waited(
    api, parts, settings, owner, app_connection, acme, linked
):
    before = await head(parts, acme.id)
    async with core(settings) as other:
        async with owner.transaction():
            await owner.execute("SELECT FROM ledger_heads WHERE tenant_id = $1 FOR UPDATE", acme.id)
            renaming = asyncio.create_task(rename(other, acme, linked["service"]))
            await until(lambda: app_connection.fetchval(WAITERS, 1))
            declare = asyncio.create_task(send_keyed(api, keyed_request("declare", linked)))
            await until(lambda: app_connection.fetchval(WAITERS, 2))
        await renaming
        first = await declare
    assert (first.status, first.told["Opsentry-Position"]) == (201, str(before + 3))
    assert await send_keyed(api, keyed_request("declare", linked)) == first._replace(replayed="true")


async def test_a_retired_service_takes_no_new_incident_but_a_repeat_is_answered(api, parts, acme, linked):
    first = await send_keyed(api, keyed_request("declare", linked))
    await carry_out(parts, service.DECIDER, acme.id, linked["service"], RetireService())
    assert (await send_keyed(api, keyed_request("declare", linked), "another")).status == 400
    assert await send_keyed(api, keyed_request("declare", linked)) == first._replace(replayed="true")


async def test_a_repeat_keeps_the_authors_of_its_answer(api, http, base_url, parts, acme, linked):
    other = Client(http, base_url, await make_token(parts, acme.id, *SCOPES))
    await send_keyed(other, keyed_request("update", linked))
    first = await send_keyed(api, keyed_request("update", linked))
    assert b'"author":"t"' in first.octets
    assert b'"author":"acme token"' in first.octets
    assert await send_keyed(api, keyed_request("update", linked)) == first._replace(replayed="true")


async def test_a_repeat_never_brings_back_fields_that_were_redacted_since(api, linked):
    first = await send_keyed(api, keyed_request("declare", linked))
    assert b"Told" in first.octets
    made = first.told["Location"].removeprefix("/api/v1")
    await api.post(f"{made}/redactions", {"fields": ["description"], "reason": "Name"})
    again = await send_keyed(api, keyed_request("declare", linked))
    # The same event held the title, so the title is redacted too.
    assert again.octets == first.octets.replace(b'"Told"', b'"[redacted]"').replace(b'"New"', b'"[redacted]"')
    assert again[2:] == (first.told, "true")


async def test_a_redaction_never_answers_with_the_redacted_fields(api, linked):
    for name, words in (("redact incident", b"Somebody's name"), ("redact window", b'"title":"A"')):
        answer = await send_keyed(api, keyed_request(name, linked), name)
        assert answer.status == 201
        assert words not in answer.octets

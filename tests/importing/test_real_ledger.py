"""Read the ledger of a real page: its past states, its export, its verification and a redaction."""

import json
from collections import Counter
from datetime import UTC, datetime

from opsentry.cli.ledger_history import known_at
from opsentry.domain import incident
from opsentry.events import audit, export, store
from opsentry.events.codec import RecordedEvent
from opsentry.events.export_verification import verify_export
from opsentry.events.verdict import Anchor
from opsentry.events.verification import verify
from tests.importing.test_real_history import moment, oldest_first

DATES = [datetime(year, month, day, tzinfo=UTC) for year, month, day in
         [(2022, 3, 27), (2023, 5, 9), (2024, 2, 1), (2024, 11, 19), (2025, 9, 1)]]  # fmt: skip


async def test_states_at_five_dates_equal_the_file(file, page):
    parts, tenant, _, _ = page
    async with parts.database.connection(30) as connection:
        recorded = await store.read_between(connection, tenant.id, 0, 10_000, [incident.KIND])
    streams: dict[int, list[RecordedEvent]] = {}
    for event in recorded:
        streams.setdefault(event.stream_id, []).append(event)
    for hours in range(24):
        for date in (date.replace(hour=hours) for date in DATES):
            shown: Counter[tuple[str, str]] = Counter()
            for stream in streams.values():
                state = incident.DECIDER.fold(e.event for e in known_at(stream, date))  # type: ignore[misc]
                if state is not None:
                    shown[state.title, state.status] += 1
            expected: Counter[tuple[str, str]] = Counter()
            for record in file["incidents"]:
                entries = oldest_first(record)
                began = min(moment(record["started_at"]), moment(record["created_at"]))
                past = [u["status"] for u in entries if moment(u["display_at"] or u["created_at"]) <= date]
                if began <= date or past:
                    expected[record["name"], (past or ["investigating"])[-1].replace("postmortem", "resolved")] += 1
            assert shown == expected, date


async def test_lists_as_of_five_positions_count_the_incidents_opened_by_then(page, owner):
    _, tenant, api, _ = page
    last = (await api.get("/events/head"))[1]["position"]
    for position in (1, last // 4, last // 2, 3 * last // 4, last):
        _, answer, _ = await api.get(f"/incidents?as_of={position}&limit=3")
        query = "SELECT count(*) FROM events WHERE tenant_id = $1 AND type = 'incident.opened' AND position <= $2"
        opened = await owner.fetchval(query, tenant.id, position)
        assert answer["total"] == opened
    _, now, _ = await api.get("/incidents?limit=200")
    assert (await api.get(f"/incidents?limit=200&as_of={last}"))[1] == now


async def test_the_export_verifies_without_a_database(page, owner, tmp_path):
    _, tenant, api, result = page
    head = await audit.read_ledger_head(owner, tenant.id)
    url = f"{api.base_url}/api/v1/events/export"
    file = tmp_path / "page.ndjson"
    async with api.session.get(url, headers=api.headers) as response:
        file.write_bytes(await response.read())
    assert file.read_bytes() == await export.chunk(owner, tenant.id, 0, head.position)
    verdict = verify_export(file, anchors=[Anchor(head.position, head.hash)])
    assert (verdict.violation, verdict.events) == (None, result.events + 2)


async def test_a_redaction_erases_one_message_only(file, page, owner, settings):
    _, tenant, api, _ = page
    texts = Counter(update["body"] for record in file["incidents"] for update in record["incident_updates"])
    text = max((text for text, times in texts.items() if times == 1), key=len)
    found = await owner.fetchrow(
        "SELECT stream_id, position FROM events WHERE tenant_id = $1 AND erasable::json ->> 'message' = $2",
        tenant.id,
        text,
    )
    before = await api.get(f"/incidents/{found['stream_id']}")
    status, after, _ = await api.post(
        f"/incidents/{found['stream_id']}/redactions", {"events": [found["position"]], "reason": "A customer is named."}
    )
    assert status == 201
    for update in before[1]["updates"]:
        if update["id"] == found["position"]:
            update["message"] = "[redacted]"
    assert {**after, "updated_at": None} == {**before[1], "updated_at": None}
    snippet = json.dumps(text)[1:60]
    for table in ("events", "incidents", "incident_updates", "incident_snapshots"):
        assert await owner.fetchval(f"SELECT count(*) FROM {table} t WHERE strpos(t::text, $1) > 0", snippet) == 0
    (verdict,) = await verify(settings.database_url, tenant_id=tenant.id)
    assert (verdict.violation, verdict.redacted) == (None, 1)

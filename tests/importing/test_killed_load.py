import json
from collections import Counter

import pytest

from tests.events.ledger import first_broken
from tests.importing.pages import component, incident, ledger, link, page, update, write
from tests.system.processes import environment, opsentry, running
from tests.waiting import until

INCIDENTS = 1500


def long_page():
    return page(
        components=[component(f"c{n}", f"Service {n}") for n in range(10)],
        incidents=[
            incident(
                f"i{n}",
                *(update(f"u{n}-{k}", "monitoring", k, "x" * 500) for k in range(6)),
                update(f"u{n}-last", "resolved", 9, "over"),
                components=[link(f"c{n % 10}")],
            )
            for n in range(INCIDENTS)
        ],
    )


async def seen(connection, tenant_id, events):
    async def far_enough():
        return await connection.fetchval("SELECT position FROM ledger_heads WHERE tenant_id = $1", tenant_id) >= events

    await until(far_enough)


@pytest.mark.parametrize("events", [8, 200, 4000])
async def test_a_killed_import_completes_on_the_next_run_without_duplicates(settings, acme, owner, tmp_path, events):
    arguments = ("import", "statuspage", str(write(tmp_path, long_page())), "--tenant", "acme", "--json")
    async with running(environment(settings), *arguments) as process:
        await seen(owner, acme.id, events)
        process.kill()
        assert await process.ended() == -9
    survived = len(await ledger(owner, acme.id, "incident"))
    assert survived < 10 * INCIDENTS

    ran = await opsentry(environment(settings), *arguments)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    rows = await ledger(owner, acme.id, "incident")
    types = Counter(row["type"] for row in rows)
    assert types == {
        "incident.opened": INCIDENTS,
        "incident.status_changed": INCIDENTS,
        "incident.updated": 7 * INCIDENTS,
        "incident.resolved": INCIDENTS,
    }
    sources = [json.loads(row["data"])["source"] for row in rows if "source" in json.loads(row["data"])]
    assert len(sources) == len(set(sources)) == 8 * INCIDENTS
    assert result["incidents"] + result["unchanged"] >= INCIDENTS
    assert len(await ledger(owner, acme.id, "service")) == 10
    assert first_broken(await ledger(owner, acme.id)) is None
    shown = await owner.fetchrow("SELECT count(*) AS n, min(status) AS a, max(status) AS b FROM incidents")
    assert tuple(shown) == (INCIDENTS, "resolved", "resolved")

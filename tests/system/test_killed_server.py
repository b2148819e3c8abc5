"""A server is killed under load: it loses no acknowledged write."""

import random
from typing import NamedTuple

import aiohttp
import pytest
from rich.console import Console
from rich.table import Table

from tests.conftest import Client
from tests.system.load import Load, check_ledgers, check_read_models, nobody_writes, prepare
from tests.system.processes import server

CLIENTS = 32


class Round(NamedTuple):
    """The result of one kill."""

    answered: int
    unanswered: int
    of_them_recorded: int
    behind: int


async def kill_and_restart(settings, owner, rounds):
    """Kill the server under load, check that every acknowledged write is recorded, and restart it."""
    tenants = await prepare(settings, 4)
    answers: dict[str, int | None] = {}
    found = []
    chance = random.Random(rounds)
    for _ in range(rounds):
        async with server(settings) as (process, url), aiohttp.ClientSession() as session:
            for tenant in tenants:
                await check_read_models(owner, Client(session, url, tenant.token), tenant)
            async with Load(url, tenants, clients=CLIENTS) as load:
                await load.answered(chance.randrange(20, 400))
                process.kill()
                await load.stop()
            assert await process.ended() == -9
        await nobody_writes(owner)
        assert set(load.answers.values()) <= {201, None}  # a kill may come while no request is in flight
        assert load.unseen == []
        answers |= load.answers
        marks = await check_ledgers(owner, tenants, answers)
        lost = [mark for mark, status in load.answers.items() if status is None]
        behind = await owner.fetchval(
            "SELECT count(*) FROM checkpoints c JOIN ledger_heads h USING (tenant_id) WHERE c.position < h.position"
        )
        found.append(Round(load.count(201), len(lost), sum(marks[mark] for mark in lost), behind))
    async with server(settings) as (_, url), aiohttp.ClientSession() as session:
        for tenant in tenants:
            await check_read_models(owner, Client(session, url, tenant.token), tenant)
    return found


async def test_acknowledged_writes_survive_a_kill_of_the_server(settings, owner):
    found = await kill_and_restart(settings, owner, 3)
    assert all(one.answered for one in found)
    assert any(one.unanswered for one in found)


@pytest.mark.faults
async def test_acknowledged_writes_survive_thirty_kills_of_the_server(settings, owner):
    found = await kill_and_restart(settings, owner, 30)
    table = Table(
        "round", "answered", "unanswered", "of them recorded", "projections behind", title="kill -9 of a server"
    )
    for number, one in enumerate(found, 1):
        table.add_row(str(number), *map(str, one))
    table.add_row("all", *(str(sum(column)) for column in zip(*found, strict=True)))
    Console().print(table)
    assert sum(one.unanswered for one in found) > 30

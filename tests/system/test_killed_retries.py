"""Clients that lose the server in the middle of commands, and send all of them again under the same keys."""

import asyncio
import json
import random
import uuid
from collections import Counter
from typing import Any, NamedTuple

import aiohttp
import pytest
from rich.console import Console
from rich.table import Table

from tests.conftest import Client
from tests.events.ledger import first_broken
from tests.system.load import nobody_writes, prepare
from tests.system.processes import server

COMMANDS = 200
AT_ONCE = 32


class Command(NamedTuple):
    """A request that makes one event, whose words are its mark."""

    mark: str
    method: str
    path: str
    body: dict[str, Any]


class Round(NamedTuple):
    """How one kill went."""

    answered: int
    lost: int
    of_them_recorded: int
    effects: int


def commands(incidents):
    """200 commands: new incidents, messages to a few old ones, changes of others' titles."""
    made = []
    for number in range(COMMANDS):
        mark = str(uuid.uuid4())
        match number % 4:
            case 0 | 1:
                made.append(Command(mark, "POST", "/incidents", {"title": mark}))
            case 2:
                made.append(Command(mark, "POST", f"/incidents/{incidents[number % 3]}/updates", {"message": mark}))
            case _:
                made.append(Command(mark, "PATCH", f"/incidents/{incidents[3 + number % 5]}", {"title": mark}))
    return made


async def send(client, command):
    """Return what the command was answered, `None` where no answer came."""
    url = f"{client.base_url}/api/v1{command.path}"
    headers = {**client.headers, "Idempotency-Key": f"key-{command.mark}"}
    try:
        async with client.session.request(command.method, url, headers=headers, json=command.body) as response:
            return response.status, await response.read(), response.headers.get("Idempotency-Replayed")
    except aiohttp.ClientError:
        return None


async def send_all(client, made, answered):
    at_once = asyncio.Semaphore(AT_ONCE)

    async def one(command):
        async with at_once:
            answer = await send(client, command)
            answered(answer)
            return answer

    return await asyncio.gather(*(one(command) for command in made))


async def kill_and_retry(settings, owner, rounds):
    """Kill the server in the middle of 200 keyed commands, then send them all again: 200 effects, each once."""
    (tenant,) = await prepare(settings, 1)
    chance = random.Random(rounds)
    found = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with server(settings) as (_, url):
            client = Client(session, url, tenant.token)
            incidents = [(await client.post("/incidents", {"title": "old"}))[1]["id"] for _ in range(8)]
        for _ in range(rounds):
            made = commands(incidents)
            chance.shuffle(made)
            enough = chance.randrange(1, COMMANDS - AT_ONCE)
            answers = Counter[bool]()
            async with server(settings) as (process, url):

                def count(answer, answers=answers, enough=enough, process=process):
                    answers[answer is not None] += 1
                    if answer is not None and answers[True] == enough:
                        process.kill()

                first = await send_all(Client(session, url, tenant.token), made, count)
                assert await process.ended() == -9
            await nobody_writes(owner)
            before = await marks(owner, tenant)
            async with server(settings) as (_, url):
                second = await send_all(Client(session, url, tenant.token), made, lambda _answer: None)
                third = await send_all(Client(session, url, tenant.token), made, lambda _answer: None)
            after = await marks(owner, tenant)
            wanted = {command.mark for command in made}
            assert {mark: after[mark] for mark in wanted} == dict.fromkeys(wanted, 1)
            for command, one, two, three in zip(made, first, second, third, strict=True):
                assert two is not None
                assert two[0] in {200, 201}
                assert three == (two[0], two[1], "true")
                if one is not None:  # what was answered once is answered the same for ever
                    assert two == (one[0], one[1], "true")
                assert (two[2] == "true") == (before[command.mark] == 1)
            lost = [command.mark for command, answer in zip(made, first, strict=True) if answer is None]
            recorded = sum(before[mark] for mark in lost)
            found.append(Round(COMMANDS - len(lost), len(lost), recorded, sum(after[mark] for mark in wanted)))
    rows = await owner.fetch("SELECT * FROM events WHERE tenant_id = $1 ORDER BY position", tenant.id)
    assert first_broken(rows) is None
    return found


async def marks(owner, tenant):
    """How often each mark stands in the tenant's ledger."""
    rows = await owner.fetch(
        "SELECT erasable FROM events WHERE tenant_id = $1 AND stream_kind = 'incident' AND erasable IS NOT NULL",
        tenant.id,
    )
    return Counter(text for row in rows for text in json.loads(row["erasable"]).values())


async def test_commands_sent_again_after_a_kill_have_one_effect_each(settings, owner):
    found = await kill_and_retry(settings, owner, 2)
    assert [one.effects for one in found] == [COMMANDS] * 2


@pytest.mark.faults
async def test_commands_sent_again_after_fifty_kills_have_one_effect_each(settings, owner):
    found = await kill_and_retry(settings, owner, 50)
    table = Table("round", "answered", "lost", "of them recorded", "effects after all", title="kill -9, then again")
    for number, one in enumerate(found, 1):
        table.add_row(str(number), *map(str, one))
    table.add_row("all", *(str(sum(column)) for column in zip(*found, strict=True)))
    Console().print(table)
    assert [one.effects for one in found] == [COMMANDS] * 50
    assert sum(one.of_them_recorded for one in found) > 0

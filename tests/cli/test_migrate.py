import asyncio
from dataclasses import replace

import asyncpg
import pytest

from opsentry.demo.embedded import APP_USER
from opsentry.infrastructure.postgres import migrations
from tests.system.processes import environment, opsentry


@pytest.fixture
async def empty(postgres, settings):
    """Settings of a database that has no schema yet."""
    name = "empty"
    connection = await asyncpg.connect(postgres.url("postgres"))
    await connection.execute(f"CREATE DATABASE {name}")
    yield replace(settings, database_url=postgres.url(name, APP_USER), migration_database_url=postgres.url(name))
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


APPLIED = "".join(f"applied {step.name}\n" for step in migrations())
DONE = "the schema is up to date\n"


async def test_a_second_run_applies_nothing(empty):
    env = environment(empty)
    assert await opsentry(env, "migrate") == (0, APPLIED + DONE, "")
    assert await opsentry(env, "migrate") == (0, DONE, "")
    assert (await opsentry(env, "tenant", "create", "acme")).code == 0


async def test_one_of_two_concurrent_runs_migrates(empty):
    ran = await asyncio.gather(*(opsentry(environment(empty), "migrate") for _ in range(2)))
    assert sorted(one.out for one in ran) == sorted([APPLIED + DONE, DONE])
    assert [one.code for one in ran] == [0, 0]


async def test_commands_report_a_missing_schema(empty):
    ran = await opsentry(environment(empty), "tenant", "list")
    assert (ran.code, ran.out) == (1, "")
    assert "migrated" in ran.err
    assert ran.err.count("\n") == 1


async def test_an_edited_migration_is_refused(settings, owner):
    last = migrations()[-1]
    await owner.execute("UPDATE schema_migrations SET checksum = 'other' WHERE number = $1", last.number)
    ran = await opsentry(environment(settings), "migrate")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"Error: {last.name} was edited after it had been applied; add a new file instead\n"


async def test_a_newer_database_is_refused(settings, owner):
    await owner.execute("INSERT INTO schema_migrations (number, name, checksum) VALUES (9999, '9999_later', 'x')")
    ran = await opsentry(environment(settings), "migrate")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "Error: the database has 9999_later, which this version of Opsentry does not know\n"


async def test_a_login_without_the_right_to_migrate_gets_one_line(empty, postgres):
    ran = await opsentry(environment(replace(empty, migration_database_url="")), "migrate")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Error: ")
    assert ran.err.count("\n") == 1

import asyncio
from dataclasses import replace

import asyncpg
import pytest

from opsentry.demo.embedded import APP_USER
from opsentry.infrastructure.migrations import migrations
from tests.system.processes import environment, opsentry
from tools.dump_schema import SCHEMA_FILE, dump_schema


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
    assert ran.err == (
        f"Error: {last.name} is not the file that this database was migrated with; nothing was changed;"
        " restore the file and put the change into a new migration, or create a new database\n"
    )


async def test_a_newer_database_is_refused(settings, owner):
    await owner.execute("INSERT INTO schema_migrations (number, name, checksum) VALUES (9999, '9999_later', 'x')")
    ran = await opsentry(environment(settings), "migrate")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "Error: this database was migrated by a newer version of Opsentry (it has 9999_later); nothing was changed;"
        " run that version or a later one\n"
    )


async def test_a_database_of_an_unreleased_version_is_refused(settings, owner):
    await owner.execute(
        "UPDATE schema_migrations SET name = '0002_access', checksum = 'x' WHERE number = 2;"
        "INSERT INTO schema_migrations (number, name, checksum) VALUES (9, '0009_deliveries', 'x')"
    )
    before = await owner.fetch("SELECT * FROM schema_migrations ORDER BY number")
    ran = await opsentry(environment(settings), "migrate")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "Error: this database was made by an unreleased version of Opsentry (it has 0002_access);"
        " nothing was changed; create a new database\n"
    )
    assert await owner.fetch("SELECT * FROM schema_migrations ORDER BY number") == before


async def test_the_committed_schema_is_that_of_a_migrated_database(settings):
    assert SCHEMA_FILE.read_text() == dump_schema(settings.migration_database_url), "run `make schema`"


async def test_a_login_without_the_right_to_migrate_gets_one_line(empty, postgres):
    ran = await opsentry(environment(replace(empty, migration_database_url="")), "migrate")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Error: ")
    assert ran.err.count("\n") == 1

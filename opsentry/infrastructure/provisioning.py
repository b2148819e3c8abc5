"""Create a database and the application's login on a server that Opsentry owns, such as an embedded one."""

import asyncpg

from opsentry.infrastructure.migrations import migrate, migrations

APPLICATION_ROLE = "opsentry_app"


async def create_database(server_url: str, name: str) -> None:
    """Create the database `name`, unless it exists.

    Args:
        server_url: URL of any other database on the server, as a superuser.
        name: A name that needs no quoting.
    """
    connection = await asyncpg.connect(server_url)
    try:
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", name):
            await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()


async def prepare_database(owner_url: str, login: str) -> None:
    """Migrate the database and create `login`, a member of the application's role, unless it exists.

    Args:
        owner_url: URL of the database, as its owner.
        login: A name that needs no quoting.

    Raises:
        MigrationRefused: The database was migrated by other migrations.
    """
    connection = await asyncpg.connect(owner_url)
    try:
        await migrate(connection, migrations())
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", login):
            await connection.execute(f"CREATE ROLE {login} LOGIN IN ROLE {APPLICATION_ROLE}")
    finally:
        await connection.close()

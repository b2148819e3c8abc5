"""Bring a database to the schema of this version: numbered SQL files, applied once each and in order."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsentry.infrastructure.postgres import Connection, Record

# Beside the package in a source tree, inside it in a wheel.
MIGRATIONS_FOLDER = next(
    path
    for path in (Path(__file__).parents[2] / "migrations", Path(__file__).parents[1] / "migrations")
    if path.is_dir()
)

# schema.sql lies in the same folder: it shows the result and is no migration.
_FILE_PATTERN = "[0-9][0-9][0-9][0-9]_*.sql"

# An arbitrary number that no other program is likely to lock.
_LOCK_ID = 7306925114


class MigrationRefused(Exception):
    """The database cannot be migrated from its present state. Nothing was changed; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Migration:
    """Describe one forward step of the schema: the plain SQL file `NNNN_name.sql`.

    Attributes:
        number: The file's number; migrations are applied in this order.
        name: The file's name without its suffix.
        sql: The file's content.
    """

    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the file, in hex."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations(folder: Path = MIGRATIONS_FOLDER) -> Sequence[Migration]:
    """Return the migrations in `folder` in their order."""
    return [Migration(int(path.name[:4]), path.stem, path.read_text()) for path in sorted(folder.glob(_FILE_PATTERN))]


async def migrate(connection: Connection, known: Sequence[Migration]) -> list[Migration]:
    """Apply the migrations that the database lacks, all in one transaction, and return them.

    Several processes may call this at once: the first applies the migrations, the others wait and find them applied.

    Args:
        connection: A connection of the database's owner.
        known: All migrations of this version.

    Raises:
        MigrationRefused: The database has other migrations than `known`. Nothing was changed.
    """
    async with connection.transaction():
        # The lock belongs to the transaction: a session's lock would not work behind a pooler in transaction mode.
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK_ID)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (number integer PRIMARY KEY, name text NOT NULL,"
            " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        rows = await connection.fetch("SELECT number, name, checksum FROM schema_migrations ORDER BY number")
        applied = {row["number"]: row for row in rows}
        _check_applied(applied, {migration.number: migration for migration in known})
        lacking = [migration for migration in known if migration.number not in applied]
        for migration in lacking:
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO schema_migrations (number, name, checksum) VALUES ($1, $2, $3)",
                migration.number,
                migration.name,
                migration.checksum,
            )
        await connection.execute("GRANT SELECT ON schema_migrations TO opsentry_app")
        return lacking


def _check_applied(applied: Mapping[int, Record], known: Mapping[int, Migration]) -> None:
    # Names come first: a database of an unreleased version has more migrations than this version, under other names.
    for number, row in applied.items():
        if number in known and row["name"] != known[number].name:
            raise MigrationRefused(
                f"this database was made by an unreleased version of Opsentry (it has {row['name']});"
                " nothing was changed; create a new database"
            )
    for number, row in applied.items():
        if number not in known:
            raise MigrationRefused(
                f"this database was migrated by a newer version of Opsentry (it has {row['name']});"
                " nothing was changed; run that version or a later one"
            )
        if row["checksum"] != known[number].checksum:
            raise MigrationRefused(
                f"{row['name']} is not the file that this database was migrated with; nothing was changed;"
                " restore the file and put the change into a new migration, or create a new database"
            )

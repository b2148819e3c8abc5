"""Connect to PostgreSQL through a pool with bounded waits, and translate the driver's errors once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

Record: TypeAlias = asyncpg.Record
"""A row, read by column name."""
Connection: TypeAlias = "asyncpg.Connection[Record] | PoolConnectionProxy[Record]"
"""A connection. The pool lends a proxy with the same methods."""

_LOST = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedFunctionError,
    asyncpg.ReadOnlySQLTransactionError,
    # PostgreSQL ended a transaction that stayed idle or ran too long, because others waited for its locks.
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.TransactionTimeoutError,
)


# Classes of SQLSTATE that say something of the moment, not of the statement: lost connections, conflicts with others,
# missing resources, operator intervention, system errors.
_TRANSIENT_CLASSES = frozenset({"08", "40", "53", "55", "57", "58"})


class TransientError(Exception):
    """A failure of the moment: nothing is wrong with the work, and the same work may succeed later."""


def is_transient(error: BaseException) -> bool:
    """Return whether the same work may well succeed at another time."""
    if isinstance(error, asyncpg.PostgresError) and str(error.sqlstate or "")[:2] in _TRANSIENT_CLASSES:
        return True
    # A missing table, column or grant: the code is ahead of its migration.
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return True
    return isinstance(error, (*_LOST, TransientError)) and not isinstance(error, asyncpg.DataError)


class DatabaseUnavailable(TransientError):
    """The database did not answer in time, or not at all. Nothing was changed."""


class OutcomeUnknown(DatabaseUnavailable):
    """The database was lost while it was asked to write: the change may or may not be recorded."""


class Database:
    """A pool of connections that keep no session state, so it works behind PgBouncer in transaction mode too.

    Connections are made when first needed: a process starts, and answers what needs no database, while it is down.

    Args:
        url: A `postgresql://` URL.
        size: Connections of the pool, at most.
        timeout_seconds: How long a caller that sets no limit of its own holds a connection, the wait for it included.

    Attributes:
        timeout_seconds: As the argument.
    """

    def __init__(self, url: str, *, size: int, timeout_seconds: float) -> None:
        self._url = url
        self._size = size
        self.timeout_seconds = timeout_seconds
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        """Prepare the pool; connects to nothing yet."""
        self._pool = await asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=self._size,
            max_queries=1_000_000_000,
            max_inactive_connection_lifetime=0,
            # The default reset is one more round trip for each request; connections here carry nothing to reset.
            reset=_keep,
            server_settings=None,
        )

    async def close(self) -> None:
        """Close what is open, waiting at most a second for connections in use."""
        if self._pool is not None:
            try:
                async with asyncio.timeout(1):
                    await self._pool.close()
            except TimeoutError:
                self._pool.terminate()

    @asynccontextmanager
    async def connection(self, seconds: float | None = None) -> AsyncIterator[Connection]:
        """Lend a connection for at most `seconds` (`timeout_seconds` by default), the wait for it included.

        Raises:
            DatabaseUnavailable: No connection was to be had, it was lost, or time ran out.
        """
        assert self._pool is not None, "open() comes first"  # noqa: S101 - a mistake of ours, not of a user
        try:
            async with asyncio.timeout(self.timeout_seconds if seconds is None else seconds):
                connection = await self._pool.acquire()
                try:
                    yield connection
                except (asyncio.CancelledError, asyncpg.InternalClientError):
                    # Whatever was under way is given up together with the connection: asking a frozen server to
                    # cancel would wait for that server, and a driver that has lost count of what was sent, as it
                    # does where a connection ends in mid-statement, never finds it again.
                    connection.terminate()
                    raise
                finally:
                    await self._pool.release(connection)
        except asyncpg.DataError:
            raise  # a value of ours that fits no column: a defect, though the driver files it under lost connections
        except (TimeoutError, *_LOST) as error:
            raise DatabaseUnavailable(f"database: {type(error).__name__}") from error

    @asynccontextmanager
    async def transaction(self, seconds: float | None = None) -> AsyncIterator[Connection]:
        """Lend a connection inside a transaction that commits at the end.

        Raises:
            DatabaseUnavailable: As `connection()`; where it was lost at the commit, the outcome is unknown.
        """
        async with self.connection(seconds) as connection:
            await connection.execute("BEGIN")
            try:
                yield connection
            except asyncio.CancelledError:
                raise  # the connection is given up: a ROLLBACK would wait for a server that does not answer
            except BaseException:
                try:
                    async with asyncio.timeout(self.timeout_seconds):
                        await connection.execute("ROLLBACK")
                except (TimeoutError, *_LOST):
                    # With the connection goes the transaction; what led here is what is worth telling.
                    with suppress(asyncpg.InterfaceError):
                        connection.terminate()
                raise
            await connection.execute("COMMIT")

    async def fetchrow(self, query: str, *values: Any, seconds: float | None = None) -> asyncpg.Record | None:
        """Return the first row of `query`; raises as `connection()`."""
        async with self.connection(seconds) as connection:
            return await connection.fetchrow(query, *values)

    async def fetch(self, query: str, *values: Any, seconds: float | None = None) -> list[asyncpg.Record]:
        """Return all rows of `query`; raises as `connection()`."""
        async with self.connection(seconds) as connection:
            return list(await connection.fetch(query, *values))

    async def check_schema(self) -> None:
        """Read one row of the list of migrations; raises as `connection()` where the database has no schema."""
        await self.fetchrow("SELECT number FROM schema_migrations LIMIT 1")


async def fetch_one(connection: Connection, query: str, *values: Any) -> Record:
    """Return the row of a `query` that always has one, such as an aggregate.

    Raises:
        LookupError: It had none; the query has a defect.
    """
    row = await connection.fetchrow(query, *values)
    if row is None:
        raise LookupError(query)
    return row


async def _keep(_: Connection) -> None:
    return None

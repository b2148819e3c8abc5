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
    asyncpg.AmbiguousFunctionError,
    asyncpg.DatatypeMismatchError,
    asyncpg.ReadOnlySQLTransactionError,
    # PostgreSQL ended a transaction that stayed idle or ran too long, because others waited for its locks.
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.TransactionTimeoutError,
)


# SQLSTATE classes of temporary failures: connection lost, transaction rolled back, insufficient resources, operator
# intervention, object in use, system error.
_TRANSIENT_CLASSES = frozenset({"08", "40", "53", "55", "57", "58"})


class TransientError(Exception):
    """A temporary failure. The same work may succeed later."""


def is_transient(error: BaseException) -> bool:
    """Return whether the failure is temporary, so that the same work may succeed later."""
    if isinstance(error, asyncpg.PostgresError) and str(error.sqlstate or "")[:2] in _TRANSIENT_CLASSES:
        return True
    # A missing grant means that the code is newer than the schema; a migration will follow.
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return True
    return isinstance(error, (*_LOST, TransientError)) and not isinstance(error, asyncpg.DataError)


class DatabaseUnavailable(TransientError):
    """The database did not answer in time. Nothing was changed."""


class OutcomeUnknown(DatabaseUnavailable):
    """The connection was lost during a write. The change may or may not be recorded."""


class Database:
    """Pool connections without session state, which therefore work behind PgBouncer in transaction mode.

    The pool connects on first use, so a process starts and serves requests without data while the database is down.

    Args:
        url: A `postgresql://` URL.
        size: The largest number of connections.
        timeout_seconds: The default limit for waiting for a connection and using it.

    Attributes:
        timeout_seconds: As the argument.
    """

    def __init__(self, url: str, *, size: int, timeout_seconds: float) -> None:
        self._url = url
        self._size = size
        self.timeout_seconds = timeout_seconds
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        """Create the pool without connecting."""
        self._pool = await asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=self._size,
            max_queries=1_000_000_000,
            max_inactive_connection_lifetime=0,
            # The default reset costs a round trip per request, and these connections have no state to reset.
            reset=_keep,
            server_settings=None,
        )

    async def close(self) -> None:
        """Close the pool. Connections in use get one second to finish."""
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
            DatabaseUnavailable: No connection was free in time, it was lost, or the time limit ended.
        """
        assert self._pool is not None, "open() comes first"  # noqa: S101 - a programming error, not a user's
        try:
            async with asyncio.timeout(self.timeout_seconds if seconds is None else seconds):
                connection = await self._pool.acquire()
                try:
                    yield connection
                except (asyncio.CancelledError, asyncpg.InternalClientError):
                    # The connection is abandoned with its statement. A cancel request would wait for a frozen
                    # server, and a driver whose connection broke in mid-statement cannot resynchronise.
                    connection.terminate()
                    raise
                finally:
                    await self._pool.release(connection)
        except asyncpg.DataError:
            raise  # a defect: a value fits no column, although the driver counts it among lost connections
        except (TimeoutError, *_LOST) as error:
            raise DatabaseUnavailable(f"database: {type(error).__name__}") from error

    @asynccontextmanager
    async def transaction(self, seconds: float | None = None) -> AsyncIterator[Connection]:
        """Lend a connection inside a transaction that commits at the end.

        Raises:
            DatabaseUnavailable: As `connection()` does. After a connection lost at the commit, the outcome is unknown.
        """
        async with self.connection(seconds) as connection:
            await connection.execute("BEGIN")
            try:
                yield connection
            except asyncio.CancelledError:
                raise  # the connection is abandoned: a ROLLBACK would wait for a server that does not answer
            except BaseException:
                try:
                    async with asyncio.timeout(self.timeout_seconds):
                        await connection.execute("ROLLBACK")
                except (TimeoutError, *_LOST):
                    # Closing the connection ends the transaction. The original error is the one to report.
                    with suppress(asyncpg.InterfaceError):
                        connection.terminate()
                raise
            await connection.execute("COMMIT")

    async def fetchrow(self, query: str, *values: Any, seconds: float | None = None) -> asyncpg.Record | None:
        """Return the first row of `query`; raise as `connection()` does."""
        async with self.connection(seconds) as connection:
            return await connection.fetchrow(query, *values)

    async def fetch(self, query: str, *values: Any, seconds: float | None = None) -> list[asyncpg.Record]:
        """Return all rows of `query`; raise as `connection()` does."""
        async with self.connection(seconds) as connection:
            return list(await connection.fetch(query, *values))

    async def check_schema(self) -> None:
        """Read one row of `schema_migrations`; raise as `connection()` does if the database has no schema."""
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

"""A proxy before PostgreSQL whose connections tests can break at a chosen point."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import Enum, auto
from pathlib import Path


class Fault(Enum):
    NONE = auto()
    REFUSES = auto()  # refuses new connections and breaks open ones
    LOSES_REQUESTS = auto()  # breaks the connection before a request arrives
    LOSES_ANSWERS = auto()  # breaks the connection after the request and before its response
    SWALLOWS = auto()  # drops requests silently


class Line:
    def __init__(self, folder: Path, socket: str) -> None:
        self.folder = folder
        self.fault = Fault.NONE
        self._socket = socket
        self._calls: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Line"]:
        server = await asyncio.start_unix_server(self._call, self.folder / ".s.PGSQL.5432")
        try:
            yield self
        finally:
            server.close()
            self.cut()

    def cut(self) -> None:
        for appender in tuple(self._calls):
            appender.transport.abort()

    async def _call(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        if self.fault is Fault.REFUSES:
            client_out.transport.abort()
            return
        server_in, server_out = await asyncio.open_unix_connection(self._socket)
        calls = {client_out, server_out}
        self._calls |= calls

        async def to_server(octets: bytes) -> None:
            if self.fault is Fault.LOSES_REQUESTS:
                raise ConnectionAbortedError
            if self.fault is not Fault.SWALLOWS:
                server_out.write(octets)

        async def to_client(octets: bytes) -> None:
            if self.fault is Fault.LOSES_ANSWERS:
                raise ConnectionAbortedError
            client_out.write(octets)

        done, pending = await asyncio.wait(
            [asyncio.create_task(_carry(client_in, to_server)), asyncio.create_task(_carry(server_in, to_client))],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in pending:
            task.cancel()
        await asyncio.gather(*done, *pending, return_exceptions=True)
        for appender in calls:
            appender.transport.abort()
        self._calls -= calls


async def _carry(source: asyncio.StreamReader, on: Callable[[bytes], Awaitable[None]]) -> None:
    while octets := await source.read(65536):
        await on(octets)

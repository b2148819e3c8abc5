"""A cheap receiver of webhooks: it never answers `/hang…`, answers `/bad…` with 500 and all other paths with 204.

`python -m bench.receiver` prints its URL. `GET /stats` returns the path, arrival and recording of each message, both
times in seconds since 1970. `GET /sample` returns one body. `GET /clear` deletes all messages.
"""

import asyncio
import time
from datetime import datetime
from typing import Any

import msgspec
import uvloop

_ANSWERS = {
    b"/hang": b"",
    b"/bad": b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n",
    b"": b"HTTP/1.1 204 No Content\r\n\r\n",
}

came: list[tuple[bytes, float, bytes]] = []


class Receiver(asyncio.Protocol):
    """One connection; requests come one after the other."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_end = self._received.find(b"\r\n\r\n")
        if head_end < 0:
            return
        lower = self._received[:head_end].lower()
        at = lower.find(b"content-length: ")
        length = 0 if at < 0 else int(lower[at + 16 :].split(b"\r", 1)[0])
        if len(self._received) < head_end + 4 + length:
            return
        path, body = self._received.split(b" ", 2)[1], self._received[head_end + 4 : head_end + 4 + length]
        self._received = b""
        if path in {b"/stats", b"/sample", b"/clear"}:
            answer = {b"/stats": stats, b"/sample": sample, b"/clear": clear}[path]()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
            return
        came.append((path, time.time(), body))
        self._transport.write(next(said for beginning, said in _ANSWERS.items() if path.startswith(beginning)))


def stats() -> bytes:
    return msgspec.json.encode([(path.decode(), at, _recorded(body)) for path, at, body in came])


def _recorded(body: bytes) -> float:
    return datetime.fromisoformat(msgspec.json.decode(body)["timestamp"]).timestamp()


def sample() -> bytes:
    return came[0][2]


def clear() -> bytes:
    came.clear()
    return b"{}"


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Receiver, "127.0.0.1", 0, backlog=4096)
    print(f"receiving http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())

"""A cheap HTTP/1.1 load generator: keep-alive connections that send prepared requests, one at a time.

`python -m bench.load` reads {"url", "method", "path", "headers", "body", "connections", "seconds"} from standard
input and prints {"rate", "errors", "p50_ms", "p99_ms"}. Given a list of paths, each connection takes them in turn.
With "see" it declares incidents and reads the list until it shows them.
"""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

import uvloop


class Connection(asyncio.Protocol):
    """Send the next request when a response is complete, until the end."""

    def __init__(
        self, requests: Iterator[bytes], end: float, latencies: list[float], done: "asyncio.Future[int]"
    ) -> None:
        self._requests = requests
        self._end = end
        self._latencies = latencies
        self._done = done
        self._errors = 0
        self._received = b""
        self._needed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._send()

    def _send(self) -> None:
        self._received, self._needed = b"", 0
        self._sent_at = time.perf_counter()
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._needed:
            head_end = self._received.find(b"\r\n\r\n")
            if head_end < 0:
                return
            at = self._received.index(b"Content-Length: ") + 16
            self._needed = head_end + 4 + int(self._received[at : self._received.index(b"\r", at)])
        if len(self._received) < self._needed:
            return
        now = time.perf_counter()
        self._latencies.append(now - self._sent_at)
        self._errors += self._received[9:10] != b"2"
        if now < self._end:
            self._send()
        else:
            self._transport.close()
            self._done.set_result(self._errors)

    def connection_lost(self, _: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(self._errors + 1)


async def generate(order: dict[str, Any]) -> dict[str, float]:
    where = urlsplit(order["url"])
    body = order.get("body", "").encode()
    headers = {"Host": where.netloc, **order.get("headers", {})}
    if body:
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    paths = [order["path"]] if isinstance(order["path"], str) else order["path"]
    requests = [f"{order['method']} {path} HTTP/1.1\r\n{head}\r\n".encode() + body for path in paths]
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    began = time.perf_counter()
    end = began + order["seconds"]
    waiting = []
    for _ in range(order["connections"]):
        done: asyncio.Future[int] = loop.create_future()
        connect = partial(Connection, cycle(requests), end, latencies, done)
        await loop.create_connection(connect, where.hostname, where.port)
        waiting.append(done)
    errors = sum(await asyncio.gather(*waiting))
    took = time.perf_counter() - began
    latencies.sort()
    return {
        "rate": len(latencies) / took,
        "errors": errors,
        "p50_ms": 1000 * latencies[len(latencies) // 2],
        "p99_ms": 1000 * latencies[len(latencies) * 99 // 100],
    }


class Answers(asyncio.Protocol):
    """Hold a keep-alive connection for requests that depend on earlier responses."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    async def ask(self, request: bytes) -> bytes:
        """Send a request and return the response, head and body."""
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._received = b""
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if end and len(body) >= int((head + b"\r").split(b"Content-Length: ")[1].split(b"\r")[0]):
            self._answer.set_result(self._received)

    def connection_lost(self, _: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_exception(ConnectionError("the server has closed the connection"))


async def see(order: dict[str, Any]) -> dict[str, float]:
    """Declare incidents in turn on each connection; measure the time until the list shows each."""
    where = urlsplit(order["url"])
    headers = f"Host: {where.netloc}\r\nAuthorization: Bearer {order['token']}\r\n"
    look = f"GET /api/v1/incidents?limit=20 HTTP/1.1\r\n{headers}\r\n".encode()
    took: list[float] = []
    end = time.perf_counter() + order["seconds"]

    async def client(number: int) -> None:
        _, answers = await asyncio.get_running_loop().create_connection(Answers, where.hostname, where.port)
        for turn in itertools.count():
            mark = f"seen {number} {turn} {order['seconds']}"
            body = json.dumps({"title": mark})
            began = time.perf_counter()
            if began >= end:
                return
            post = f"POST /api/v1/incidents HTTP/1.1\r\n{headers}Content-Type: application/json\r\n"
            answer = await answers.ask(f"{post}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            if b" 201 " not in answer[:20]:
                raise RuntimeError(answer.decode())
            while mark.encode() not in await answers.ask(look):
                pass
            took.append(time.perf_counter() - began)
            # A pause: the figure is the delay, not the throughput.
            await asyncio.sleep(order["pause"])

    await asyncio.gather(*(client(number) for number in range(order["connections"])))
    took.sort()
    return {"count": len(took), "p50_ms": 1000 * took[len(took) // 2], "p99_ms": 1000 * took[len(took) * 99 // 100]}


def visible(url: str, token: str, connections: int, seconds: float) -> dict[str, float]:
    """Measure the time from an append until a list shows it, in a separate process."""
    order = {"see": True, "url": url, "token": token, "connections": connections, "seconds": seconds, "pause": 0.01}
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"], input=json.dumps(order), check=True, capture_output=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def load(
    url: str, method: str, path: str | Sequence[str], connections: int, seconds: float, **more: Any
) -> dict[str, float]:
    """Generate load in a separate process.

    Raises:
        RuntimeError: A response was no success.
    """
    order = {"url": url, "method": method, "path": path, "connections": connections, "seconds": seconds, **more}
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"], input=json.dumps(order), check=True, capture_output=True, text=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    if result["errors"]:
        raise RuntimeError(f"{method} {path}: {result['errors']} requests failed")
    return result


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    print(json.dumps(uvloop.run(see(wanted) if "see" in wanted else generate(wanted))))

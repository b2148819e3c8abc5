"""The least that could send: a bare aiohttp client that posts a body again and again.

`python -m bench.poster URL COUNT AT_ONCE` reads the body from standard input and prints posts a second.
"""

import asyncio
import sys
import time

import aiohttp
import uvloop


async def post(url: str, count: int, at_once: int) -> float:
    body = sys.stdin.buffer.read()
    left = iter(range(count))
    headers = {"Content-Type": "application/json"}

    async def some(session: aiohttp.ClientSession, number: int) -> None:
        for _ in left:
            async with session.post(f"{url}/{number % 50}", data=body, headers=headers) as response:
                await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(some(session, number) for number in range(at_once)))
        return count / (time.perf_counter() - began)


if __name__ == "__main__":
    print(uvloop.run(post(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))

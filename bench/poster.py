"""The peer of our sender: a bare aiohttp client that posts one body repeatedly.

`python -m bench.poster URL COUNT CONNECTIONS` reads the body from standard input and prints posts a second.
"""

import asyncio
import sys
import time

import aiohttp
import uvloop


async def post(url: str, count: int, connections: int) -> float:
    body = sys.stdin.buffer.read()
    left = iter(range(count))
    headers = {"Content-Type": "application/json"}

    async def some(session: aiohttp.ClientSession, number: int) -> None:
        for _ in left:
            async with session.post(f"{url}/{number % 50}", data=body, headers=headers) as response:
                await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(some(session, number) for number in range(connections)))
        return count / (time.perf_counter() - began)


if __name__ == "__main__":
    print(uvloop.run(post(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))

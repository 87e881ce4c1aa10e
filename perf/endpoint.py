"""What a call through the endpoint engine costs in CPU time, beside the same request in a bare aiohttp loop.

    python perf/endpoint.py [--in-flight 64 512 2000] [--calls 4000] [--rounds 3]

A server in another process answers every request after a short wait. Each side makes the same requests, with the given
number of them in flight; the sides take turns, and the figure is the median of the rounds: user and system seconds of
the client's process per call, and connections that the server counted over calls in flight. The engine does everything
that it does in a run: limits, budget, retries, reading the reply and its usage. The call log is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import aiohttp

from ray_pipeline.engines.base import Message, Sampling
from ray_pipeline.engines.endpoint_settings import EndpointSettings, OpenAISpec
from ray_pipeline.engines.openai import OpenAIEngine

SIDES = ("raw aiohttp", "engine: aiohttp", "engine: httpx")
REPLY = json.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": json.dumps({"reason": "well argued " * 20, "score": 8})},
            }
        ],
        "usage": {"prompt_tokens": 900, "completion_tokens": 60, "total_tokens": 960},
    }
).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
SAMPLING = Sampling(max_tokens=512)


class Server(asyncio.Protocol):
    """Answers each request of a keep-alive connection after a wait; `reply` gives the body for that of the request."""

    def __init__(self, wait: float, connections: Synchronized[int], reply: Callable[[bytes], bytes]) -> None:
        self._wait, self._connections, self._reply = wait, connections, reply
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.value += 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:end]).lower()
            whole = end + 4 + int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            if len(self._received) < whole:
                return
            reply = self._reply(bytes(self._received[end + 4 : whole]))
            del self._received[:whole]
            response = HEAD % len(reply) + reply
            asyncio.get_running_loop().call_later(self._wait, self._transport.write, response)


def same(body: bytes) -> bytes:
    return REPLY


def serve(
    port: Connection, wait: float, connections: Synchronized[int], reply: Callable[[bytes], bytes] = same
) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Server(wait, connections, reply), "127.0.0.1", 0, backlog=4096)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(work())


def prompt(number: int) -> list[Message]:
    """A judge's prompt of about 3,600 characters."""
    return [
        {"role": "system", "content": "You are a careful judge. " * 20},
        {"role": "user", "content": f"Response {number}: " + "it follows from the second premise that " * 80},
    ]


async def raw(url: str, calls: int, in_flight: int) -> None:
    """The requests that the engine makes, in a bare loop."""
    slots = asyncio.Semaphore(in_flight)
    connector = aiohttp.TCPConnector(limit=in_flight)
    async with aiohttp.ClientSession(connector=connector, headers={"Authorization": "Bearer x"}) as session:

        async def call(number: int) -> Any:
            body = {"model": "judge", "messages": prompt(number), "temperature": 0.0, "top_p": 1.0, "max_tokens": 512}
            async with slots, session.post(f"{url}/chat/completions", json=body) as response:
                return (await response.json())["choices"][0]["message"]["content"]

        await asyncio.gather(*(call(number) for number in range(calls)))


def through_engine(transport: str) -> Callable[[str, int, int], Awaitable[None]]:
    async def work(url: str, calls: int, in_flight: int) -> None:
        settings = {"base_url": url, "api_key_env": None, "concurrency": in_flight, "transport": transport}
        engine = OpenAIEngine(OpenAISpec("judge", EndpointSettings.model_validate(settings), canary=False))
        engine._ready = True  # the server has no list of models
        engine._connection.open()
        await asyncio.gather(*(engine.chat(prompt(number), SAMPLING) for number in range(calls)))
        await engine.close()

    return work


WORK = dict(zip(SIDES, (raw, through_engine("aiohttp"), through_engine("httpx")), strict=True))


def measure(url: str, side: str, calls: int, in_flight: int, result: Connection) -> None:
    async def work() -> float:
        await WORK[side](url, min(in_flight, 64), min(in_flight, 64))  # imports and first use are not counted
        begin = time.process_time()
        await WORK[side](url, calls, in_flight)
        return time.process_time() - begin

    result.send(asyncio.run(work()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 512, 2000])
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wait", type=float, default=0.05, help="seconds until the server answers")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    connections = context.Value("l", 0)
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, given.wait, connections), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    print(f"{'in flight':>9}  {'client':<16} {'ms a call':>9} {'over raw':>8} {'connections':>11}")
    for in_flight in given.in_flight:
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        opened: dict[str, list[int]] = {side: [] for side in SIDES}
        for _ in range(given.rounds):
            for side in SIDES:
                before = connections.value + min(in_flight, 64)
                client = context.Process(target=measure, args=(url, side, given.calls, in_flight, there))
                client.start()
                seconds[side].append(here.recv() / given.calls)
                client.join()
                opened[side].append(connections.value - before)
        least = statistics.median(seconds[SIDES[0]])
        for side in SIDES:
            cost = statistics.median(seconds[side])
            most = max(opened[side]) / in_flight
            print(f"{in_flight:>9}  {side:<16} {1000 * cost:>9.2f} {cost / least:>8.1f} {most:>10.2f}×", flush=True)
    server.terminate()
    server.join()


if __name__ == "__main__":
    main()

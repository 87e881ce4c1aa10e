"""Age of the oldest reply that is not in the call log yet: what a killed process loses, with many shards on one engine
and a store that takes its time over every write.

    python perf/call_log_age.py [--shards 64] [--write-seconds 0.1] [--seconds 30]

The engine is a stand-in that answers after 0.5 to 1.5 seconds and whose spending is counted as an endpoint's. Parts and
spending are written as in a run, to a local folder where every file takes the given seconds longer. Prints one table;
the age is looked up every 10 ms, over all shards. A machine without CPU time to spare adds its own delays.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_pipeline.engines.account import Account
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.log_storage import LogStorage
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.store.calls import CallWriter
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import prompt_id

CONCURRENCY = 256
LATENCY = (0.5, 1.5)


class Replies:
    """An engine that answers after about a second, and the times at which its replies came and were written."""

    def __init__(self) -> None:
        self.came: dict[str, float] = {}
        self.written: dict[str, float] = {}
        self._account = Account("https://localhost/v1", "stand-in")

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"engine": "stand-in"}

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        await asyncio.sleep(random.uniform(*LATENCY))
        reply = Completion("word " * 200, "stop", 400, 200, 0)
        self._account.own.count(reply)
        self.came[messages[0]["content"]] = time.monotonic()
        return reply

    def cost(self, completion: Completion) -> float:
        return 0.0

    async def settle(self, root: Folder) -> None:
        await self._account.settle(root)

    def oldest(self) -> np.ndarray:
        """Age of the oldest unwritten reply every 10 ms; 0 where all are written."""
        came = np.array(sorted(self.came.items(), key=lambda item: item[1]), dtype=object)
        times = came[:, 1].astype(float)
        written = np.array([self.written[text] for text in came[:, 0]])
        moments = np.arange(times[0], times[-1], 0.01)
        unwritten = (times[None, :] <= moments[:, None]) & (written[None, :] > moments[:, None])
        first = np.where(unwritten, times[None, :], np.inf).min(axis=1)
        ages: np.ndarray = np.maximum(moments - first, 0.0)
        return ages


def make_slow(engine: Replies, seconds: float) -> None:
    """Every file takes longer to write, and what is written is noted."""
    write, flush = Folder._write_bytes, CallWriter.flush

    def slow_write(folder: Folder, name: str, data: bytes) -> None:
        time.sleep(seconds)
        write(folder, name, data)

    def noted(writer: CallWriter, rows: list[dict[str, Any]]) -> None:
        flush(writer, rows)
        now = time.monotonic()
        engine.written |= {row["messages"][0]["content"]: now for row in rows}

    setattr(Folder, "_write_bytes", slow_write)  # noqa: B010
    setattr(CallWriter, "flush", noted)  # noqa: B010


async def ask(engine: Replies, root: Folder, shards: int, seconds: float) -> None:
    limit, storage, end = asyncio.Semaphore(CONCURRENCY), LogStorage(engine, root, shards), time.monotonic() + seconds

    async def one(log: LoggedEngine, name: str) -> None:
        number = 0
        while time.monotonic() < end:
            messages = [{"role": "user", "content": f"{name} {number}"}]
            await log.bound(prompt_id(messages), "judge").chat(messages, Sampling())
            number += 1

    async def shard(number: int) -> None:
        async with LoggedEngine(engine, root, number, shards, limit=limit, storage=storage) as log:
            await asyncio.gather(*(one(log, f"{number} {n}") for n in range(max(1, CONCURRENCY // shards))))

    await asyncio.gather(*(shard(number) for number in range(shards)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--write-seconds", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    engine = Replies()
    make_slow(engine, args.write_seconds)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(ask(engine, Folder(folder), args.shards, args.seconds))
    ages = engine.oldest()
    middle, late = np.quantile(ages, [0.5, 0.99])
    print("| shards in flight | seconds a write | replies | oldest unwritten reply, p50 | p99 | max |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {args.shards} | {args.write_seconds:g} | {len(engine.came):,} | {middle:.2f} s | {late:.2f} s "
        f"| {ages.max():.2f} s |"
    )


if __name__ == "__main__":
    main()

"""The event loop of the public API.

Engines are bound to the loop that they were started on, and a notebook already has a running loop, so everything that
awaits an engine runs on one loop in a separate thread. The functions of the API are synchronous and wait for it, in
scripts and notebooks alike.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="quorum-api", daemon=True).start()
    return loop


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the API's loop and return its result; an interrupt cancels it.

    Raises:
        RuntimeError: called from a coroutine on that loop, which would deadlock.
    """
    loop = _loop()
    try:
        inside = asyncio.get_running_loop() is loop
    except RuntimeError:
        inside = False
    if inside:
        work.close()
        raise RuntimeError("an engine's chat() must not call ray_pipeline's functions; await its own calls instead")
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def gather(work: Sequence[Callable[[], Coroutine[Any, Any, T]]], concurrency: int) -> list[T]:
    """Results in order, at most `concurrency` coroutines at a time; the first error cancels the rest and is raised."""
    slots = asyncio.Semaphore(concurrency)

    async def one(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with slots:
            return await make()

    tasks = [asyncio.create_task(one(make)) for make in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()

"""`quorum` inside the tests' own process: no cluster, and real engines that live as long as the tests.

For tests that are not about Ray or about killed processes; those run the command as `tests.dags.conftest.Quorum` does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_spec import VllmSpec

_loop: asyncio.AbstractEventLoop | None = None
#: The least recently used first.
_started: dict[str, VllmEngine] = {}
#: Engines that are kept at once; each takes about 1 GB.
_LIVING = 3


class SharedEngine:
    """A vLLM engine that outlives the stage which asked for it, and serves every stage with the same model.

    The engine lives on an event loop of its own; `asked` collects the models that were started or asked anything.
    """

    notes: Sequence[str] = ()
    start_seconds = 0.0
    asked: ClassVar[set[str]] = set()
    open: ClassVar[list[SharedEngine]] = []

    def __init__(self, spec: VllmSpec, adapters: Sequence[str] = ()) -> None:
        self._spec, self._adapters = spec, tuple(adapters)
        self.open.append(self)

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        return VllmEngine(self._spec).identity

    def serving(self, adapter: str | None) -> Adapted:
        return Adapted(self, VllmEngine(dataclasses.replace(self._spec, adapter=adapter)).identity, adapter)

    async def start(self) -> None:
        await self.on_engine(lambda engine: engine.start())

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        return await self.on_engine(lambda engine: engine.chat(messages, sampling))

    async def close(self) -> None:
        """Leave the engine to the next stage."""
        self.open.remove(self)

    async def on_engine(self, work: Callable[[VllmEngine], Coroutine[Any, Any, Any]]) -> Any:
        self.asked.add(self._spec.model)
        key = repr((dataclasses.replace(self._spec, canary=False), self._adapters))
        engine = _started[key] = _started.pop(key, None) or VllmEngine(self._spec, adapters=self._adapters)
        while len(_started) > _LIVING:
            await _there(_started.pop(next(iter(_started))).close())
        return await _there(work(engine))


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A shared engine with one of its adapters, as `VllmEngine.serving` gives it."""

    engine: SharedEngine
    identity: Mapping[str, Any]
    adapter: str | None

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        return await self.engine.on_engine(lambda engine: engine.serving(self.adapter).chat(messages, sampling))


async def _there(work: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _thread()))


def _thread() -> asyncio.AbstractEventLoop:
    global _loop
    if _loop is None:
        _loop = asyncio.new_event_loop()
        threading.Thread(target=_loop.run_forever, daemon=True).start()
    return _loop


def close_engines() -> None:
    """End all engines, at the end of the tests."""
    while _started:
        _, engine = _started.popitem()
        asyncio.run_coroutine_threadsafe(engine.close(), _thread()).result(60)


@dataclasses.dataclass(frozen=True)
class Here:
    """A command that has ended: what it printed, and the models that were asked anything."""

    output: str
    engines: frozenset[str]


def here(*arguments: str, expect: int = 0) -> Here:
    """Run a `quorum` command to its end in this process; it must have closed every engine that it opened."""
    SharedEngine.asked.clear()
    more = ["--executor", "inprocess"] if arguments[0] == "run" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CONFIGURE_LOGGING", "0")  # it would keep the stream that the runner closes
        patch.setattr("ray_pipeline.engines.models.VllmEngine", SharedEngine)
        ended = CliRunner().invoke(app, [*arguments, *more])
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    assert ended.exit_code == expect, f"exit code {ended.exit_code}\n{ended.output}"
    assert SharedEngine.open == []
    return Here(ended.output, frozenset(SharedEngine.asked))

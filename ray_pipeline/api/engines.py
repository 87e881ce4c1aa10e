"""Engines for scripts and notebooks: opened in this process; closed by `close()`, by `with` or at exit."""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, cast

from pydantic import ValidationError

from ray_pipeline.api.loop import wait_for
from ray_pipeline.engines.base import ChatEngine, Completion, EngineStartError, Message, Sampling
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.pocket import model_path
from ray_pipeline.store.files import Folder
from ray_pipeline.store.locations import normalise_location


class _Startable(ChatEngine, Protocol):
    async def start(self) -> None: ...

    async def close(self) -> None: ...


class Engine:
    """An engine that has been started; itself a `ChatEngine`. Use it in a `with` block, or call `close()`.

    Attributes:
        templates: the built-in prompt templates that suit its model: `default` or `pocket`.
    """

    def __init__(self, engine: _Startable, shown: str, templates: str, log: LoggedEngine | None) -> None:
        self._engine, self._shown, self._log = engine, shown, log
        self.templates = templates
        self._closed = False
        atexit.register(self.close)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `ChatEngine.identity`."""
        return self._engine.identity

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """See `ChatEngine.chat`. Must be awaited on the engine's own loop, as the API's functions do."""
        return await self._engine.chat(messages, sampling)

    def bound(self, prompt_id: str, role: str) -> ChatEngine:
        """The engine for the calls of one prompt in one role, through the call log if there is one."""
        return self._engine if self._log is None else self._log.bound(prompt_id, role)

    def close(self) -> None:
        """Stop the engine and its processes, and flush the call log. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        wait_for(self._end())

    async def _end(self) -> None:
        try:
            if self._log is not None:
                await self._log.__aexit__(None, None, None)
        finally:
            await self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<engine of {self._shown}{', closed' if self._closed else ''}>"


def open_engine(model: str, *, base_url: str | None = None, calls: str | None = None, **settings: Any) -> Engine:
    """Start an engine in this process and check that it responds.

    Args:
        model: folder, model of the Hugging Face Hub, or `pocket:NAME` (policy, judge, reviewer, generator), served by
            vLLM here; with `base_url` the name of a model at an endpoint.
        base_url: address of an OpenAI-compatible endpoint, including the version. The key is read from the environment
            variable OPENAI_API_KEY, or from the one set by `endpoint={"api_key_env": …}` (None: no key).
        calls: folder or URI of a call log: stored calls are not repeated, and new ones are added.
        settings: further keys of a block under `models`, such as `dtype`, `max_model_len`, `adapter`, `args`, and for
            an endpoint `endpoint={"concurrency": 16, …}`.

    Raises:
        EngineStartError: the model does not start; the message has the remedy.
        ValueError: a setting is unknown or does not fit the engine.
    """
    pocket = model.startswith("pocket:") and base_url is None
    values: dict[str, Any] = {"model": model_path(model) if pocket else model, **settings}
    if base_url is not None:
        values |= {"engine": "openai", "endpoint": {"base_url": base_url, **settings.get("endpoint", {})}}
    if pocket:
        values = {"dtype": "float32", **values}
    try:
        given = ModelSettings.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"open_engine({model!r}): {problems}") from error
    given.check()
    return wait_for(_start(given, model, "pocket" if pocket else "default", calls))


async def _start(settings: ModelSettings, shown: str, templates: str, calls: str | None) -> Engine:
    engine = cast(_Startable, settings.factory()())  # both engines have these two methods beyond the protocol
    try:
        with _without_script():
            await engine.start()
        log = None if calls is None else LoggedEngine(engine, Folder(normalise_location(calls)), 0, 1)
        if log is not None:
            await log.__aenter__()
    except BaseException:
        await engine.close()
        raise
    return Engine(engine, shown, templates, log)


@contextlib.contextmanager
def _without_script() -> Iterator[None]:
    """Start processes that do not run the user's script again.

    `multiprocessing` imports the main script in every spawned process, so a script that opens an engine without
    `if __name__ == "__main__"` would open another one there. An engine's process does not need the script.
    """
    main: Any = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    try:
        main.__spec__ = None
        if "__file__" in hidden:
            del main.__file__
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def bound(engine: ChatEngine, prompt_id: str, role: str) -> ChatEngine:
    """Any engine for the calls of one prompt in one role; an engine without a call log is returned unchanged."""
    return engine.bound(prompt_id, role) if isinstance(engine, Engine) else engine


def templates_of(engine: ChatEngine, given: str | None) -> str:
    """The prompt templates to use: the caller's choice, else those that suit the engine's model."""
    return given or (engine.templates if isinstance(engine, Engine) else "default")


__all__ = ["Engine", "EngineStartError", "bound", "open_engine", "templates_of"]

"""vLLM in process: one model behind ``ChatEngine``, on GPUs or on the CPU build.

The engine is vLLM's ``AsyncLLM``, which batches all waiting chats. Its core runs in child processes, with these
consequences:

- **Scripts** need ``if __name__ == "__main__":`` (children import the main module again).
- **A dead core** makes every chat raise :class:`EngineDead`, including those in progress. An actor must then end itself
  (``os._exit(1)``): Ray Data starts another one and repeats its tasks. Raising out of the task would fail the dataset.
- **No process outlives its owner** (see ``vllm_processes``).

One engine can serve several LoRA adapters of its model, and the model alone: see :meth:`VllmEngine.serving`. vLLM is
imported inside functions, because the import takes 6 to 13 s and reading a configuration does not need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.config.messages import installing
from ray_pipeline.engines.account import Used
from ray_pipeline.engines.base import (
    REWARD,
    CallFailed,
    ChatEngine,
    Completion,
    EngineDead,
    EngineError,
    EngineStartError,
    Grammar,
    Message,
    PromptTooLong,
    Sampling,
    causes,
    rejected,
)
from ray_pipeline.engines.chat_template import QUESTION, REPLY, ChatTemplate
from ray_pipeline.engines.core_server import CoreServer, is_cpu_build
from ray_pipeline.engines.engine_meters import stat_loggers
from ray_pipeline.engines.identity import ModelNotFound, model_identity, text_digest
from ray_pipeline.engines.imports import heavy_imports
from ray_pipeline.engines.lifetime import Lifetime
from ray_pipeline.engines.refusals import Refusals
from ray_pipeline.engines.thoughts import answered
from ray_pipeline.engines.vllm_adapters import LoadedAdapters
from ray_pipeline.engines.vllm_arguments import engine_args, max_sequences
from ray_pipeline.engines.vllm_processes import Reaper, child_environment, end_processes, prepare_environment
from ray_pipeline.engines.vllm_replies import pooling_params, read_completion, read_reward, sampling_params
from ray_pipeline.engines.vllm_spec import SPEED_ONLY, VllmSpec, validate_engine_args
from ray_pipeline.engines.vllm_template import load_template, own_template

logger = logging.getLogger("quorum.vllm")

_STARTS = 2  # attempts to start the engine
_WORDS, _DIGIT = ("yes", "no"), {"type": "integer", "minimum": 1, "maximum": 9}  # asked for at the start
_BEGIN_SECONDS = 0.1  # in which the other calls of a shard begin
_REMEDY = (
    "Change what these words name: the sampling's parameters, or the template (set the model's key chat_template to a "
    "Jinja file); then rerun the same command to resume"
)


class VllmEngine:
    """A :class:`~ray_pipeline.engines.base.ChatEngine` over vLLM.

    The constructor loads nothing; :meth:`start`, or the first :meth:`chat`, loads the model. The engine belongs to the
    event loop that it was started on, which need not be the main thread's.

    Args:
        spec: the model and how it is served.
        adapters: LoRA adapters that `serving` can choose from; then `spec.adapter` is None.
        model: the model's identity if it has been computed already (see ``identity.model_identity``), so that not every
            actor has to hash a large model.

    Attributes:
        start_seconds: duration of the start.
        notes: messages for the user, each once: the engine's log is not on the terminal.
    """

    def __init__(self, spec: VllmSpec, *, adapters: Sequence[str] = (), model: Mapping[str, str] | None = None) -> None:
        self.spec, self._adapters = spec, tuple(dict.fromkeys(adapters))
        self.start_seconds = 0.0
        self.notes: list[str] = []
        self.keeps_thoughts = spec.thoughts == "keep"
        self._model = None if model is None else dict(model)
        self._lifetime = Lifetime()
        self._refusals = Refusals(repr(spec.model), _REMEDY, self._lifetime)
        self._engine: Any = None  # vllm.v1.engine.async_llm.AsyncLLM
        self._template: ChatTemplate | None = None
        self._loaded = LoadedAdapters()
        self._limit, self._rewards = 0, False
        self._padding: int | None = None
        self._reaper: Reaper | None = None
        self._server: CoreServer | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._ready = False  # started and checked
        self._ids = itertools.count()
        self._used = Used()

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Identity of the model and the settings that change replies. The engine need not be started: a rerun that
        finds every call in the log never loads the model.

        Raises:
            EngineStartError: the model, the adapter or the chat template does not exist.
        """
        return self._identity_of(self.spec)

    def _identity_of(self, spec: VllmSpec) -> Mapping[str, Any]:
        try:
            known = self._model if spec is self.spec else None
            model = known or model_identity(spec.model, spec.revision, spec.adapter)
            other = {name: value for name, value in sorted(spec.args.items()) if name not in SPEED_ONLY}
            if "tokenizer" in other:
                other["tokenizer"] = model_identity(str(other["tokenizer"]))["model"]
        except ModelNotFound as error:
            raise EngineStartError(str(error)) from error
        template = own_template(spec)
        return {
            "engine": "vllm",
            **model,
            "dtype": spec.dtype,
            "quantization": spec.quantization,
            "chat_template": None if template is None else text_digest(template),
            "chat_template_args": dict(spec.chat_template_args),
            # Through JSON, so that an identity read back from a log compares equal.
            "args": json.loads(json.dumps(other, sort_keys=True, default=str)),
        }

    @property
    def useful_concurrency(self) -> int:
        """Calls in flight with which the batch stays full: one batch in progress and one waiting."""
        return 2 * max_sequences(self.spec, cpu=is_cpu_build())

    @property
    def loading(self) -> bool:
        """Whether the model is being loaded."""
        return self._lifetime.is_starting

    async def start(self) -> None:
        """Load the model and check that it answers; only once, however often it is called.

        Raises:
            EngineStartError: the engine cannot start; the message says what to change. Later calls raise it again.
        """
        await self._lifetime.start(self._start)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """Draw one reply; see :class:`~ray_pipeline.engines.base.ChatEngine` for what is raised.

        Cancelling the call aborts the request in the engine.
        """
        return await self._chat(messages, sampling, self.spec.adapter)

    def serving(self, adapter: str | None) -> ChatEngine:
        """The same model with one of `adapters`, or with none, in the same memory: calls are batched together.

        An adapter is loaded before its first call, which raises EngineStartError where that is not possible.
        """
        return _Adapted(self, adapter)

    async def _chat(self, messages: Sequence[Message], sampling: Sampling, adapter: str | None) -> Completion:
        self._lifetime.check_open()
        if self._engine is None or not self._ready:
            await self.start()
        lora = await self._loaded.load(self._engine, adapter)
        with self._refusals.watch(messages, sampling):
            completion = await self._ask(messages, sampling, lora)
        self._used.count(completion)
        return completion

    def stats(self) -> Used:
        """Totals so far (a copy); without failed calls and the short calls at the start."""
        return Used(**vars(self._used))

    async def close(self) -> None:
        """End the engine and all its processes. Chats in progress raise EngineDead. May be called twice."""
        self._lifetime.closed = True
        if (starting := self._lifetime.starting) is not None and not starting.done():
            with contextlib.suppress(BaseException):  # a start cannot be stopped halfway, only undone
                await asyncio.shield(starting)
        if self._watchdog is not None:
            self._watchdog.cancel()
        await self._shut_down()

    # -- starting ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        begin = time.perf_counter()
        validate_engine_args(self.spec.args)
        for starts_left in reversed(range(_STARTS)):
            try:
                # Off the loop: loading takes seconds to minutes, while other shards of the actor read, write and
                # replay calls from the log.
                await asyncio.to_thread(self._load)
                await self._prove()
                break
            except BaseException as error:
                await self._shut_down()
                if isinstance(error, EngineStartError) or not isinstance(error, Exception):
                    raise
                # A core that was killed while it loaded, or found its memory still in use by one that was ending,
                # starts at the second attempt. vLLM does not report the cause, so a wrong setting is tried twice, too.
                if starts_left and not self._lifetime.closed and "core" in str(error):
                    logger.warning("vLLM did not start with %s (%s); retrying", self.spec.model, causes(error))
                    continue
                raise EngineStartError(f"vLLM did not start with {self.spec.model!r}: {causes(error)}") from error
        self._watchdog = asyncio.create_task(self._watch(), name="vllm-watchdog")
        self._ready = True
        self.start_seconds = time.perf_counter() - begin
        logger.info("vLLM serves %s after %.1f s", self.spec.model, self.start_seconds)

    def _load(self) -> None:
        identity = str(self.identity["model"])  # first, for a clear message if the model does not exist
        # The commit that the identity names, even if the branch has moved since.
        revision = identity.rsplit("@", 1)[1] if identity.startswith("hub:") else None
        prepare_environment()
        self._loaded, self._reaper = LoadedAdapters(), Reaper()
        with child_environment(self._reaper, cpu=is_cpu_build()):
            self._server = CoreServer()  # its imports run beside this process's
            self._template = load_template(self.spec, revision)
            self._load_core(self._server, revision)
        self._limit = int(self._engine.model_config.max_model_len)
        self._rewards = self._engine.model_config.runner_type == "pooling"  # by its architecture
        self._padding = self._engine.model_config.hf_text_config.pad_token_id

    def _load_core(self, server: CoreServer, revision: str | None) -> None:
        try:
            with heavy_imports():
                from vllm.engine.arg_utils import AsyncEngineArgs
                from vllm.platforms import current_platform
                from vllm.usage.usage_lib import UsageContext
                from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise EngineStartError(
                f"cannot import vLLM ({error}); install it with `{installing('gpu')}`, or without a GPU as the README "
                "says on the CPU build"
            ) from error
        args = engine_args(self.spec, revision, cpu=current_platform.is_cpu(), adapters=self._adapters)
        with server.starts_cores():
            loggers = None if args["disable_log_stats"] else stat_loggers()
            self._engine = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**args),
                # Batch work: the sizes of `vllm.LLM` where the user sets none (1,024 sequences and 16,384 tokens a step
                # on an H100 or H200). The context of AsyncLLM has no sizes of its own and gets 128 and 2,048.
                usage_context=UsageContext.LLM_CLASS,
                stat_loggers=loggers,
            )

    async def _prove(self) -> None:
        """Load the adapter, and check with short calls that the model answers (a chat model: in the form asked for)."""
        lora = await self._loaded.load(self._engine, self.spec.adapter)
        if not self.spec.canary:
            return
        question: list[Message] = [{"role": "user", "content": "Answer: yes, no or 1."}]
        calls: list[tuple[list[Message], Sampling, Sequence[str]]] = [
            (question, Sampling(max_tokens=16, grammar=Grammar.choice(_WORDS)), _WORDS),
            (question, Sampling(max_tokens=16, grammar=Grammar.json(_DIGIT)), tuple(map(str, range(1, 10)))),
        ]
        if self._rewards:
            calls = [([QUESTION, REPLY], REWARD, ())]
        for messages, sampling, allowed in calls:
            try:
                reply = await self._ask(messages, sampling, lora)
            except PromptTooLong as error:
                raise EngineStartError(f"even a short question does not fit {self.spec.model!r}: {error}") from error
            except (EngineError, EngineDead) as error:
                raise EngineStartError(f"the first call to {self.spec.model!r} failed: {error}") from error
            if allowed and (reply.text not in allowed or reply.finish_reason != "stop"):
                raise EngineStartError(
                    f"{self.spec.model!r} does not obey structured output: the reply must be one of "
                    f"{', '.join(allowed)}, and is {reply.text!r} ({reply.finish_reason}). Try another backend "
                    "(args: structured_outputs_config: {backend: guidance}), or set canary: false to judge without "
                    "structured output"
                )

    # -- answering ---------------------------------------------------------------------------------------------------

    async def _ask(self, messages: Sequence[Message], sampling: Sampling, lora: Any) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._lifetime.check_open()
        engine = self._engine
        if engine is None:
            raise EngineDead("the engine was closed")
        assert self._template is not None
        if self._rewards != (sampling == REWARD):
            what = "scores whole chats and writes no text" if self._rewards else "writes text and scores no chats"
            raise EngineStartError(
                f"{self.spec.model!r} {what}; judge.rewards needs models for sequence classification "
                "(train.method: reward), and all other keys need causal language models"
            )
        begin = time.perf_counter()
        try:
            prompt = await self._template.prompt(messages, whole=self._rewards)
        except Exception as error:  # templates raise their own errors: "roles must alternate", …
            await asyncio.sleep(_BEGIN_SECONDS)  # else the first rows would be refused before others could be answered
            raise rejected(f"the chat template rejected the messages: {causes(error)}") from error
        if not self._template.has_system and not self.notes and any(m["role"] == "system" for m in messages):
            self.notes.append(
                f"the chat template of {self.spec.model!r} has no system role; system text is put at the head of the "
                "user turn"
            )
            logger.warning("%s", self.notes[-1])
        if len(prompt) + sampling.max_tokens > self._limit:
            raise PromptTooLong(len(prompt), sampling.max_tokens, self._limit)
        while self._rewards and prompt[-1:] == [self._padding]:
            prompt.pop()  # transformers scores at the last token that is no padding, vLLM at the last one
        params = pooling_params() if self._rewards else sampling_params(sampling, self._template.end_token)
        last: Any = None
        try:
            async for output in (engine.encode if self._rewards else engine.generate)(
                # A prompt of this type is used unchanged and bypasses vLLM's tokenizer threads.
                {"type": "token", "prompt_token_ids": prompt},
                params,
                f"chat-{next(self._ids)}",
                lora_request=lora,
            ):
                last = output
        except EngineDeadError as error:
            raise EngineDead(f"the engine of {self.spec.model!r} has died; see its log") from error
        except Exception as error:
            if engine.errored or self._lifetime.closed:  # the error depends on what the call was doing at the time
                raise EngineDead(f"the engine of {self.spec.model!r} has died; see its log") from error
            raise (rejected if isinstance(error, ValueError) else CallFailed)(causes(error)) from error
        if self._rewards:
            return read_reward(last, len(prompt), time.perf_counter() - begin)
        # A grammar holds from the first token, so that there is no thought.
        inside = self._template.opens_thought and sampling.grammar is None
        reply = read_completion(last, len(prompt), time.perf_counter() - begin, inside)
        return answered(reply, self.keeps_thoughts)

    # -- ending ------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Fail the calls in progress when the core is dead, in case vLLM does not."""
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = self._engine
        while not engine.errored:
            await asyncio.sleep(1.0)
        await asyncio.sleep(1.0)  # usually vLLM fails them itself
        engine.output_processor.propagate_error(EngineDeadError())

    async def _shut_down(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            engine.output_processor.propagate_error(EngineDeadError())  # otherwise calls in progress never end
            if engine.output_handler is not None:
                engine.output_handler.cancel()  # otherwise it logs the end of the core as an error
        owner, self._reaper = self._reaper, None
        server, self._server = self._server, None
        await asyncio.to_thread(end_processes, engine, owner, server)


class _Adapted:
    """The model of an engine with one of its adapters, or with none; see `VllmEngine.serving`."""

    def __init__(self, engine: VllmEngine, adapter: str | None) -> None:
        self._engine, self._adapter = engine, adapter
        self.keeps_thoughts = engine.keeps_thoughts

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        return self._engine._identity_of(dataclasses.replace(self._engine.spec, adapter=self._adapter))

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        return await self._engine._chat(messages, sampling, self._adapter)

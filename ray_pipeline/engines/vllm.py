"""vLLM in process: one model behind ``ChatEngine``, on GPUs or on the CPU build.

The engine is vLLM's ``AsyncLLM``, which batches all waiting chats. Its core runs in child processes, with these
consequences:

- **Scripts** need ``if __name__ == "__main__":`` (children import the main module again).
- **A dead core** makes every chat raise :class:`EngineDead`, including those in progress. An actor must then end itself
  (``os._exit(1)``): Ray Data starts another one and repeats its tasks. Raising out of the task would fail the dataset.
- **No process outlives its owner** (see ``vllm_processes``).

vLLM is imported inside functions, because the import takes 6 to 13 s and reading a configuration does not need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.engines.account import Used
from ray_pipeline.engines.base import (
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
from ray_pipeline.engines.chat_template import ChatTemplate
from ray_pipeline.engines.core_server import CoreServer, is_cpu_build
from ray_pipeline.engines.engine_meters import EngineMeters
from ray_pipeline.engines.identity import ModelNotFound, model_identity, text_digest
from ray_pipeline.engines.lifetime import Lifetime
from ray_pipeline.engines.refusals import Refusals
from ray_pipeline.engines.vllm_arguments import engine_args, local_adapter
from ray_pipeline.engines.vllm_processes import Reaper, child_environment, end_processes, prepare_environment
from ray_pipeline.engines.vllm_replies import read_completion, sampling_params
from ray_pipeline.engines.vllm_spec import SPEED_ONLY, VllmSpec, validate_engine_args
from ray_pipeline.store.local import local_copy

logger = logging.getLogger("quorum.vllm")

_STARTS = 2  # attempts to start the engine
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
        model: the model's identity if it has been computed already (see ``identity.model_identity``), so that not every
            actor has to hash a large model.

    Attributes:
        start_seconds: duration of the start.
        notes: messages for the user, each once: the engine's log is not on the terminal.
    """

    def __init__(self, spec: VllmSpec, *, model: Mapping[str, str] | None = None) -> None:
        self.spec = spec
        self.start_seconds = 0.0
        self.notes: list[str] = []
        self._model = None if model is None else dict(model)
        self._lifetime = Lifetime()
        self._refusals = Refusals(repr(spec.model), _REMEDY, self._lifetime)
        self._engine: Any = None  # vllm.v1.engine.async_llm.AsyncLLM
        self._template: ChatTemplate | None = None
        self._lora: Any = None
        self._limit = 0
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
        spec = self.spec
        try:
            model = self._model or model_identity(spec.model, spec.revision, spec.adapter)
            other = {name: value for name, value in sorted(spec.args.items()) if name not in SPEED_ONLY}
            if "tokenizer" in other:
                other["tokenizer"] = model_identity(str(other["tokenizer"]))["model"]
        except ModelNotFound as error:
            raise EngineStartError(str(error)) from error
        template = self._own_template()
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
        self._lifetime.check_open()
        if self._engine is None or not self._ready:
            await self.start()
        with self._refusals.watch(messages, sampling):
            completion = await self._ask(messages, sampling)
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
        self._reaper = Reaper()
        with child_environment(self._reaper, cpu=is_cpu_build()):
            self._server = CoreServer()  # its imports run beside this process's
            self._template = self._load_template(revision)
            self._load_core(self._server, revision)
        self._limit = int(self._engine.model_config.max_model_len)

    def _load_core(self, server: CoreServer, revision: str | None) -> None:
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise EngineStartError(
                f"cannot import vLLM ({error}); install it with `pip install quorum-align[gpu]`; for a machine without "
                "a GPU, see the README on the CPU build"
            ) from error
        args = engine_args(self.spec, revision, cpu=current_platform.is_cpu())
        if self.spec.adapter is not None:
            self._lora = LoRARequest("policy", 1, local_adapter(self.spec.adapter))
        with server.starts_cores():
            loggers = None if args["disable_log_stats"] else _stat_loggers()
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args), stat_loggers=loggers)

    def _own_template(self) -> str | None:
        """Text of the specification's template file, if it has one."""
        if self.spec.chat_template is None:
            return None
        try:
            return Path(self.spec.chat_template).read_text()
        except OSError as error:
            raise EngineStartError(f"cannot read chat_template {self.spec.chat_template!r}: {error}") from error

    def _load_template(self, revision: str | None) -> ChatTemplate:
        from transformers import AutoTokenizer

        spec = self.spec
        source = str(spec.args.get("tokenizer", spec.model))
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                local_copy(source),
                revision=revision if revision and source == spec.model else "main",
                trust_remote_code=spec.trust_remote_code,
            )
        except Exception as error:
            raise EngineStartError(f"cannot load the tokenizer of {source!r}: {causes(error)}") from error
        try:
            return ChatTemplate(tokenizer, self._own_template(), spec.chat_template_args)
        except ValueError as error:
            raise EngineStartError(
                f"{source!r} has no chat template (a base model, or its chat_template.jinja was not copied); "
                "serve an instruction-tuned model, or set the model's key chat_template to a Jinja file"
            ) from error

    async def _prove(self) -> None:
        """Load the adapter, and make two short calls to check that the model answers and obeys structured output."""
        if self._lora is not None:
            try:
                await self._engine.add_lora(self._lora)
            except Exception as error:
                raise EngineStartError(f"cannot load adapter {self.spec.adapter!r}: {causes(error)}") from error
        if not self.spec.canary:
            return
        score = {"type": "integer", "minimum": 1, "maximum": 9}
        for grammar, allowed in (
            (Grammar.choice(["yes", "no"]), ("yes", "no")),
            (Grammar.json(score), tuple(map(str, range(1, 10)))),
        ):
            question = [{"role": "user", "content": "Answer: yes, no or 1."}]
            try:
                reply = await self._ask(question, Sampling(max_tokens=16, grammar=grammar))
            except PromptTooLong as error:
                raise EngineStartError(f"even a short question does not fit {self.spec.model!r}: {error}") from error
            except (EngineError, EngineDead) as error:
                raise EngineStartError(f"the first call to {self.spec.model!r} failed: {error}") from error
            if reply.text not in allowed or reply.finish_reason != "stop":
                raise EngineStartError(
                    f"{self.spec.model!r} does not obey structured output: the reply must be one of "
                    f"{', '.join(allowed)}, and is {reply.text!r} ({reply.finish_reason}). Try another backend "
                    "(args: structured_outputs_config: {backend: guidance}), or set canary: false to judge without "
                    "structured output"
                )

    # -- answering ---------------------------------------------------------------------------------------------------

    async def _ask(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._lifetime.check_open()
        engine = self._engine
        if engine is None:
            raise EngineDead("the engine was closed")
        assert self._template is not None
        begin = time.perf_counter()
        try:
            prompt = self._template.token_ids(messages)
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
        params = sampling_params(sampling)
        last: Any = None
        try:
            async for output in engine.generate(
                # A prompt of this type is used unchanged and bypasses vLLM's tokenizer threads.
                {"type": "token", "prompt_token_ids": prompt},
                params,
                f"chat-{next(self._ids)}",
                lora_request=self._lora,
            ):
                last = output
        except EngineDeadError as error:
            raise EngineDead(f"the engine of {self.spec.model!r} has died; see its log") from error
        except Exception as error:
            if engine.errored or self._lifetime.closed:  # the error depends on what the call was doing at the time
                raise EngineDead(f"the engine of {self.spec.model!r} has died; see its log") from error
            raise (rejected if isinstance(error, ValueError) else EngineError)(causes(error)) from error
        return read_completion(last, len(prompt), time.perf_counter() - begin)

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


def _stat_loggers() -> list[Any] | None:
    """Inside Ray, a logger to its Prometheus endpoint; otherwise None, for vLLM's own."""
    ray = sys.modules.get("ray")
    return [EngineMeters] if ray is not None and ray.is_initialized() else None

"""vLLM in process: one model behind ``ChatEngine``, on GPUs or on the CPU build.

The engine is vLLM's ``AsyncLLM``, which batches all chats that wait at the same time. Its core runs in child processes,
and three things follow from that:

- **Scripts** need ``if __name__ == "__main__":`` (children import the main module again).
- **A dead core** makes every chat raise :class:`EngineDead`, those that wait included. An actor must then end itself
  (``os._exit(1)``): Ray Data starts another one and repeats its tasks. Raising out of the task would fail the dataset.
- **No process outlives its owner**: ``close()`` ends them, the normal end of the interpreter does, and a small process
  beside each engine (``reaper``) kills what is left when the owner itself was killed. ``ray.kill`` and Ray Data's end
  of an actor run no ``atexit`` and no destructor, hence the reaper.

vLLM is imported inside functions: it takes 6 to 13 s, and nobody who only reads a config should pay them.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import difflib
import functools
import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from ray_pipeline.engines import reaper
from ray_pipeline.engines.base import (
    Completion,
    EngineDead,
    EngineError,
    EngineStartError,
    Grammar,
    Message,
    PromptTooLong,
    Sampling,
    TokenLogprobs,
)
from ray_pipeline.engines.chat_template import ChatTemplate
from ray_pipeline.engines.core_server import CoreServer, is_cpu_build
from ray_pipeline.engines.engine_meters import EngineMeters
from ray_pipeline.engines.identity import ModelNotFound, model_identity, text_digest
from ray_pipeline.store.local import local_copy

logger = logging.getLogger("quorum.vllm")

#: Fields of the specification and the engine arguments that they stand for: not to be given twice.
_SPECIFIED = {
    "model": "model",
    "revision": "revision",
    "tokenizer_revision": "revision",
    "lora_modules": "adapter",
    "dtype": "dtype",
    "quantization": "quantization",
    "max_model_len": "max_model_len",
    "tensor_parallel_size": "tensor_parallel_size",
    "seed": "seed",
    "chat_template": "chat_template",
    "trust_remote_code": "trust_remote_code",
}

# fmt: off
#: Engine arguments that change how fast a reply comes and never which one (rounding apart). Every other argument is
#: part of the model's identity, so that a new one of vLLM's is taken for a change until it is listed here.
_SPEED_ONLY = frozenset(
    {
        "async_scheduling", "block_size", "compilation_config", "cpu_offload_gb", "cudagraph_capture_sizes",
        "data_parallel_size", "disable_cascade_attn", "disable_custom_all_reduce", "disable_log_stats",
        "distributed_executor_backend", "download_dir", "enable_chunked_prefill", "enable_log_requests", "enable_lora",
        "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "load_format",
        "long_prefill_token_threshold", "max_cpu_loras", "max_cudagraph_capture_size", "max_logprobs", "max_lora_rank",
        "max_loras", "max_num_batched_tokens", "max_num_partial_prefills", "max_num_seqs",
        "max_parallel_loading_workers", "num_gpu_blocks_override", "pipeline_parallel_size", "scheduling_policy",
        "shutdown_timeout", "stream_interval", "swap_space", "tokenizer_mode", "use_tqdm_on_load",
    }
)
# fmt: on

#: What ``Sampling`` says by fields of its own, and what this engine needs for itself.
_SAMPLING_FIELDS = frozenset({"temperature", "top_p", "max_tokens", "seed", "stop", "logprobs", "structured_outputs"})
_SAMPLING_OURS = frozenset({"n", "output_kind", "skip_clone", "detokenize", "flat_logprobs", "prompt_logprobs"})

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM reserves memory for
_CPU_CACHE_BYTES = 1 << 30  # of keys and values; holds half a million tokens of a pocket model
_CPU_STEP_TOKENS = 8192  # prompts of a step together; vLLM's 2048 keep most slots of a batch empty
_STARTS = 2  # how often an engine is started before it is said not to start
_CLOSE_SECONDS = 2.0  # the core lets go of everything within one and takes five more to end: then it is killed


@dataclass(frozen=True)
class VllmSpec:
    """A model and how vLLM serves it; plain values only, so that it travels as JSON or pickle.

    Args:
        model: folder (absolute: actors have another working directory) or hub name.
        revision: branch, tag or commit of a hub model; the engine is started on the commit that it resolves to.
        adapter: folder of a LoRA adapter; prompts follow the chat template of the base model.
        dtype: number format of the weights; ``auto`` takes the checkpoint's, and bfloat16 for float32 checkpoints.
            Processors without bfloat16 instructions are three times as fast with ``float32``.
        quantization: vLLM's name of a quantisation method; None takes the checkpoint's.
        max_model_len: longest prompt + reply in tokens; None takes the model's own limit.
        tensor_parallel_size: GPUs that share one copy of the model.
        seed: of the engine; draws without a seed of their own depend on it and are not reproducible anyway.
        chat_template: path of a Jinja file instead of the tokenizer's template.
        chat_template_args: variables of the template. ``enable_thinking: False`` by default: a thinking model
            otherwise spends its tokens on thought and never gives the score (templates without it ignore it).
        trust_remote_code: run the Python files of the model.
        args: every other field of vLLM's ``AsyncEngineArgs`` by its own name.
        canary: prove at the start, with two short calls, that structured output is obeyed.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    seed: int = 0
    chat_template: str | None = None
    chat_template_args: dict[str, Any] = field(default_factory=lambda: {"enable_thinking": False})
    trust_remote_code: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    canary: bool = True


def validate_engine_args(args: Mapping[str, Any]) -> None:
    """Check the names in ``VllmSpec.args``, in milliseconds: vLLM's source is read, not imported.

    Where vLLM is not installed (a driver without it, say) nothing can be checked and nothing is raised; the engine
    checks again when it starts.

    Raises:
        EngineStartError: an unknown name, with the nearest right one; or a name that is a field of the specification.
    """
    known = _declared_fields("engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs"))
    for name in args:
        if name in _SPECIFIED:
            raise EngineStartError(f"vLLM argument {name!r} under args: set the engine's own key {_SPECIFIED[name]!r}")
        if known and name not in known:
            raise EngineStartError(f"vLLM has no engine argument {name!r}{_nearest(name, known)}")


def validate_sampling_extra(extra: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> None:
    """Check the names in ``Sampling.extra``, as fast as :func:`validate_engine_args`.

    Raises:
        EngineStartError: an unknown name, one that ``Sampling`` has a field for, or one that the engine sets itself.
    """
    known = _declared_fields("sampling_params.py", ("SamplingParams",))
    for name in dict(extra):
        problem = _sampling_problem(name, known)
        if problem:
            raise EngineStartError(problem)


def _sampling_problem(name: str, known: frozenset[str]) -> str | None:
    if name in _SAMPLING_FIELDS:
        return f"sampling parameter {name!r} under extra: set the sampling's own key (structured output: grammar)"
    if name in _SAMPLING_OURS or name.startswith("_"):
        return f"sampling parameter {name!r} cannot be set: one call is one reply; ask again with another seed for more"
    if known and name not in known:
        return f"vLLM has no sampling parameter {name!r}{_nearest(name, known)}"
    return None


def _nearest(name: str, known: frozenset[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_").lower(), sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; its documentation lists them"


@functools.cache
def _declared_fields(source: str, classes: tuple[str, ...]) -> frozenset[str]:
    """Names of the annotated fields of classes in a source file of vLLM; empty where vLLM is not installed."""
    package = importlib.util.find_spec("vllm")
    if package is None or not package.submodule_search_locations:
        return frozenset()
    path = Path(package.submodule_search_locations[0]) / source
    if not path.is_file():
        return frozenset()
    return frozenset(
        statement.target.id
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )


@dataclass
class EngineStats:
    """What an engine has answered since it started, the canary left out. Tokens; calls that failed are not in it."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class VllmEngine:
    """A :class:`~ray_pipeline.engines.base.ChatEngine` over vLLM.

    Making one costs nothing: :meth:`start`, or the first :meth:`chat`, loads the model. It lives on the event loop that
    it was started on, which need not be the main thread's.

    Args:
        spec: the model and how it is served.
        model: the model's identity when somebody has computed it already (see ``identity.model_identity``): hashing a
            big model in every actor takes longer than it needs to.
    """

    def __init__(self, spec: VllmSpec, *, model: Mapping[str, str] | None = None) -> None:
        self.spec = spec
        self._model = None if model is None else dict(model)
        self._starting: asyncio.Task[None] | None = None
        self._engine: Any = None  # vllm.v1.engine.async_llm.AsyncLLM
        self._template: ChatTemplate | None = None
        self._lora: Any = None
        self._limit = 0
        self._reaper: _Reaper | None = None
        self._server: CoreServer | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._ready = False  # started and proven
        self.start_seconds = 0.0  # what that took
        self._closed = False
        self._ids = itertools.count()
        self._stats = EngineStats()

    @functools.cached_property
    def identity(self) -> Mapping[str, Any]:
        """Who answers. Needs no started engine: a resume that finds every call in the log never loads the model.

        Raises:
            EngineStartError: the model, the adapter or the chat template is not there.
        """
        spec = self.spec
        try:
            model = self._model or model_identity(spec.model, spec.revision, spec.adapter)
            other = {name: value for name, value in sorted(spec.args.items()) if name not in _SPEED_ONLY}
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
        """Load the model and prove that it answers; once, however often and from however many tasks it is called.

        Raises:
            EngineStartError: it cannot; the message says what to change. Later calls raise the same error at once.
        """
        if self._starting is None:
            # A task of its own: whoever asked first may be cancelled while others wait for the same start.
            self._starting = asyncio.create_task(self._start(), name="vllm-start")
        await asyncio.shield(self._starting)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        """Draw one reply; see :class:`~ray_pipeline.engines.base.ChatEngine` for what is raised.

        Cancelling the call aborts the request in the engine.
        """
        if self._closed:
            raise EngineDead("the engine was closed")
        if self._engine is None or not self._ready:
            await self.start()
        completion = await self._ask(messages, sampling)
        stats = self._stats
        stats.calls += 1
        stats.prompt_tokens += completion.prompt_tokens
        stats.completion_tokens += completion.completion_tokens
        stats.cached_tokens += completion.cached_tokens
        return completion

    def stats(self) -> EngineStats:
        """Totals so far (a copy)."""
        return EngineStats(**vars(self._stats))

    async def close(self) -> None:
        """End the engine and all its processes. Chats that wait raise EngineDead. May be called twice."""
        self._closed = True
        if self._starting is not None and not self._starting.done():
            with contextlib.suppress(BaseException):  # a start cannot be stopped halfway, only undone
                await asyncio.shield(self._starting)
        if self._watchdog is not None:
            self._watchdog.cancel()
        await self._shut_down()

    # -- starting ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        begin = time.perf_counter()
        validate_engine_args(self.spec.args)
        for starts_left in reversed(range(_STARTS)):
            try:
                # Off the loop: loading takes seconds to minutes, and other shards of the actor read, write and answer
                # from the call log meanwhile.
                await asyncio.to_thread(self._load)
                await self._prove()
                break
            except BaseException as error:
                await self._shut_down()
                if isinstance(error, EngineStartError) or not isinstance(error, Exception):
                    raise
                # A core that was killed while it loaded, or that found the memory still held by one that was ending,
                # starts the next time. vLLM does not say which it was, so a wrong setting is tried twice as well.
                if starts_left and not self._closed and "core" in str(error):
                    logger.warning("vLLM did not start with %s (%s); once more", self.spec.model, _reason(error))
                    continue
                raise EngineStartError(f"vLLM did not start with {self.spec.model!r}: {_reason(error)}") from error
        self._watchdog = asyncio.create_task(self._watch(), name="vllm-watchdog")
        self._ready = True
        self.start_seconds = time.perf_counter() - begin
        logger.info("vLLM serves %s after %.1f s", self.spec.model, self.start_seconds)

    def _load(self) -> None:
        model = self.identity  # first: says clearly when there is no such model
        _prepare_environment()
        self._reaper = _Reaper()
        with _child_environment(self._reaper, cpu=is_cpu_build()):
            self._server = CoreServer()  # it imports while this process does
            self._template = self._load_template()
            self._load_core(str(model["model"]))
        self._limit = int(self._engine.model_config.max_model_len)

    def _load_core(self, identity: str) -> None:
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise EngineStartError(
                f"vLLM cannot be imported ({error}); install it with `pip install quorum-align[gpu]`, or on a machine "
                "without GPU as the README's section on the CPU build says"
            ) from error
        args = self._engine_args(identity, cpu=current_platform.is_cpu())
        if self.spec.adapter is not None:
            self._lora = LoRARequest("policy", 1, _local(self.spec.adapter))
        assert self._server is not None
        with self._server.starts_cores():
            loggers = None if args["disable_log_stats"] else _stat_loggers()
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args), stat_loggers=loggers)

    def _engine_args(self, identity: str, *, cpu: bool) -> dict[str, Any]:
        """What ``AsyncEngineArgs`` is made of: defaults that suit batch work, then the specification."""
        spec = self.spec
        args: dict[str, Any] = {
            "enable_prefix_caching": True,
            "disable_log_stats": True,  # counting every step costs time; False exports `engine_meters`
            "use_tqdm_on_load": False,
            # Prompts are rendered and tokenised here, by the Hugging Face tokenizer, so the engine must decode with the
            # same: "auto" takes mistral-common for Mistral's repositories.
            "tokenizer_mode": "hf",
            "generation_config": "auto",  # its end-of-reply tokens are needed; its sampling defaults are not applied
        }
        if cpu:
            args["enforce_eager"] = True  # compiling takes longer than a small run, and does little for it
            if spec.tensor_parallel_size == 1 and "distributed_executor_backend" not in spec.args:
                # One process less to start (a third of the time), and no second hop for every step. By its class,
                # because the CPU platform replaces the name "uni" by "mp".
                args["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
            # A prompt that is prefilled in pieces ends the engine when its call has a seed ("CPU Generator does not use
            # offset", vLLM 0.29), so prompts are prefilled whole here.
            args["enable_chunked_prefill"] = False
            args["max_num_seqs"] = 256
            if spec.max_model_len is not None:  # a step must hold the longest prompt; else vLLM chooses
                args["max_num_batched_tokens"] = max(_CPU_STEP_TOKENS, spec.max_model_len)
            if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):  # which would win over the argument
                args["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
        if spec.adapter is not None:
            args |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _lora_rank(_local(spec.adapter))}
        args |= spec.args
        args |= {
            "model": local_copy(spec.model),
            "dtype": spec.dtype,
            "quantization": spec.quantization,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "seed": spec.seed,
            "trust_remote_code": spec.trust_remote_code,
        }
        if "tokenizer" in args:
            args["tokenizer"] = local_copy(str(args["tokenizer"]))
        if spec.max_model_len is not None:
            args["max_model_len"] = spec.max_model_len
        if identity.startswith("hub:"):
            # The commit that the identity names, and not what the branch points to by now.
            args["revision"] = args["tokenizer_revision"] = identity.rsplit("@", 1)[1]
        return args

    def _own_template(self) -> str | None:
        """Text of the template file that the specification names, if it names one."""
        if self.spec.chat_template is None:
            return None
        try:
            return Path(self.spec.chat_template).read_text()
        except OSError as error:
            raise EngineStartError(f"chat_template {self.spec.chat_template!r} cannot be read: {error}") from error

    def _load_template(self) -> ChatTemplate:
        from transformers import AutoTokenizer

        spec = self.spec
        source = str(spec.args.get("tokenizer", spec.model))
        identity = str(self.identity["model"])
        revision = identity.rsplit("@", 1)[1] if identity.startswith("hub:") and source == spec.model else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                local_copy(source), revision=revision or "main", trust_remote_code=spec.trust_remote_code
            )
        except Exception as error:
            raise EngineStartError(f"the tokenizer of {source!r} cannot be loaded: {_reason(error)}") from error
        try:
            return ChatTemplate(tokenizer, self._own_template(), spec.chat_template_args)
        except ValueError as error:
            raise EngineStartError(
                f"{source!r} has no chat template (a base model, or its chat_template.jinja was not copied); "
                "serve an instruction-tuned model, or name a Jinja file with the engine's key chat_template"
            ) from error

    async def _prove(self) -> None:
        if self._lora is not None:
            try:
                await self._engine.add_lora(self._lora)
            except Exception as error:
                raise EngineStartError(f"adapter {self.spec.adapter!r} cannot be loaded: {_reason(error)}") from error
        if not self.spec.canary:
            return
        score = {"type": "integer", "minimum": 1, "maximum": 9}
        for grammar, allowed in (
            (Grammar.choice(["yes", "no"]), ("yes", "no")),
            (Grammar.json(score), tuple(map(str, range(1, 10)))),
        ):
            asked = [{"role": "user", "content": "Answer: yes, no or 1."}]
            try:
                reply = await self._ask(asked, Sampling(max_tokens=16, grammar=grammar))
            except PromptTooLong as error:
                raise EngineStartError(f"even a short question does not fit {self.spec.model!r}: {error}") from error
            except (EngineError, EngineDead) as error:
                raise EngineStartError(f"the first call on {self.spec.model!r} failed: {error}") from error
            if reply.text not in allowed or reply.finish_reason != "stop":
                raise EngineStartError(
                    f"{self.spec.model!r} does not obey structured output: a reply among {', '.join(allowed)} was "
                    f"asked for and {reply.text!r} came ({reply.finish_reason}). Try another back end "
                    "(args: structured_outputs_config: {backend: guidance}), or set canary: false to judge without"
                )

    # -- answering ---------------------------------------------------------------------------------------------------

    async def _ask(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = self._engine
        if self._closed or engine is None:
            raise EngineDead("the engine was closed")
        assert self._template is not None
        begin = time.perf_counter()
        try:
            prompt = self._template.token_ids(messages)
        except Exception as error:  # templates raise of their own: "roles must alternate", no system role, …
            raise EngineError(f"the chat template refused the messages: {_reason(error)}") from error
        if len(prompt) + sampling.max_tokens > self._limit:
            raise PromptTooLong(len(prompt), sampling.max_tokens, self._limit)
        params = _sampling_params(sampling)
        final: Any = None
        try:
            async for output in engine.generate(
                # A prompt of this type is taken as it is, without a detour through vLLM's tokenizer threads.
                {"type": "token", "prompt_token_ids": prompt},
                params,
                f"chat-{next(self._ids)}",
                lora_request=self._lora,
            ):
                final = output
        except EngineDeadError as error:
            raise EngineDead(f"the engine of {self.spec.model!r} is gone; its log says why") from error
        except Exception as error:
            if engine.errored or self._closed:  # what its end looks like depends on where a call was at the time
                raise EngineDead(f"the engine of {self.spec.model!r} is gone; its log says why") from error
            raise EngineError(_reason(error)) from error
        if final is None or not final.outputs:
            raise EngineError("vLLM ended the request without a reply")
        reply = final.outputs[0]
        return Completion(
            text=reply.text,
            finish_reason=str(reply.finish_reason),
            prompt_tokens=len(prompt),
            completion_tokens=len(reply.token_ids),
            cached_tokens=int(final.num_cached_tokens or 0),
            logprobs=None if reply.logprobs is None else _token_logprobs(reply.token_ids, reply.logprobs),
            latency_s=time.perf_counter() - begin,
        )

    # -- ending ------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Fail the calls that wait when the core is gone, should vLLM itself not have told them."""
        from vllm.v1.engine.exceptions import EngineDeadError

        engine = self._engine
        while not engine.errored:
            await asyncio.sleep(1.0)
        await asyncio.sleep(1.0)  # vLLM does it by itself, as a rule
        engine.output_processor.propagate_error(EngineDeadError())

    async def _shut_down(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            engine.output_processor.propagate_error(EngineDeadError())  # calls that wait would wait for ever
            if engine.output_handler is not None:
                engine.output_handler.cancel()  # or it logs the end of the core as an error
        owner, self._reaper = self._reaper, None
        server, self._server = self._server, None
        await asyncio.to_thread(_end_processes, engine, owner, server)


def _end_processes(engine: Any, owner: _Reaper | None, server: CoreServer | None) -> None:
    children = owner.children() if owner is not None else []
    if engine is not None:
        engine.shutdown(timeout=_CLOSE_SECONDS)
    if owner is not None:
        owner.release()
    for child in children:
        child.join(timeout=5.0)  # or the killed ones stay behind as zombies
    if server is not None:
        server.release()


class _Reaper:
    """The process that ends an engine's processes when their owner is killed (see ``reaper``)."""

    def __init__(self) -> None:
        self.name, self.value = "QUORUM_ENGINE", uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform == "linux":
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(reaper.__file__)), self._entry],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a signal to the owner's group must not end it before its work
            )

    @property
    def _entry(self) -> str:
        return f"{self.name}={self.value}"

    def children(self) -> list[multiprocessing.process.BaseProcess]:
        """Processes of the engine that this process has started itself and has to wait for."""
        if self._process is None:
            return []
        marked = reaper.marked(self._entry.encode())
        return [child for child in multiprocessing.active_children() if child.pid in marked]

    def release(self) -> None:
        """Kill what is left of the engine and let the reaper go."""
        if self._process is None or self._process.stdin is None:
            return
        reaper.kill_marked(self._entry.encode())
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"done")
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it ends when the machine finds the time
            self._process.wait(timeout=5.0)
        self._process = None


def _prepare_environment() -> None:
    """Settings that vLLM reads from the environment. What the user has set stays."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings say what it chose by itself, a dozen lines per engine
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # what a command prints on stdout is its own
        "TOKENIZERS_PARALLELISM": "false",  # one prompt at a time: threads only cost
        # Bound threads of two engines would share one core and leave the other idle.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _child_environment(owner: _Reaper, *, cpu: bool) -> Iterator[None]:
    """The environment in which an engine's processes are started, for as long as they are.

    The reaper's mark must not stick to what the owner starts later (a Ray cluster, say), and vLLM itself leaves
    settings behind, LD_PRELOAD and LOCAL_WORLD_SIZE among them, that a training run in this process would obey.
    """
    # Python's helper for shared memory belongs to the owner, not to the engine: start it before the mark is set.
    resource_tracker.ensure_running()
    before = dict(os.environ)
    os.environ[owner.name] = owner.value
    if cpu:
        # Samplers are compiled even in eager mode: 7 s for the first log-probabilities, and a C++ compiler is needed.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Ray sets the threads by the actor's num_cpus. Elsewhere one core is for this process; threads that spin while
        # they wait take it away again.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            if not name.startswith("VLLM_"):
                del os.environ[name]
        os.environ.update(before)


def _stat_loggers() -> list[Any] | None:
    """Where an engine tells what goes on in it: inside Ray to its Prometheus endpoint, else where vLLM sends it."""
    ray = sys.modules.get("ray")
    return [EngineMeters] if ray is not None and ray.is_initialized() else None


def _local(adapter: str) -> str:
    """A folder with the adapter's files; a hub adapter is downloaded (or found in the hub cache)."""
    adapter = local_copy(adapter)
    if Path(adapter).expanduser().exists():
        return str(Path(adapter).expanduser())
    from huggingface_hub import snapshot_download

    return str(snapshot_download(adapter))


def _lora_rank(adapter: str) -> int:
    """The rank that vLLM has to reserve for an adapter: the smallest of its sizes that holds it.

    Raises:
        EngineStartError: no LoRA adapter in the folder, or a rank beyond vLLM's largest.
    """
    path = Path(adapter) / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (OSError, ValueError, KeyError) as error:
        raise EngineStartError(f"{path} is not the config of a LoRA adapter ({_reason(error)})") from error
    for size in _LORA_RANKS:
        if rank <= size:
            return size
    raise EngineStartError(f"adapter {adapter!r} has rank {rank}, and vLLM serves up to {_LORA_RANKS[-1]}: merge it")


def _sampling_params(sampling: Sampling) -> Any:
    """vLLM's form of a sampling. Raises EngineError for values that vLLM refuses."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    extra = dict(sampling.extra)
    for name in extra:
        problem = _sampling_problem(name, frozenset(SamplingParams.__struct_fields__))
        if problem:
            raise EngineError(problem)
    grammar = sampling.grammar
    wanted: dict[str, Any] = {}
    if grammar is not None:
        # A schema goes as text: the order of its keys is the order in which they are generated.
        wanted[grammar.kind] = grammar.decoded() if grammar.kind == "choice" else grammar.value
    try:
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop=list(sampling.stop) or None,
            logprobs=sampling.logprobs,
            structured_outputs=None if grammar is None else StructuredOutputsParams(**wanted),
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # made for this request alone
            **extra,
        )
    except Exception as error:
        raise EngineError(f"vLLM refused the sampling parameters: {_reason(error)}") from error


def _token_logprobs(tokens: Sequence[int], steps: Sequence[Mapping[int, Any]]) -> TokenLogprobs:
    """Per generated token its alternatives, the sampled one first, the others by falling probability."""
    found: TokenLogprobs = []
    for token, step in zip(tokens, steps, strict=False):
        others = sorted((entry for key, entry in step.items() if key != token), key=lambda entry: -entry.logprob)
        chosen = [step[token]] if token in step else []
        found.append([(entry.decoded_token or "", float(entry.logprob)) for entry in [*chosen, *others]])
    return found


def _reason(error: BaseException) -> str:
    """The text of an error and of what caused it: vLLM wraps some in an exception without a message."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < 4:
        text = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
        if text not in said:
            said.append(text)
        cause = cause.__cause__
    return " <- ".join(said)

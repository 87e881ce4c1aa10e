"""A model and how vLLM serves it, and the names of vLLM's arguments, checked without importing vLLM."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_pipeline.engines.base import EngineStartError

#: Engine argument -> the field of the specification that sets it.
SPECIFIED = {
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
#: Engine arguments that affect the speed of replies and not their content (apart from rounding). Every other argument
#: is part of the model's identity; an argument new in vLLM therefore counts as a change until it is listed here.
SPEED_ONLY = frozenset(
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

#: Sampling parameters with a field in ``Sampling``, and those that the engine sets itself.
_SAMPLING_FIELDS = frozenset({"temperature", "top_p", "max_tokens", "seed", "stop", "logprobs", "structured_outputs"})
_SAMPLING_OURS = frozenset({"n", "output_kind", "skip_clone", "detokenize", "flat_logprobs", "prompt_logprobs"})


@dataclass(frozen=True)
class VllmSpec:
    """A model and how vLLM serves it; plain values only, so that it can be stored as JSON or pickled.

    Args:
        model: folder (absolute: actors have another working directory) or Hub name.
        revision: branch, tag or commit of a Hub model; the engine starts on the commit that it resolves to.
        adapter: folder of a LoRA adapter; prompts follow the chat template of the base model.
        dtype: number format of the weights; ``auto``: as the checkpoint, but bfloat16 for float32 checkpoints.
            Processors without bfloat16 instructions are three times as fast with ``float32``.
        quantization: vLLM's name of a quantisation method; None: as the checkpoint.
        max_model_len: maximum of prompt + reply in tokens; None: the model's own limit.
        tensor_parallel_size: number of GPUs that share one copy of the model.
        seed: of the engine, for calls without a seed of their own (which are not reproducible anyway).
        chat_template: path of a Jinja file that replaces the tokenizer's template.
        chat_template_args: variables of the template. The default is ``enable_thinking: False``, because a thinking
            model may spend all its tokens before it gives the score (templates without this variable ignore it).
        trust_remote_code: run the model's own Python files.
        args: further fields of vLLM's ``AsyncEngineArgs`` by their own names.
        canary: check at the start, with two short calls, that the model obeys structured output.
        thoughts: ``split`` takes thoughts out of the text of a reply, ``keep`` leaves them there.
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
    thoughts: str = "split"


def validate_engine_args(args: Mapping[str, Any]) -> None:
    """Check the names in ``VllmSpec.args``, in milliseconds: vLLM's source is parsed, not imported.

    Without an installed vLLM (possible on a driver) nothing is checked; the engine checks again when it starts.

    Raises:
        EngineStartError: an unknown name (the message suggests the nearest one), or a field of the specification.
    """
    known = _declared_fields("engine/arg_utils.py", ("EngineArgs", "AsyncEngineArgs"))
    for name in args:
        if name in SPECIFIED:
            raise EngineStartError(f"vLLM argument {name!r} under args: set the engine's own key {SPECIFIED[name]!r}")
        if known and name not in known:
            raise EngineStartError(f"vLLM has no engine argument {name!r}{_nearest(name, known)}")


def validate_sampling_extra(extra: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> None:
    """Check the names in ``Sampling.extra``, in the same way as :func:`validate_engine_args`.

    Raises:
        EngineStartError: an unknown name, one that ``Sampling`` has a field for, or one that the engine sets itself.
    """
    known = _declared_fields("sampling_params.py", ("SamplingParams",))
    for name in dict(extra):
        problem = sampling_problem(name, known)
        if problem:
            raise EngineStartError(problem)


def sampling_problem(name: str, known: frozenset[str]) -> str | None:
    """Why a sampling parameter must not be set under `extra`; None if it may. An empty `known` is not checked."""
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
    """Names of the annotated fields of classes in a source file of vLLM; empty if vLLM is not installed."""
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

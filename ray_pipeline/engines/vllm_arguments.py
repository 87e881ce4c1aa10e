"""The engine arguments that vLLM starts with: defaults for batch work, sizes for GPU or CPU, then the specification."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray_pipeline.engines.vllm_adapters import local_adapter, lora_rank, shared_room
from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.store.local import local_copy

_CPU_CACHE_BYTES = 1 << 30  # of the KV cache; enough for half a million tokens of a pocket model
_CPU_STEP_TOKENS = 8192  # prompt tokens of a step; vLLM's 2048 leave most slots of a batch empty
_CPU_SEQUENCES = 256  # calls in one batch
_GPU_SEQUENCES = 1024  # the most that vLLM chooses by itself (H100 and larger; 256 on other devices)


def max_sequences(spec: VllmSpec, *, cpu: bool) -> int:
    """Calls in one batch, as far as it is known before the engine starts: never too few by vLLM's defaults."""
    return int(spec.args.get("max_num_seqs") or (_CPU_SEQUENCES if cpu else _GPU_SEQUENCES))


def engine_args(spec: VllmSpec, revision: str | None, *, cpu: bool, adapters: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of ``AsyncEngineArgs``.

    Args:
        revision: commit of a Hub model; None for a folder.
        cpu: whether vLLM is its CPU build.
        adapters: LoRA adapters that calls may choose from, beside calls without one; none with `spec.adapter`.
    """
    args: dict[str, Any] = {
        "enable_prefix_caching": True,
        "disable_log_stats": True,  # counting every step takes time; False exports `engine_meters`
        "use_tqdm_on_load": False,
        # Prompts are rendered and tokenised by the Hugging Face tokenizer, so the engine must decode with the same one;
        # "auto" would use mistral-common for Mistral's repositories.
        "tokenizer_mode": "hf",
        "generation_config": "auto",  # its end-of-reply tokens are needed; its sampling defaults are not applied
    }
    if cpu:
        args["enforce_eager"] = True  # compiling takes longer than a small run and gains little
        if spec.tensor_parallel_size == 1 and "distributed_executor_backend" not in spec.args:
            # One process less to start (a third of the time), and no second hop in every step. Given as a class,
            # because the CPU platform replaces the name "uni" by "mp".
            args["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
        # Prefilling a prompt in chunks crashes the engine if its call has a seed ("CPU Generator does not use offset",
        # vLLM 0.29), so prompts are prefilled whole.
        args["enable_chunked_prefill"] = False
        args["max_num_seqs"] = _CPU_SEQUENCES
        if spec.max_model_len is not None:  # a step must hold the longest prompt; otherwise vLLM chooses
            args["max_num_batched_tokens"] = max(_CPU_STEP_TOKENS, spec.max_model_len)
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):  # which would take precedence over the argument
            args["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    if spec.adapter is not None:
        args |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(local_adapter(spec.adapter))}
    if adapters:
        args |= shared_room(adapters)
    args |= spec.args
    if adapters:
        if cpu:  # its kernels compute calls without an adapter with the last slot (index -1), so it must stay empty
            args["max_loras"] = len(adapters) + 1
        args["max_cpu_loras"] = max(args["max_cpu_loras"], args["max_loras"])
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
    if revision is not None:
        args["revision"] = args["tokenizer_revision"] = revision
    return args

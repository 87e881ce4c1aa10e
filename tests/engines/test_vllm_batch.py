"""How many calls a GPU engine computes at once. The device is planted; its batch is vLLM's own arithmetic."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.engines import vllm as engine_module
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_arguments import engine_args
from ray_pipeline.engines.vllm_spec import VllmSpec
from tests.models import needs_vllm

pytestmark = [pytest.mark.e2e, needs_vllm]  # e2e for the import of vLLM, which takes seconds


@pytest.mark.parametrize(
    ("device", "gib", "args", "sequences", "tokens"),
    [
        ("NVIDIA H200", 141, {}, 1024, 16384),
        ("NVIDIA H100 80GB HBM3", 80, {}, 1024, 16384),
        ("NVIDIA A100-SXM4-80GB", 80, {}, 256, 8192),
        ("NVIDIA H200", 141, {"max_num_seqs": 48}, 48, 16384),
        ("NVIDIA H200", 141, {"max_num_batched_tokens": 4096}, 1024, 4096),
    ],
)
def test_the_batch_is_that_of_offline_inference(
    device: str, gib: int, args: dict[str, int], sequences: int, tokens: int, qwen3: Path, monkeypatch: Any
) -> None:
    """vLLM sizes the batch by device and usage context; what the user sets stays, and a second batch can wait."""
    from vllm.engine import arg_utils
    from vllm.v1.engine.async_llm import AsyncLLM

    class Gpu:
        def is_cpu(self) -> bool:
            return False

        def get_device_name(self, *_: Any) -> str:
            return device

        def get_device_total_memory(self, *_: Any) -> int:
            return gib << 30

        def __getattr__(self, name: str) -> Any:
            return getattr(platform, name)

    platform, starts = arg_utils.current_platform, []
    monkeypatch.setattr(arg_utils, "current_platform", Gpu())
    monkeypatch.setattr(engine_module, "engine_args", lambda *given, **named: engine_args(*given, **named | no_cpu))
    monkeypatch.setattr(engine_module, "is_cpu_build", lambda: False)
    monkeypatch.setattr(
        AsyncLLM, "from_engine_args", lambda *given, usage_context, **_: starts.append((*given, usage_context))
    )
    no_cpu = {"cpu": False}
    engine = VllmEngine(VllmSpec(str(qwen3), max_model_len=1024, args=args))
    server: Any = types.SimpleNamespace(starts_cores=contextlib.nullcontext)
    engine._load_core(server, None)
    ((given, usage_context),) = starts
    sizes = given.create_engine_config(usage_context).scheduler_config
    assert (sizes.max_num_seqs, sizes.max_num_batched_tokens) == (sequences, tokens)
    assert engine.useful_concurrency >= 2 * sizes.max_num_seqs

"""Presets of transformers' settings for models that do not fit one worker.

FSDP and DeepSpeed shard parameters, gradients and optimiser states across the workers. Every worker then writes its own
part of a checkpoint, and Ray Train collects the parts in one folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray_pipeline.training.spec import TrainSpec

_FSDP: dict[str, Any] = {
    "version": 2,
    "reshard_after_forward": True,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    # Do not add `activation_checkpointing` here: its wrappers rename the modules, and a resumed LoRA run would silently
    # continue with a fresh adapter (accelerate 1.15).
    "state_dict_type": "SHARDED_STATE_DICT",
}
_ZERO: dict[str, Any] = {
    "overlap_comm": True,
    "contiguous_gradients": True,
    "stage3_gather_16bit_weights_on_model_save": True,
}
_FROM_TRAINER = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def sharding_settings(spec: TrainSpec) -> dict[str, Any]:
    """The sharding preset as TRL settings; empty for "none"."""
    if spec.settings.shard == "none":
        return {}
    if spec.settings.shard == "fsdp":
        return {"fsdp": True, "fsdp_config": dict(_FSDP)}
    stage = int(spec.settings.shard.removeprefix("zero"))
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage, **_ZERO},
            "bf16": {"enabled": "auto"},
            **dict.fromkeys(_FROM_TRAINER, "auto"),
        }
    }


@contextlib.contextmanager
def fsdp_on_cpus(spec: TrainSpec) -> Iterator[None]:
    """Make a trainer built inside this block shard its model over CPU workers, if the spec sets FSDP without GPUs.

    PyTorch supports it over gloo, but Accelerate 1.15 ignores its FSDP setting without GPUs and would silently train
    whole copies.
    """
    if spec.settings.shard != "fsdp" or spec.settings.use_gpu:
        yield
        return
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def init(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.fsdp_plugin, state.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original

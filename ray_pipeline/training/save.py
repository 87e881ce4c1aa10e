"""The trained model as folders: adapter, merged model or both, or only the model after full fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ray_pipeline.engines.chat_template import end_token
from ray_pipeline.training.folders import clear, partial_folder, publish
from ray_pipeline.training.merge import merge_adapter
from ray_pipeline.training.methods import method_of
from ray_pipeline.training.spec import TrainSpec

logger = logging.getLogger("quorum.train")

#: Rows of the dataset that the merge is checked on.
_CHECK_ROWS = 4
#: Columns of prompts (SFT and reward models: of whole chats) in the datasets that TRL has tokenized.
_TOKEN_COLUMNS = ("prompt_ids", "prompt_input_ids", "input_ids", "chosen_ids")


def write_model(spec: TrainSpec, trainer: Any, card: Callable[[str], str]) -> dict[str, float | None]:
    """Write the trained model below `spec.output_dir`. All ranks call it (a sharded model is gathered); rank 0 writes.

    Args:
        card: text of README.md for "adapter", "merged" or "full".

    Returns:
        On rank 0 the figures of the merge's check, `max_logit_diff` and `adapter_effect`; null where nothing is merged.

    Raises:
        MergeError: base + adapter and merged model compute different logits.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if spec.settings.lora is None:
        _write_full(spec, trainer, card("full"))
        return {"max_logit_diff": None}
    _write_adapter(spec, trainer, card("adapter"))
    if not trainer.is_world_process_zero():
        return {}
    if spec.settings.save == "adapter":
        return {"max_logit_diff": None}
    logger.info("merging the adapter into %s on the CPU", spec.model)
    report = merge_adapter(
        spec.model,
        str(Path(spec.output_dir) / "adapter"),
        str(Path(spec.output_dir) / "merged"),
        spec.settings.dtype,
        task=method_of(spec.settings.method).task,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        prompts=_texts(trainer),
        end_token=end_token(trainer.processing_class, spec.chat_template_args),
        readme=card("merged"),
    )
    if spec.settings.save == "merged":
        clear(Path(spec.output_dir) / "adapter")
    return {"max_logit_diff": report.max_logit_diff, "adapter_effect": report.adapter_effect}


def _write_adapter(spec: TrainSpec, trainer: Any, readme: str) -> None:
    final = Path(spec.output_dir) / "adapter"
    partial = partial_folder(final)
    if trainer.is_world_process_zero():
        clear(partial)
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle with local paths
        (partial / "README.md").write_text(readme)
        publish(final)


def _write_full(spec: TrainSpec, trainer: Any, readme: str) -> None:
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    dtype = getattr(torch, spec.settings.dtype)
    once: dict[tuple[int, torch.Size], torch.Tensor] = {}  # tied weights stay one tensor and are written once

    def cast(weight: torch.Tensor) -> torch.Tensor:
        if not weight.is_floating_point():
            return weight
        return once.setdefault((weight.data_ptr(), weight.shape), weight.to(dtype))

    final = Path(spec.output_dir) / "merged"
    partial = partial_folder(final)
    clear(partial)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.dtype = dtype
    model.save_pretrained(partial, state_dict={name: cast(weight) for name, weight in weights.items()})
    trainer.processing_class.save_pretrained(partial)
    (partial / "README.md").write_text(readme)
    publish(final)


def _texts(trainer: Any) -> list[str]:
    rows = trainer.train_dataset.select(range(min(_CHECK_ROWS, len(trainer.train_dataset))))
    column = next(name for name in _TOKEN_COLUMNS if name in rows.column_names)
    return [trainer.processing_class.decode(ids) for ids in rows[column]]

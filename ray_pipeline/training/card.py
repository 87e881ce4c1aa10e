"""The README.md of a trained folder. What is known only later, evaluation results, is added by `quorum export`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray_pipeline.store.locations import without_folders
from ray_pipeline.store.markdown import key_table
from ray_pipeline.training.methods import METHODS, method_label, method_of
from ray_pipeline.training.spec import TrainSpec

#: Fields about where a run happened, not about what was trained.
_NOT_IN_CARD = (
    "output_dir",
    "storage_path",
    "adapter",
    "reference",  # among the settings in force
    "card",
    "schedule_timeout_s",
    "autoscaling",
    "max_failures",
    "label_selector",
    "resources",
)


def model_card(
    spec: TrainSpec, kind: str, steps: int, effective: Mapping[str, Any], final: Mapping[str, Any] | None
) -> str:
    """The card in Markdown, with the Hub's front matter.

    Args:
        kind: "adapter", "merged" (base and adapter in one) or "full" (all weights were trained).
        steps: optimiser steps of the run.
        effective: the settings in effect.
        final: the last training row of the metrics table, if any.
    """
    from huggingface_hub import ModelCard, ModelCardData

    method, base = method_label(spec.settings.method), without_folders(spec.model)
    what = {
        "adapter": f"LoRA adapter for `{base}`",
        "merged": f"LoRA adapter merged into `{base}`",
        "full": f"`{base}` with every weight trained",
    }[kind]
    data = ModelCardData(
        # The Hub accepts only its own names here.
        base_model=None if os.path.isabs(spec.model) else spec.model,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation" if method_of(spec.settings.method).trains_policy else "text-classification",
        tags=["quorum", "trl", method, *(["lora"] if kind == "adapter" else [])],
    )
    lines = [
        f"# {spec.run_name} ({kind})",
        "",
        f"{what}, trained with {method.upper()} in {steps} optimiser steps by Quorum.",
        "",
    ]
    unread = {name for row in METHODS.values() for name in row.fields} - set(method_of(spec.settings.method).fields)
    # The base's name, not its key in the configuration.
    all_settings = spec.settings.model_dump() | {k: v for k, v in spec.to_dict().items() if k != "settings"}
    settings = {
        name: _public(name, value)
        for name, value in all_settings.items()
        if name not in (*_NOT_IN_CARD, *unread) and value not in (None, (), {})
    }
    for title, values in (
        ("Data", spec.card),
        ("Settings", settings),
        ("In force", effective),
        ("Last step", {k: v for k, v in (final or {}).items() if v is not None}),
    ):
        if values:
            rounded = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
            lines += key_table(title, rounded)
    text = "\n".join(lines)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _public(name: str, value: Any) -> Any:
    """A setting without local folders; of a pattern of files, the last folders say which dataset it is."""
    if not isinstance(value, str):
        return value
    return "/".join(value.split("/")[-3:]) if name in ("train_files", "val_files") else without_folders(value)

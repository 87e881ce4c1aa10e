"""The README.md of a trained folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from ray_pipeline.store.markdown import key_table
from ray_pipeline.training.methods import METHODS, method_label, method_of
from ray_pipeline.training.spec import TrainSpec

#: Fields about where a run happened, not about what was trained.
_NOT_IN_CARD = (
    "output_dir",
    "storage_path",
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
    method = method_label(spec.settings.method)
    front = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "tags": ["quorum", "trl", method] + (["lora"] if kind == "adapter" else []),
    }
    what = {
        "adapter": f"LoRA adapter for `{spec.model}`",
        "merged": f"LoRA adapter merged into `{spec.model}`",
        "full": f"`{spec.model}` with every weight trained",
    }[kind]
    if not os.path.isabs(spec.model):  # the Hub accepts only its own names here
        front["base_model"] = spec.model
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {spec.run_name} ({kind})",
        "",
        f"{what}, trained with {method.upper()} in {steps} optimiser steps by Quorum.",
        "",
    ]
    unread = {name for row in METHODS.values() for name in row.fields} - set(method_of(spec.settings.method).fields)
    # The base's name, not its key in the configuration.
    all_settings = spec.settings.model_dump() | {k: v for k, v in spec.to_dict().items() if k != "settings"}
    settings = {
        name: value
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
    return "\n".join(lines)

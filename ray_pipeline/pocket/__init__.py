"""The pocket world: verifiable tasks, tiny real models and adapters, and a checker (see tasks.py)."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
MODELS = ("policy", "judge", "reviewer", "generator")
ADAPTERS = ("helpfulness", "factuality", "conciseness", "critic")
"""LoRA adapters of `pocket:judge`: the panel, three judges and a critic who err on tasks of their own."""
LORA_LAYERS = ["o_proj", "down_proj"]
"""Layers that the adapters change; an engine that knows is several times as fast (`lora_target_modules` of vLLM)."""


def model_path(name: str) -> str:
    """The absolute folder of a shipped model of `MODELS`, as in "pocket:judge" (the prefix may be left out).

    Raises ValueError for any other name, FileNotFoundError if the package has no weights.
    """
    return _folder(name, MODELS, "model", "model.safetensors")


def adapter_path(name: str) -> str:
    """The absolute folder of a shipped adapter of `ADAPTERS`, as in "pocket:critic"; errors as of `model_path`."""
    return _folder(name, ADAPTERS, "adapter", "adapter_model.safetensors")


def _folder(name: str, known: tuple[str, ...], kind: str, weights: str) -> str:
    short = name.removeprefix("pocket:")
    if short not in known:
        raise ValueError(f"unknown pocket {kind} {name!r}; choose from {', '.join(f'pocket:{one}' for one in known)}")
    folder = WEIGHTS / short
    if not (folder / weights).is_file():
        raise FileNotFoundError(
            f"{folder} has no weights; create them with: python -m ray_pipeline.pocket.make_models --out {WEIGHTS}"
        )
    return str(folder)

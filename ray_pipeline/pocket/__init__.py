"""The pocket world: verifiable tasks, four tiny real models, and a checker with exact answers (see tasks.py)."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"
MODELS = ("policy", "judge", "reviewer", "generator")


def model_path(name: str) -> str:
    """The absolute folder of a shipped model of `MODELS`, as in "pocket:judge" (the prefix may be left out).

    Raises ValueError for any other name, FileNotFoundError if the package has no weights.
    """
    short = name.removeprefix("pocket:")
    if short not in MODELS:
        known = ", ".join(f"pocket:{model}" for model in MODELS)
        raise ValueError(f"unknown pocket model {name!r}; choose from {known}")
    folder = WEIGHTS / short
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} has no weights; create them with: python -m ray_pipeline.pocket.make_models --out {WEIGHTS}"
        )
    return str(folder)

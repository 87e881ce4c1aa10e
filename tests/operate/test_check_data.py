"""Runs whose prompts or candidates cannot become training rows are found before anything is paid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.operate.at_an_endpoint import command, config, quorum
from tests.operate.test_check import checked, of

LIMITS = {"max_prompt_length": 2, "max_length": 40}


def made(**changes: Any) -> dict[str, Any]:
    """A configuration; without training it has no local model."""
    values = config()
    values["prompts"]["val_fraction"] = changes.pop("val", 0.05)
    values["candidates"]["k"] = changes.pop("k", 2)
    values |= changes
    if values["train"] is None:
        del values["models"]["policy"]
    return values


@pytest.mark.parametrize(
    ("changes", "what", "state", "told"),
    [
        ({}, "prompts of", "ok", ""),
        ({"datasets": LIMITS}, "prompts of", "problem", r"all have more than 2 tokens \(datasets.max_prompt_length\)"),
        ({"datasets": LIMITS, "train": None}, "prompts of", "problem", "no row can be made of them; raise it"),
        ({"val": 0.99}, "prompts of", "problem", "nothing to train on; lower prompts.val_fraction"),
        ({"val": 0.99, "train": None}, "prompts of", "warning", "nothing to train on"),
        ({"k": 1}, "pairs of", "warning", "each prompt has one candidate, so no pair can be made"),
        ({"k": 1, "train": {"method": "dpo"}}, "pairs of", "problem", "set candidates.k to 2 or more"),
        ({"k": 1, "datasets": {"kinds": ["dpo", "sft"]}, "train": None}, "pairs of", "problem", "no pair can be made"),
    ],
)
def test_rows_that_cannot_be_made_are_found(
    changes: dict[str, Any], what: str, state: str, told: str, tmp_path: Path
) -> None:
    found = of(checked(made(**changes), tmp_path, scope="offline"), f"{what} dataset-rows")
    assert found.state == state and re.search(told, found.detail)


def test_the_share_of_prompts_that_are_too_long_is_told(tmp_path: Path) -> None:
    texts = [f"question {n} {'word ' * (600 if n % 4 == 0 else 3)}" for n in range(100)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    prompts = {"sources": [{"type": "text", "path": str(tmp_path / "prompts.txt")}], "num_shards": 2}
    found = of(checked({**made(train=None), "prompts": prompts}, tmp_path, scope="offline"), "prompts of dataset-rows")
    share = int(found.detail.split()[1].rstrip("%"))
    assert found.state == "warning" and 20 <= share <= 30 and "more than 512 tokens" in found.detail


def test_a_run_that_can_make_no_row_starts_nothing(tmp_path: Path) -> None:
    values = made(datasets=LIMITS, train=None)
    told = quorum(*command("run", tmp_path, values, "--executor", "inprocess"), code=2)
    assert "nothing was started" in told and "raise it" in told and not list(tmp_path.glob("run/candidates-*"))

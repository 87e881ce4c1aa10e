"""From the base models that people have to a policy that loads, replies as base + adapter do, and stops."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_pipeline.training.methods import METHODS

from .conftest import MakeSpec, user
from .shapes import FAMILIES, QUIRKS, make_model

pytestmark = pytest.mark.e2e

#: Every family with every quirk once, and every quirk with every method once. With QUORUM_ALL_SHAPES=1, every family
#: with every quirk and every method: five times as many.
POLICIES = [name for name, method in METHODS.items() if method.trains_policy]
TURNS = range(len(POLICIES)) if os.environ.get("QUORUM_ALL_SHAPES") else range(1)
PAIRS = [
    pytest.param(family, quirk, method, id=f"{family}-{quirk}-{method}".replace(" ", "-"))
    for i, family in enumerate(FAMILIES)
    for j, quirk in enumerate(QUIRKS)
    for method in (POLICIES[(i + j + turn) % len(POLICIES)] for turn in TURNS)
]
PROMPT = "add two numbers"


def train(make_spec: MakeSpec, model: str, method: str, scratch: Path, **changes: Any) -> Any:
    """Train on a base, write the policy below `scratch`, and return the figures of its merge."""
    from ray_pipeline.training.save import write_model
    from ray_pipeline.training.trainer import build_trainer

    torch.set_num_threads(1)  # matrices this small only wait for each other
    spec = make_spec(method, model=model, num_workers=1, learning_rate=0.02, **{"epochs": 0.25, **changes})
    spec = dataclasses.replace(spec, output_dir=str(scratch))
    trainer = build_trainer(spec, str(scratch / "scratch"))
    trainer.train()
    return write_model(spec, trainer, lambda kind: kind)


class Says(torch.nn.Module):
    """A logits processor that makes every reply one token and then `token`."""

    def __init__(self, token: int, start: int) -> None:
        super().__init__()
        self._token, self._start = token, start

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] != self._start + 1:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._token] = 0
        return forced


@pytest.mark.parametrize(("family", "quirk", "method"), PAIRS)
def test_a_policy_replies_as_its_adapter_and_stops(
    make_spec: MakeSpec, tmp_path: Path, family: str, quirk: str, method: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = make_model(tmp_path / "base", family, [quirk])
    written = train(make_spec, base, method, tmp_path)
    assert written["adapter_effect"] > 1e-3 > written["max_logit_diff"]

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(user(PROMPT), add_generation_prompt=True, return_tensors="pt")["input_ids"]
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(merged.generate(ids, **greedy), adapted.generate(ids, **greedy))
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
    # A policy of random weights may want to stop at once.
    ended = merged.generate(ids, logits_processor=[Says(end, ids.shape[1])], min_new_tokens=1, **greedy)
    assert ended.shape[1] == ids.shape[1] + 2

"""vLLM serves what a training leaves: the merged model, the adapter on its base, and a wholly trained model."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch

from ray_pipeline.engines.base import Sampling
from ray_pipeline.engines.thoughts import split_thoughts
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.training.spec import TrainResult, TrainSpec
from tests.models import needs_vllm

from .conftest import SFT_SCHEMA, WORDS, MakeSpec, assistant, user, write_rows
from .shapes import FAMILIES, QUIRKS, make_model
from .test_shapes import train

pytestmark = [pytest.mark.e2e, needs_vllm]

PROMPTS = [" ".join(WORDS[i : i + 4]) for i in range(0, 12, 3)]
TOKENS = 12
#: What half a character at the end of a reply becomes; vLLM leaves it out.
CUT = "\N{REPLACEMENT CHARACTER}"


def vllm_replies(model: str, adapter: str | None = None) -> list[str]:
    """Greedy replies of an engine that is started for them."""

    async def ask() -> list[str]:
        engine = VllmEngine(VllmSpec(model, adapter=adapter, dtype="float32", max_model_len=128, canary=False))
        await engine.start()
        try:
            greedy = Sampling(max_tokens=TOKENS)
            replies = await asyncio.gather(*(engine.chat(user(prompt), greedy) for prompt in PROMPTS))
            return [reply.text.rstrip(CUT) for reply in replies]
        finally:
            await engine.close()

    return asyncio.run(ask())


def transformers_replies(model: str) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(user(prompt), add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = policy.generate(ids, do_sample=False, max_new_tokens=TOKENS)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).rstrip(CUT))
    return found


def test_adapter_and_merged_model_reply_alike(finished: tuple[TrainSpec, TrainResult]) -> None:
    spec, result = finished
    merged = vllm_replies(result.merged)
    assert merged == vllm_replies(spec.model, result.adapter) == transformers_replies(result.merged)
    assert merged != transformers_replies(spec.model), "the training changed no reply: the adapter was not tested"


def test_a_wholly_trained_model_is_served(full: tuple[TrainSpec, TrainResult]) -> None:
    spec, result = full
    replies = vllm_replies(result.merged)
    assert replies == transformers_replies(result.merged) != transformers_replies(spec.model)


#: A base whose EOS is not the token that its template puts behind a reply; with QUORUM_ALL_SHAPES=1, every quirk.
BASES = [pytest.param(name, ["base EOS", "no pad"], id=name) for name in FAMILIES]
if os.environ.get("QUORUM_ALL_SHAPES"):
    BASES += [
        pytest.param(name, [quirk], id=f"{name}-{quirk}".replace(" ", "-")) for name in FAMILIES for quirk in QUIRKS
    ]


@pytest.mark.parametrize(("name", "quirks"), BASES)
def test_a_policy_of_every_family_stops(make_spec: MakeSpec, tmp_path: Path, name: str, quirks: list[str]) -> None:
    base = make_model(tmp_path / "base", name, quirks)
    row = {"prompt": user(PROMPTS[0]), "completion": assistant("seven nine"), "final_score": 8.0}
    files = write_rows(tmp_path / "rows.parquet", [row] * 80, SFT_SCHEMA)
    written = train(make_spec, base, "sft", tmp_path, train_files=files, epochs=1)
    assert written["max_logit_diff"] < 1e-3
    merged = str(tmp_path / "merged")
    replies = vllm_replies(merged)
    expected = transformers_replies(merged)
    if quirks == ["drops thoughts"]:  # its replies begin with an empty thought, for which these tokens do not suffice
        assert replies == [split.answer if (split := split_thoughts(text)) else text for text in expected]
    else:
        assert replies == expected and replies[0].strip() == "seven nine"
    # Once, as it starts another engine: this base's generation config lacks the end of its own template's replies.
    if name == "qwen3" and quirks == ["base EOS", "no pad"]:
        assert vllm_replies(base, str(tmp_path / "adapter")) == replies

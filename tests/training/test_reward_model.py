"""A reward model from pairs to verdicts: trained, merged, served by vLLM's pooling, and asked as a judge."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.data.rewards import REWARDS, RewardJudge, _Judging
from ray_pipeline.engines.base import EngineStartError, Sampling
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.graph.stage import ShardInput
from ray_pipeline.pocket import model_path
from ray_pipeline.pocket.pairs import make_pairs
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import digest, prompt_id
from ray_pipeline.store.schemas import CANDIDATES, PROMPTS, to_table
from ray_pipeline.training.fit import fit
from ray_pipeline.training.spec import TrainResult
from tests.models import needs_vllm

from .conftest import DPO_SCHEMA, MakeSpec, assistant, user, write_rows

pytestmark = [pytest.mark.e2e, needs_vllm]


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for item in make_pairs(count, seed):
        right, wrong = (
            item[f"response_{side}"] for side in (item["human_label"].lower(), "ab".strip(item["human_label"].lower()))
        )
        rows.append(
            {"prompt": user(item["question"]), "chosen": assistant(right), "rejected": assistant(wrong), "gap": 2.0}
        )
    return rows


HELD_OUT = pairs(120, seed=12)


@pytest.fixture(scope="module")
def trained(make_spec: MakeSpec, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    data = tmp_path_factory.mktemp("pairs")
    learning = {"num_workers": 1, "batch_size": 8, "global_batch": 16, "learning_rate": 5e-4, "epochs": 2}
    spec = make_spec(
        "reward",
        model=model_path("pocket:policy"),
        train_files=write_rows(data / "train.parquet", pairs(420, seed=11), DPO_SCHEMA),
        max_length=128,
        lora={"r": 16, "alpha": 32, "dropout": 0.05},
        **{**learning, "save_steps": 50},
    )
    return fit(dataclasses.replace(spec, val_files=write_rows(data / "val.parquet", HELD_OUT, DPO_SCHEMA)))


def tables() -> dict[str, Any]:
    """Two candidates a prompt, the right one second."""
    prompts, candidates = [], []
    for row in HELD_OUT:
        own = prompt_id(row["prompt"])
        prompts.append(
            {
                "prompt_id": own,
                "messages": row["prompt"],
                "source": "pocket",
                "task_type": "",
                "split": "val",
                "meta": "{}",
            }
        )
        for k, column in enumerate(("rejected", "chosen")):
            counts = {"prompt_tokens": 0, "completion_tokens": 0, "finish_reason": "stop", "generator": "pairs"}
            text = row[column][0]["content"]
            candidates.append(
                {"candidate_id": digest([own, k]), "prompt_id": own, "k": k, "seed": k, "response": text, **counts}
            )
    return {"prompts": to_table(prompts, PROMPTS), "candidates": to_table(candidates, CANDIDATES)}


def test_it_orders_held_out_pairs_and_its_rewards_are_logged(trained: TrainResult, tmp_path: Path) -> None:
    evaluated = [row for row in trained.metrics.to_pylist() if row["split"] == "eval"]
    assert evaluated[-1]["rewards_accuracies"] > 0.7 and evaluated[-1]["rewards_margins"] > 0
    assert trained.max_logit_diff is not None and trained.max_logit_diff < 1e-3 < trained.effective["adapter_effect"]
    settings = _Judging(answers=("candidates",), judge=RewardJudge(name="pairs", model="reward"))
    engine = VllmEngine(VllmSpec(str(trained.merged), dtype="float32", max_model_len=128))

    async def judged(**how: Any) -> list[dict[str, Any]]:
        async with LoggedEngine(engine, Folder(str(tmp_path)), 0, 1, **how) as log:
            given = ShardInput(0, 1, tables(), {}, log, settings, lambda n: None, lambda name, read: None)
            output = await REWARDS(given)
            assert how or log.stats.completion_tokens == 0 < log.stats.prompt_tokens
            return output.tables["verdicts"].to_pylist()

    async def run() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        try:
            first = await judged()
            with pytest.raises(EngineStartError, match="scores whole chats and writes no text"):
                await engine.chat(HELD_OUT[0]["prompt"], Sampling(max_tokens=8))
        finally:
            await engine.close()
        return first, await judged(replay_only=True)  # the engine has ended

    verdicts, again = asyncio.run(run())
    assert verdicts == again and len(verdicts) == 2 * len(HELD_OUT)
    assert {row["parse_status"] for row in verdicts} == {"ok"}
    right = [row["score"] == 10.0 for row in verdicts[1::2]]
    assert sum(right) / len(right) == pytest.approx(evaluated[-1]["rewards_accuracies"], abs=0.05)

    rewards = {row["candidate_id"]: float(row["raw"]) for row in verdicts}
    for row in HELD_OUT[:8]:
        for k, column in enumerate(("rejected", "chosen")):
            found = rewards[digest([prompt_id(row["prompt"]), k])]
            assert found == pytest.approx(
                in_transformers(str(trained.merged), [*row["prompt"], *row[column]]), abs=1e-3
            )


def in_transformers(model: str, chat: list[dict[str, str]]) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(scorer(input_ids=ids).logits[0, 0])

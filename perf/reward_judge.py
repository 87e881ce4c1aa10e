"""Candidates a second of a reward judge over a generative judge of the same size, in one run.

    python perf/reward_judge.py [--prompts 300] [--rounds 3]

Both judge the same candidates of the pocket world through the stage's own code and the call log, each on its own vLLM
engine: the demo's judge with one rubric and its text, and the same weights with one output in place of the head that
writes. The sides take turns with an empty call log, and starts are left out. Speed does not depend on what a model has
learned, so that the output is not trained here.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from overhead import K, inputs

from ray_pipeline.config.loading import load_config
from ray_pipeline.data.judging import judges
from ray_pipeline.engines.logged import LoggedEngine
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.graph.stage import ShardInput, ShardWork, Stage, WholeWork
from ray_pipeline.pocket import model_path
from ray_pipeline.store.files import Folder
from ray_pipeline.store.tables import ShardedTable
from ray_pipeline.workflow.dmapo_config import DmapoConfig


def reward_model(folder: Path) -> str:
    """The demo's judge with one output."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = model_path("pocket:judge")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


async def run_stage(stage: Stage, engine: VllmEngine, tables: dict[str, ShardedTable], log: Path) -> float:
    """Seconds for all verdicts."""
    begin = time.monotonic()
    async with LoggedEngine(
        engine, Folder(str(log)), 0, 1, limit=asyncio.Semaphore(engine.useful_concurrency)
    ) as logged:
        read = {name: table.read(0) for name, table in tables.items()}
        given = ShardInput(0, 1, read, {}, logged, stage.work.settings, lambda n: None, lambda name, read: None)
        output = await stage.work.function(given)
    seconds = time.monotonic() - begin
    rows = output.tables["verdicts"].to_pylist()
    assert all(row["parse_status"] in ("ok", "repaired", "unparsed") for row in rows), rows[0]
    return seconds


async def measure(config: DmapoConfig, folder: Path, prompts: int, rounds: int) -> None:
    nothing = Stage("nothing", WholeWork(lambda given: {}), {})
    stages = judges(config.judge, config.models, config.templates(), nothing, {"candidates": nothing})
    sides: dict[str, tuple[Stage, VllmEngine]] = {}
    for name, stage in zip(("generative", "reward"), stages, strict=True):
        assert isinstance(stage.work, ShardWork) and stage.work.engine is not None
        engine: Any = stage.work.engine()
        await engine.start()
        sides[name] = stage, engine
    tables, candidates = inputs(folder / "tables", prompts, 1), prompts * K
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):  # the first round warms up
        for name, (stage, engine) in sides.items():
            seconds = await run_stage(stage, engine, tables, folder / f"calls-{number}-{name}")
            if number >= 0:
                rates[name].append(candidates / seconds)
    for _, engine in sides.values():
        await engine.close()
    print(f"{candidates} candidates, {rounds} rounds, candidates/s:")
    for name, found in rates.items():
        print(f"  {name:<12} {statistics.median(found):8.0f}   ({min(found):.0f} to {max(found):.0f})")
    ratios = [new / old for new, old in zip(rates["reward"], rates["generative"], strict=True)]
    print(f"  ratio of a round: median {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        served = f"{{model: {reward_model(folder / 'reward')}, dtype: float32, max_model_len: 256}}"
        config = load_config(
            DmapoConfig, "pocket", [f"models.reward={served}", "judge.rewards=[{name: r, model: reward}]"]
        )
        first = config.judge.rubrics[0].model_copy(update={"model": "judge"})
        judge = config.judge.model_copy(update={"rubrics": (first,), "layout": "shared_first"})
        config = config.model_copy(update={"judge": judge})
        asyncio.run(measure(config, folder, args.prompts, args.rounds))


if __name__ == "__main__":
    main()

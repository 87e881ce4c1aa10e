"""What the pipeline costs over the engine: the judge stage's calls/s through Ray Data, store and call log, over the
same requests sent to vLLM alone (`perf/bare.py`).

    python perf/overhead.py [--prompts 1200] [--rounds 3]

Engine start is left out on both sides, the call log is empty in every round, and the two sides take turns, so that a
machine whose speed drifts slows both. Prints one table; the median ratio is the figure.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from bare import bare_loop, in_own_process

from ray_pipeline.agents.judges import judge
from ray_pipeline.config.loading import load_config
from ray_pipeline.data.judging import judges
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.vllm import VllmEngine
from ray_pipeline.engines.vllm_spec import VllmSpec
from ray_pipeline.graph.cluster import start_ray
from ray_pipeline.graph.failures import FailureSettings
from ray_pipeline.graph.ray_shards import map_shards
from ray_pipeline.graph.receipts import Receipt
from ray_pipeline.graph.session import Session, StageTask
from ray_pipeline.graph.stage import ShardWork, Stage, StageRef, StageResult, WholeWork
from ray_pipeline.pocket.responses import policy_response
from ray_pipeline.pocket.tasks import make_prompts
from ray_pipeline.store.keys import digest, prompt_id, shard_of
from ray_pipeline.store.schemas import CANDIDATES, PROMPTS, to_table
from ray_pipeline.store.tables import ShardedTable
from ray_pipeline.workflow.dmapo_config import DmapoConfig

K = 4


class TimedEngine(VllmEngine):
    """The engine as it is, with a note of the moment at which it was ready (one clock for the whole machine)."""

    def __init__(self, spec: VllmSpec, note: str) -> None:
        super().__init__(spec)
        self._note = Path(note)

    async def start(self) -> None:
        await super().start()
        if not self._note.exists():
            self._note.write_text(repr(time.monotonic()))


class Recorder:
    """Stands where the engine stands and writes down what the judges ask."""

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {}
        self.asked: list[tuple[list[Message], Sampling]] = []

    async def chat(self, messages: Any, sampling: Sampling) -> Completion:
        self.asked.append(([dict(m) for m in messages], sampling))
        return Completion('{"reason": "", "score": 5}', "stop", 0, 0, 0)


def inputs(folder: Path, prompts: int, num_shards: int) -> dict[str, ShardedTable]:
    """Tables of prompts and candidates, as the stages before would have written them."""
    rng = random.Random(0)
    asked, answered = [], []
    for prompt in make_prompts(prompts, seed=7):
        messages = [{"role": "user", "content": prompt.instruction}]
        pid = prompt_id(messages)
        asked.append(
            {
                "prompt_id": pid, "messages": messages, "source": "pocket", "task_type": prompt.task_type,
                "split": "train", "meta": "{}",
            }
        )  # fmt: skip
        for k in range(K):
            text = policy_response(prompt.instruction, rng)
            answered.append(
                {
                    "candidate_id": digest([pid, k]), "prompt_id": pid, "k": k, "seed": k, "response": text,
                    "finish_reason": "stop", "generator": "benchmark", "prompt_tokens": 0, "completion_tokens": 0,
                }
            )  # fmt: skip
    tables = {}
    for kind, rows, schema in (("prompts", asked, PROMPTS), ("candidates", answered, CANDIDATES)):
        table = ShardedTable(str(folder / kind), kind, num_shards, "benchmark")
        for shard in range(num_shards):
            table.write(shard, to_table([r for r in rows if shard_of(r["prompt_id"], num_shards) == shard], schema))
        tables[kind] = table
    return tables


def judge_stage(config: DmapoConfig) -> Stage:
    nothing = Stage("nothing", WholeWork(lambda given: {}), {})
    (stage,) = judges(config.judge, config.models, config.templates(), nothing, {"candidates": nothing})
    return stage


async def requests(config: DmapoConfig, tables: dict[str, ShardedTable]) -> list[tuple[list[Message], Sampling]]:
    """What the judge stage asks, in its order; candidates that read the same are asked about once, as there."""
    recorder = Recorder()
    template = config.templates().judge
    for shard in range(tables["prompts"].num_shards):
        messages = {row["prompt_id"]: row["messages"] for row in tables["prompts"].read(shard).to_pylist()}
        for row in tables["candidates"].read(shard).to_pylist():
            for rubric in config.judge.rubrics:
                await judge(
                    recorder, messages[row["prompt_id"]], row["response"], rubric, template,
                    config.judge.sampling, config.judge.asking, config.judge.layout,
                )  # fmt: skip
    return list({digest(messages): (messages, sampling) for messages, sampling in recorder.asked}.values())


def through_the_pipeline(config: DmapoConfig, tables: dict[str, ShardedTable], folder: Path) -> tuple[float, int]:
    """Seconds from the engine's start to the last committed shard, and calls."""
    stage, note = judge_stage(config), folder / "ready"
    assert isinstance(stage.work, ShardWork)
    spec = config.models["judge"].spec()
    work = dataclasses.replace(stage.work, engine=functools.partial(TimedEngine, spec, str(note)))
    shards = tables["prompts"].num_shards
    inputs = {
        role: StageResult(role, table.fingerprint, table.folder, shards, (table.kind,), {}, {})
        for role, table in tables.items()
    }
    ref = StageRef("judge", "benchmark", str(folder / "judge"), shards, work.tables)
    failure = FailureSettings(max_error_rate=1.0)
    task = StageTask(ref, work, inputs, Session(str(folder), str(folder / "calls"), shards, failure))
    calls = 0

    def take(receipt: Receipt) -> None:
        nonlocal calls
        assert receipt.status == "ok", receipt.error
        calls += int(receipt.usage["calls_engine"])

    map_shards([task], [("judge", shard) for shard in range(shards)], take)
    return time.monotonic() - float(note.read_text()), calls


def main() -> None:
    parser = argparse.ArgumentParser(description="pipeline calls/s over bare engine calls/s")
    parser.add_argument("--prompts", type=int, default=1200, help="4 candidates each, 3 judges")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = load_config(DmapoConfig, "tests/one_judge.yaml", ["judge.asking.retries=0"])
    judging = config.models["judge"]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        tables = inputs(Path(folder), arguments.prompts, config.prompts.num_shards)
        asked = asyncio.run(requests(config, tables))
        print(f"{len(asked)} calls, {config.prompts.num_shards} shards, {arguments.rounds} rounds")
        print(f"{'round':>5} {'pipeline calls/s':>17} {'bare loop calls/s':>18} {'ratio':>6}")
        for number in range(arguments.rounds):
            start_ray({})
            seconds, calls = through_the_pipeline(config, tables, Path(folder) / f"round-{number}")
            ray.shutdown()
            bare = in_own_process(bare_loop, judging.spec(), asked).wall_seconds
            assert calls == len(asked), f"the pipeline made {calls} calls, not {len(asked)}"
            ours, theirs = calls / seconds, len(asked) / bare
            figures.append(ours / theirs)
            print(f"{number:>5} {ours:>17.1f} {theirs:>18.1f} {ours / theirs:>6.3f}", flush=True)
    print(f"median ratio {statistics.median(figures):.3f}")


if __name__ == "__main__":
    main()

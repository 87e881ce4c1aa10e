"""Ready completions through judges, gate and datasets: rows lost, peak memory and seconds of each stage.

python perf/own_candidates.py [--sizes 4000,16000] [--per-shard 500] [--folder DIR] [--seconds 450]

Each size runs the stages from `candidates.source` to the training files in one process of its own (the in-process
executor), with an engine that replies from a script and takes no time. So the seconds are the pipeline's: reading,
rendering, call log, parsing, tables. Shards have the same size whatever the number of completions: memory that grows
with the number is memory that some stage holds for the whole run. The file is written before, by another process.
Tokens are counted by words. Prompts have 1 to 7 completions of 60 to 180 words, 4 on average. The last line is for
256,000 completions; it is extrapolated from the two largest sizes unless one of them is that many.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_pipeline.agents.judges import Rubric
from ray_pipeline.agents.templates import load_templates
from ray_pipeline.data import datasets
from ray_pipeline.data.candidate_sources import CandidatePrompts, FileCandidates
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.judging import JudgeSettings, judges
from ray_pipeline.data.own_candidates import own_candidates
from ray_pipeline.data.prompts import PromptsConfig, prompts
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.engines.base import Completion, Message, Sampling
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import ShardWork, Stage, StageResult

WHOLE = 256_000
JUDGES = ["helpfulness", "factuality", "conciseness"]
WORDS = ["the", "answer", "depends", "on", "what", "was", "asked", "and", "why", "it", "holds", "here", "or", "there"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4000,16000", help="completions")
    parser.add_argument("--per-shard", type=int, default=500, help="completions of a shard, about")
    parser.add_argument("--folder", type=Path, default=Path("runs/own-candidates"))
    parser.add_argument("--seconds", type=float, default=450.0, help="for one call of this command")
    parser.add_argument("--work", choices=["make", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        folder = given.folder.resolve() / str(given.size)
        make(folder, given.size) if given.work == "make" else run(folder, given.size, given.per_shard)
        return
    end = time.monotonic() + given.seconds
    sizes = [int(size) for size in given.sizes.split(",")]
    for size in sizes:
        for step in ("make", "run"):
            if (given.folder / str(size) / f"{step}.json").exists():
                continue
            own = ["--work", step, "--size", str(size), "--folder", str(given.folder)]
            command = [sys.executable, __file__, *own, "--per-shard", str(given.per_shard)]
            try:
                subprocess.run(command, check=True, timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{size}: {step} is not done after {given.seconds:.0f} s; the same command resumes it")
                sys.exit(3)
    show([json.loads((given.folder / str(size) / "run.json").read_text()) for size in sizes])


def make(folder: Path, size: int) -> None:
    """A JSONL file in UltraFeedback's shape, one row a prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, written, row = random.Random(size), 0, 0
    with open(folder / "own.jsonl", "w") as file:
        while written < size:
            count = min(rng.randint(1, 7), size - written)
            answers = [
                {
                    "model": f"model-{k}",
                    "response": " ".join(rng.choices(WORDS, k=rng.randint(60, 180))) + f" {row}.{k}",
                }
                for k in range(count)
            ]
            question = f"question {row} " + " ".join(rng.choices(WORDS, k=20))
            file.write(json.dumps({"instruction": question, "completions": answers}) + "\n")
            written, row = written + count, row + 1
    (folder / "make.json").write_text("{}")


class Scripted:
    """Scores that follow from the text; the judges of an answer mostly agree."""

    identity: Mapping[str, Any] = {"engine": "scripted", "model": "scripted"}

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        text = messages[-1]["content"]
        number = hashlib.blake2b(text.encode(), digest_size=4).digest()
        level = 8 if text.count("the ") % 2 else 2
        score = level + (number[0] % 2 if number[1] > 16 else -1)
        return Completion(json.dumps({"reason": f"because {number.hex()}", "score": score}), "stop", 300, 12, 0)


def run(folder: Path, size: int, per_shard: int) -> None:
    """All stages in this process, on top of what an interrupted call has left."""
    datasets.token_counter = lambda tokenizer: words  # type: ignore[assignment]
    shards = 2 ** min(10, max(0, (size // per_shard).bit_length() - 1))
    stages = wired(folder, shards)
    session = Session(str(folder), str(folder / "calls"), shards)
    results: dict[str, StageResult] = {}
    loaded, peaks = peak(), dict[str, int]()
    for stage in stages:
        make_here([stage], session, results, print)
        peaks[stage.name] = peak()
    seconds = {name: result.usage.wall_seconds for name, result in results.items()}
    kto = results["datasets"].facts["counts"]["kto"]
    labels = results["gate"].facts["counts"]
    rows = {
        "candidates": results["candidates"].rows["candidates"],
        "verdicts": results["judge"].rows["verdicts"] / len(JUDGES),
        "decisions": results["gate"].rows["decisions"],
        "KTO rows and those left out for a reason": kto["kept"]
        + sum(kto["dropped"].values())
        + sum(labels[name] for name in ("discard", "abstain", "incomplete")),
    }
    written = {kind: sizes["train"] + sizes["val"] for kind, sizes in results["datasets"].facts["rows"].items()}
    found = {"size": size, "shards": shards, "rows": rows, "written": written, "loaded": loaded, "peaks": peaks}
    in_flight = max(stage.work.placement.shards_in_flight for stage in stages if isinstance(stage.work, ShardWork))
    (folder / "run.json").write_text(json.dumps({**found, "seconds": seconds, "in_flight": in_flight}))


def wired(folder: Path, shards: int) -> list[Stage]:
    weights = folder / "model"
    weights.mkdir(exist_ok=True)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"none")
    model = ModelSettings(model=str(weights))
    source = FileCandidates(type="jsonl", path=str(folder / "own.jsonl"))
    asked = prompts(PromptsConfig(sources=[CandidatePrompts(source=source)], num_shards=shards))
    answers = own_candidates(source, asked)
    settings = JudgeSettings(
        rubrics=tuple(Rubric(name=name, text=f"Is it good in {name}?") for name in JUDGES), layout="shared_first"
    )
    template = load_templates("default").judge
    verdicts = [
        dataclasses.replace(stage, work=dataclasses.replace(stage.work, engine=functools.partial(Scripted)))
        for stage in judges(settings, {"judge": model}, template, asked, {"candidates": answers})
    ]
    dataset = ScoredDataset(JUDGES, GateConfig(use_critic=False), model, {"datasets": DatasetsConfig()})
    decisions = dataset.decide(answers, verdicts, None)
    return [asked, answers, *verdicts, decisions, *dataset.write(asked, answers, verdicts, decisions)]


def words(messages: Any, completion: Any = None) -> list[int]:
    """One token a word; equal texts have equal tokens."""
    return [hash(word) for message in [*messages, *(completion or ())] for word in message["content"].split()]


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(runs: list[dict[str, Any]]) -> None:
    for one in runs:
        lost = {name: one["size"] - int(rows) for name, rows in one["rows"].items()}
        took = one["seconds"]
        print(f"{one['size']:,} completions, {one['shards']} shards, {one['in_flight']} in flight")
        print(f"  lost: {', '.join(f'{name} {count}' for name, count in lost.items())}")
        print(f"  written: {', '.join(f'{kind} {rows:,}' for kind, rows in one['written'].items())}")
        print(f"  libraries {one['loaded'] / 2**20:.0f} MiB; peak after each stage, and its seconds:")
        for name, bytes_ in one["peaks"].items():
            print(f"    {name:<14}{bytes_ / 2**20:>8.0f} MiB{took[name]:>9.1f} s")
        total = sum(took.values())
        print(f"  {total:.0f} s, {len(JUDGES) * one['size'] / took['judge']:.0f} judgements/s")
    last, whole = runs[-1], next((one for one in runs if one["size"] == WHOLE), None)
    if whole is None and len(runs) > 1:
        before = runs[-2]
        grown = max(0, max(last["peaks"].values()) - max(before["peaks"].values())) / (last["size"] - before["size"])
        memory = (max(last["peaks"].values()) + grown * (WHOLE - last["size"])) / 2**20
        seconds = sum(last["seconds"].values()) * WHOLE / last["size"]
        print(f"{WHOLE:,} completions, extrapolated: {seconds / 60:.0f} min, peak {memory:.0f} MiB")


if __name__ == "__main__":
    main()

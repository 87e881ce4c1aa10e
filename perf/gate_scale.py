"""Synthetic verdicts through the gate and the datasets: peak memory and cost a row, from 10 k to 1 M candidates.

python perf/gate_scale.py [--sizes 10000,100000,1000000] [--folder DIR] [--seconds 220]
python perf/gate_scale.py --pool one_coin --judges 10 --sizes 1000000 --folder runs/posterior-scale

Each size runs the stages of a run (`gate`, `dataset-rows`, `datasets`) in a process of its own, shard after shard,
whose peak memory is measured. Tables are made before, by another process. Tokens are counted by words: how long a
tokenizer takes is not asked here. A size that is not done within --seconds goes on when the command is repeated: shards
that are there are kept, and the times of all add up (peak memory is of the process that ended it). The table and
the charts `gate_scale_cost.svg` and `gate_scale_memory.svg` come when all sizes are done. With --pool, the gate alone
runs, with posteriors, and the time and memory of these are compared with their limits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ray_pipeline.data import datasets
from ray_pipeline.data.dataset_rows import DatasetsConfig
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.scored import ScoredDataset
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import Stage, StageRef, StageResult, WholeWork
from ray_pipeline.report.charts import Series, lines, standalone
from ray_pipeline.store.schemas import CANDIDATES, CRITIQUES, PROMPTS, VERDICTS

JUDGES = ["helpfulness", "factuality", "conciseness"]
K = 4
#: Candidates of one shard, about; what is in memory at once does not grow with the run.
SHARD = 16_000
#: Peak memory that must hold at a million candidates.
LIMIT = 3 * 2**30
#: Limits of the posteriors of a million candidates of ten judges: seconds, and peak memory.
POSTERIOR_SECONDS, POSTERIOR_LIMIT = 60, 4 * 2**30
#: How much more a row may cost at the largest size than at the cheapest one.
FLAT = 1.25
WORDS = np.array(["the", "answer", "depends", "on", "what", "was", "asked", "and", "why", "it", "holds", "here"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--folder", type=Path, default=Path("runs/gate-scale"))
    parser.add_argument("--seconds", type=float, default=220.0, help="for one call of this command")
    parser.add_argument("--judges", type=int, default=len(JUDGES))
    parser.add_argument("--pool", choices=["one_coin", "dawid_skene"], help="posteriors by this model; the gate alone")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    judges = [*JUDGES, *(f"judge-{n}" for n in range(len(JUDGES), given.judges))][: given.judges]
    if given.work:
        folder = given.folder.resolve() / str(given.size)
        if given.work == "make":
            make(folder, given.size, judges)
        else:
            run(folder, given.size, judges, given.pool)
        return
    end = time.monotonic() + given.seconds
    sizes = [int(size) for size in given.sizes.split(",")]
    for size in sizes:
        for step in ("make", "run"):
            command = [sys.executable, __file__, "--work", step, "--size", str(size), "--folder", str(given.folder)]
            command += ["--judges", str(given.judges), *(["--pool", given.pool] if given.pool else [])]
            if (given.folder / str(size) / f"{step}.json").exists():
                continue
            try:
                subprocess.run(command, check=True, timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{size}: {step} is not done after {given.seconds:.0f} s; the same command goes on")
                sys.exit(3)
    (show_posteriors if given.pool else show)(given.folder, sizes)


def num_shards(size: int) -> int:
    return 2 ** max(0, round(np.log2(size / SHARD)))


# --- tables ---------------------------------------------------------------------------------------------------------


def make(folder: Path, size: int, judges: list[str]) -> None:
    """The four tables that the gate reads, seeded, with every label."""
    shards, stages = num_shards(size), parents()
    for shard in range(shards):
        count = size // K // shards + (shard < size // K % shards)
        for name, table in shard_tables(shard, count, judges).items():
            target = StageRef.of(stages[name], str(folder), shards).table()
            if not os.path.exists(f"{target.folder}/shard-{shard:05d}.parquet"):
                target.write(shard, table)
    (folder / "make.json").write_text("{}")


def kind_of(stage: str) -> str:
    return {"judge": "verdicts", "critic": "critiques"}.get(stage, stage)


def parents() -> dict[str, Stage]:
    """Stages whose tables are there: what `quorum run` would have made."""
    found = {}
    for name in ("prompts", "candidates", "judge", "critic"):
        stage = Stage(name, WholeWork(lambda given: {}, tables=(kind_of(name),)), None)
        stage.__dict__["fingerprint"] = "made"
        found[name] = stage
    return found


def shard_tables(shard: int, prompts: int, judges: list[str]) -> dict[str, pa.Table]:
    rng = np.random.default_rng(shard)
    ids = [f"{shard:08x}{i:024x}" for i in range(prompts)]
    names = [f"{shard:08x}{i:020x}{k:04x}" for i in range(prompts) for k in range(K)]
    owner = [p for p in ids for _ in range(K)]
    questions = [" ".join(WORDS[row]) for row in rng.integers(0, len(WORDS), (prompts, 20))]
    texts = [" ".join(WORDS[row]) for row in rng.integers(0, len(WORDS), (len(names), 60))]
    level = rng.choice([2, 3, 5, 8, 9], len(names))
    scores = np.clip(level[:, None] + rng.choice([-1, 0, 0, 1, 1], (len(names), len(judges))), 1, 10).astype(float)
    scores[rng.random(len(names)) < 0.1, 0] = 1
    columns: dict[str, dict[str, Any]] = {
        "prompts": {
            "prompt_id": ids,
            "messages": [[{"role": "user", "content": q}] for q in questions],
            "split": ["val" if i % 20 == 0 else "train" for i in range(prompts)],
        },
        "candidates": {
            "candidate_id": names,
            "prompt_id": owner,
            "response": [f"{i} {text}" for i, text in enumerate(texts)],
            "finish_reason": ["stop"] * len(names),
        },
        "judge": {
            "candidate_id": [n for n in names for _ in judges],
            "prompt_id": [p for p in owner for _ in judges],
            "judge": judges * len(names),
            "score": scores.reshape(-1).tolist(),
            "parse_status": ["ok"] * (len(names) * len(judges)),
        },
        "critic": {
            "candidate_id": names,
            "prompt_id": owner,
            "flawed": (rng.random(len(names)) < 0.25).tolist(),
            "parse_status": ["ok"] * len(names),
        },
    }
    schemas = {"prompts": PROMPTS, "candidates": CANDIDATES, "judge": VERDICTS, "critic": CRITIQUES}
    return {name: _filled(values, schemas[name]) for name, values in columns.items()}


def _filled(values: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns that no stage here reads are null, or a plain value where null is not allowed."""
    rows = len(next(iter(values.values())))
    plain = {pa.string(): "x", pa.int32(): 0, pa.int64(): 0}
    columns = [values[f.name] if f.name in values else [None if f.nullable else plain[f.type]] * rows for f in schema]
    return pa.table([pa.array(v, f.type) for v, f in zip(columns, schema, strict=True)], schema=schema)


# --- the stages -------------------------------------------------------------------------------------------------------


def words(messages: Any, completion: Any = None) -> list[int]:
    """One token a word; equal texts have equal tokens."""
    chat = [*messages, *(completion or ())]
    return [hash(word) for message in chat for word in message["content"].split()]


def run(folder: Path, size: int, judges: list[str], pool: Literal["one_coin", "dawid_skene"] | None) -> None:
    """Gate and datasets, or the gate alone with posteriors, in this process, on top of what an interrupted call has
    left."""
    datasets.token_counter = lambda tokenizer: words  # type: ignore[assignment]
    shards, before = num_shards(size), parents()
    results = {
        name: StageResult(name, "made", str(folder / s.folder_name), shards, s.work.tables, {}, {})
        for name, s in before.items()
    }
    weights = folder / "policy"
    weights.mkdir(exist_ok=True)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"none")
    asked, answers, verdicts = before["prompts"], before["candidates"], [before["judge"]]
    config = GateConfig(pool=pool, kind="posterior") if pool else GateConfig()
    dataset = ScoredDataset(judges, config, ModelSettings(model=str(weights)), {"datasets": DatasetsConfig()})
    decisions = dataset.decide(answers, verdicts, before["critic"])
    if pool:
        steps = [decisions.inputs["numbers"], decisions]
    else:
        steps = [decisions, *dataset.write(asked, answers, verdicts, decisions)]
    # Peak memory of this process so far is that of the libraries.
    loaded = peak()
    session = Session(str(folder), str(folder / "calls"), shards)
    make_here(steps, session, results, print)
    stats: dict[str, Any] = {"judges": len(judges), "shards": shards, "loaded": loaded, "peak": peak()}
    if pool:
        seconds = {"gate": results["gate-numbers"].usage.seconds, "posterior": results["gate"].usage.wall_seconds}
    else:
        stats["rows"] = results["datasets"].facts["rows"]
        seconds = {
            "gate": results["gate"].usage.seconds,
            "dataset-rows": results["dataset-rows"].usage.seconds,
            "datasets": results["datasets"].usage.wall_seconds,
        }
    (folder / "run.json").write_text(json.dumps({**stats, "seconds": seconds}))


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- for readers ------------------------------------------------------------------------------------------------------


def show_posteriors(folder: Path, sizes: list[int]) -> None:
    print("| candidates | judges | published numbers, s | posteriors, s | peak MiB |")
    print("|---:|---:|---:|---:|---:|")
    for size in sizes:
        r = json.loads((folder / str(size) / "run.json").read_text())
        gate, posterior = r["seconds"]["gate"], r["seconds"]["posterior"]
        print(f"| {size:,} | {r['judges']} | {gate:.1f} | {posterior:.1f} | {r['peak'] / 2**20:,.0f} |")
        if posterior > POSTERIOR_SECONDS or r["peak"] > POSTERIOR_LIMIT:
            sys.exit(f"over {POSTERIOR_SECONDS} s or {POSTERIOR_LIMIT / 2**30:g} GiB at {size:,} candidates")


def show(folder: Path, sizes: list[int]) -> None:
    found = {size: json.loads((folder / str(size) / "run.json").read_text()) for size in sizes}
    print(
        "| candidates | shards | KTO rows | pairs | gate µs/row | rows µs/row | files µs/row | all µs/row | peak MiB |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    cost = []
    for size, r in found.items():
        of = {name: 1e6 * seconds / size for name, seconds in r["seconds"].items()}
        cost.append(sum(of.values()))
        kept = {kind: rows["train"] + rows["val"] for kind, rows in r["rows"].items()}
        steps = " | ".join(f"{value:.1f}" for value in [*of.values(), cost[-1]])
        print(f"| {size:,} | {r['shards']} | {kept['kto']:,} | {kept['dpo']:,} | {steps} | {r['peak'] / 2**20:,.0f} |")
    at = [math.log10(size) for size in sizes]
    memory = [r["peak"] / 2**20 for r in found.values()]
    charts = {
        "cost": lines("µs per candidate, gate and datasets", [Series("cost", "blue", at, cost)], "log10 of candidates"),
        "memory": lines(
            "Peak memory, MiB",
            [
                Series("peak", "blue", at, memory),
                Series("limit", "grey", at, [LIMIT / 2**20] * len(at), dashed=True),
            ],
            "log10 of candidates",
        ),
    }
    for name, chart in charts.items():
        if chart is not None:
            path = folder / f"gate_scale_{name}.svg"
            path.write_text(standalone(chart), encoding="utf-8")
            print(f"chart: {path}")
    over = [size for size, r in found.items() if r["peak"] > LIMIT]
    if over:
        sys.exit(f"over {LIMIT / 2**30:g} GiB at {over[0]:,} candidates")
    if cost[-1] > FLAT * min(cost):
        sys.exit(
            f"a row costs {cost[-1] / min(cost):.2f} times as much at {sizes[-1]:,} candidates as where it is least"
        )


if __name__ == "__main__":
    main()

"""Ready completions through judges at an endpoint, gate and datasets: rows lost, peak memory and seconds of each stage.

python perf/own_candidates.py [--sizes 4000,16000] [--per-shard 500] [--judges 3] [--folder DIR]

Each size runs `dmapo` with `candidates.source` and `train: null` in one process of its own (the in-process executor).
The judges are at an OpenAI-compatible server on loopback, in a process of its own, which answers every request after
0.02 s with a score that follows from the text. So the seconds are those of the pipeline and of HTTP. Shards have the
same size whatever the number of completions: memory that grows with the number is memory that some stage holds for the
whole run. The peak is measured for each stage (Linux: it is reset in /proc). The file is written before, by another
process. Prompts have 1 to 7 completions of 60 to 180 words, 4 on average. A size that is done is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from endpoint import serve

from dags.dmapo import dmapo
from ray_pipeline.graph.in_process import make_here
from ray_pipeline.graph.session import Session
from ray_pipeline.graph.stage import ShardWork, StageResult
from ray_pipeline.workflow.dmapo_config import DmapoConfig

JUDGES = ["helpfulness", "factuality", "conciseness"]
WAIT = 0.02
WORDS = ["the", "answer", "depends", "on", "what", "was", "asked", "and", "why", "it", "holds", "here", "or", "there"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="4000,16000", help="completions")
    parser.add_argument("--per-shard", type=int, default=500, help="completions of a shard, about")
    parser.add_argument("--judges", type=int, choices=[1, 2, 3], default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/own-candidates"))
    parser.add_argument("--work", choices=["make", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        folder = given.folder.resolve() / str(given.size)
        make(folder, given.size) if given.work == "make" else run(folder, given.size, given.per_shard, given.judges)
        return
    for size in map(int, given.sizes.split(",")):
        done = given.folder / str(size) / "run.json"
        for step in () if done.exists() else ("make", "run"):
            own = ["--work", step, "--size", str(size), "--folder", str(given.folder), "--judges", str(given.judges)]
            subprocess.run([sys.executable, __file__, *own, "--per-shard", str(given.per_shard)], check=True)
        show(json.loads(done.read_text()))


def make(folder: Path, size: int) -> None:
    """A JSONL file in UltraFeedback's shape, one row a prompt; what an interrupted run has left is deleted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
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


def judge_reply(body: bytes) -> bytes:
    """Scores that follow from the text; the judges of an answer mostly agree. For a GET: an empty list of models."""
    if not body:
        return b'{"data": []}'
    request = json.loads(body)
    text = request["messages"][-1]["content"]
    number = hashlib.blake2b(text.encode(), digest_size=4).digest()
    level = 8 if text.count("the ") % 2 else 2
    score = level + (number[0] % 2 if number[1] > 16 else -1)
    verdict: dict[str, Any] = {"reason": f"because {number.hex()}", "score": score}
    if "score" not in request["response_format"]["json_schema"]["schema"]["properties"]:
        verdict = {"verdict": "green"}  # the check at the start
    message = {"role": "assistant", "content": json.dumps(verdict)}
    usage = {"prompt_tokens": len(text) // 4, "completion_tokens": 12, "total_tokens": len(text) // 4 + 12}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()


def run(folder: Path, size: int, per_shard: int, judges: int) -> None:
    context = multiprocessing.get_context("spawn")
    connections = context.Value("l", 0)
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, WAIT, connections, judge_reply), daemon=True)
    server.start()
    shards = 2 ** min(10, max(0, (size // per_shard).bit_length() - 1))
    endpoint = {"base_url": f"http://127.0.0.1:{here.recv()}/v1", "api_key_env": None}
    config = DmapoConfig.model_validate(
        {
            "run": {"name": folder.name},
            "models": {"judge": {"engine": "openai", "model": "judge", "endpoint": endpoint}},
            "candidates": {"source": {"type": "jsonl", "path": str(folder / "own.jsonl")}},
            "prompts": {"num_shards": shards},
            "judge": {"rubrics": [{"name": name, "text": f"Is it good in {name}?"} for name in JUDGES[:judges]]},
            "critic": None,
            "train": None,
        }
    )
    stages = dmapo(config, str(folder)).stages
    session, results, peaks = Session(str(folder), str(folder / "calls"), shards), dict[str, StageResult](), [peak()]
    for stage in stages:
        Path("/proc/self/clear_refs").write_text("5")
        make_here([stage], session, results, print)
        peaks.append(peak())
    server.terminate()
    server.join()
    labels, kto = (results[name].facts["counts"] for name in ("gate", "datasets"))
    accounted = kto["kto"]["kept"] + sum(kto["kto"]["dropped"].values())
    ends = {
        "candidates": results["candidates"].rows["candidates"],
        "judgements read": sum(results["judge"].facts["counts"][f"{name}.ok"] for name in JUDGES[:judges]) / judges,
        "decisions": results["gate"].rows["decisions"],
        "KTO rows and those left out for a reason": accounted
        + sum(labels[name] for name in ("discard", "abstain", "incomplete")),
    }
    table = [
        [name, result.usage.wall_seconds, used, dict(result.rows)]
        for (name, result), used in zip(results.items(), peaks[1:], strict=True)
    ]
    in_flight = max(stage.work.placement.shards_in_flight for stage in stages if isinstance(stage.work, ShardWork))
    found = {"size": size, "shards": shards, "in_flight": in_flight, "judges": judges, "loaded": peaks[0]}
    (folder / "run.json").write_text(json.dumps({**found, "ends": ends, "stages": table}))


def peak() -> float:
    """Largest resident memory since the last reset, in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def show(one: dict[str, Any]) -> None:
    size, seconds = one["size"], {name: took for name, took, _, _ in one["stages"]}
    print(f"{size:,} completions, {one['judges']} judges, {one['shards']} shards, {one['in_flight']} in flight")
    print(f"  lost: {', '.join(f'{name} {size - rows:,.0f}' for name, rows in one['ends'].items())}")
    print(f"  {'stage':<14}{'seconds':>9}{'peak MiB':>10}  rows out (libraries {one['loaded']:.0f} MiB)")
    for name, took, used, rows in one["stages"]:
        print(f"  {name:<14}{took:>9.1f}{used:>10.0f}  {', '.join(f'{kind} {n:,}' for kind, n in rows.items())}")
    rate = one["judges"] * size / seconds["judge"]
    print(f"  {sum(seconds.values()):.0f} s, {rate:.0f} judgements/s", flush=True)


if __name__ == "__main__":
    main()

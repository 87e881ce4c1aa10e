"""Faults on a simulated cluster: one head and three worker nodes, each a raylet of its own with a fake GPU, on this
machine. A node, or the head, is killed in the middle of a stage, and the table says what it cost.

    python benchmarks/faults.py                      # all faults, some minutes each
    python benchmarks/faults.py judge join           # some of them
    python benchmarks/faults.py --prompts 60 --keep /tmp/faults

Engines, training and processes are real (the pocket world on vLLM's CPU build). After each fault the run is replayed
from its own call log with the engine forbidden, and the replay's tables must have the same bytes: no row is lost.
Calls repeated are those that the engine answered more than the log holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pyarrow.parquet as pq  # noqa: E402

from ray_pipeline.store.files import Folder  # noqa: E402
from tests.ray_nodes import Node, RayNodes  # noqa: E402

#: Stages whose tables a replay of the call log must give byte for byte.
REPLAYED = ("prompts", "candidates", "judge", "critic", "gate", "dataset-rows", "datasets")
WORKER = {"quorum-role": "worker"}
#: Few calls at once and several shards, so that a stage lasts long enough to be hit in its middle.
SLOW = [
    *(
        f"models.{model}.placement.{setting}"
        for model in ("policy", "judge")
        for setting in ("concurrency=1", "shards_in_flight=2", "num_gpus=1", "max_actors=2", "min_actors=1")
    ),
    "prompts.num_shards=16",
    "ray.max_stages=1",
    "train.use_gpu=false",
    "train.num_workers=1",
    "train.save_steps=2",
    "train.label_selector.quorum-role=worker",
]


class Run:
    """`quorum run` against a cluster, in a process of its own."""

    def __init__(self, nodes: RayNodes, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray_pipeline.cli", "run", "dmapo", "--config", "configs/pocket.yaml"]
        self.folder = folder
        self.process = subprocess.Popen(
            [*command, "--run-dir", str(folder), *arguments],
            cwd=ROOT,
            env={**os.environ, **nodes.env, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": nodes.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def wait(self, seconds: float = 900) -> int:
        code = self.process.wait(seconds)
        self._thread.join(10)
        return code

    def until(self, ready: Callable[[], bool], what: str, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the moment never came: {what}\n{''.join(self.lines[-30:])}")
            time.sleep(0.1)

    def progress(self) -> dict[str, dict[str, Any]]:
        try:
            return {stage["name"]: stage for stage in Folder(str(self.folder)).read_json("progress.json")}
        except (OSError, ValueError):
            return {}


@dataclasses.dataclass
class Line:
    """A line of the table."""

    fault: str
    happened: str
    rows_lost: int
    repeated: str
    seconds: float

    def __str__(self) -> str:
        return f"| {self.fault} | {self.happened} | {self.rows_lost} | {self.repeated} | {self.seconds:.0f} |"


def logged(folder: Path) -> int:
    """Distinct calls in a run's log."""
    keys: set[str] = set()
    for part in (folder / "calls").rglob("*.parquet"):
        try:
            keys.update(pq.read_table(part, columns=["call_key"])["call_key"].to_pylist())
        except FileNotFoundError:  # Merged away while we look.
            continue
    return len(keys)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["stages"]


def tables(folder: Path) -> dict[str, bytes]:
    stages = manifest(folder)
    return {
        f"{name}/{file.relative_to(folder / stages[name]['path'])}": file.read_bytes()
        for name in REPLAYED
        if stages.get(name, {}).get("status") == "done"
        for file in sorted((folder / stages[name]["path"]).rglob("*.parquet"))
    }


def rows_lost(nodes: RayNodes, folder: Path, *arguments: str) -> int:
    """Rows that the run has not and a replay of its log has; -1 when tables differ otherwise."""
    replay = folder.with_name(folder.name + "-replay")
    run = Run(nodes, replay, *arguments, f"calls.root={folder / 'calls'}", "calls.replay_only=true")
    if run.wait() != 0:
        raise SystemExit(f"the replay failed\n{''.join(run.lines[-30:])}")
    if tables(replay) == tables(folder):
        return 0
    counts = [sum(sum(s.get("rows", {}).values()) for s in manifest(f).values()) for f in (replay, folder)]
    return counts[0] - counts[1] or -1


def actors(nodes: RayNodes) -> dict[int, int]:
    """Process ids of shard actors by the place of their node in `nodes.nodes`."""
    found = {}
    for place, node in enumerate(nodes.nodes):
        for process in node.processes():
            if "ShardActor" in " ".join(process.cmdline()[:1]):
                found[process.pid] = place
    return found


def busy_node(nodes: RayNodes, word: str) -> Node | None:
    """A worker node on which a process of that name lives (an engine's actor, a training worker)."""
    for node in nodes.nodes:
        for process in node.processes():
            try:
                if word in " ".join(process.cmdline()[:1]):
                    return node
            except Exception:  # It ended while we looked.
                continue
    return None


def step_of_training(folder: Path) -> int:
    """The newest step that a running training has told."""
    for file in folder.glob("train-*/progress.json"):
        try:
            return int(json.loads(file.read_text())["step"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


def kill_in(stage: str, nodes: RayNodes, folder: Path, prompts: int) -> Line:
    """Kill a worker node that works for the stage, when the stage has begun to give rows."""
    to = "train" if stage == "train" else "datasets"
    arguments = [*SLOW, f"prompts.sources.0.count={prompts}", "--to", to]
    run = Run(nodes, folder, *arguments)
    if stage == "datasets":
        # A columnar stage of seconds: the node goes as soon as the stage is at work.
        run.until(lambda: run.progress().get("dataset-rows", {}).get("status") == "running", "dataset-rows runs")
        victim: Node | None = nodes.nodes[0]
    elif stage == "train":
        run.until(lambda: step_of_training(folder) >= 4, "training is at step 4")
        victim = busy_node(nodes, "RayTrainWorker")
    else:
        run.until(lambda: run.progress().get(stage, {}).get("calls_engine", 0) > prompts / 2, f"{stage} gives rows")
        victim = busy_node(nodes, "ShardActor")
    if victim is None:
        raise SystemExit(f"no worker node works for {stage}")
    killed = time.monotonic()
    before = run.progress().get(stage, {}).get("shards_done", 0)
    victim.kill()
    nodes.nodes.remove(victim)
    nodes.add(gpus=1, labels=WORKER, wait=False)  # what an autoscaler does
    recovered = killed
    if stage in ("candidates", "judge"):
        run.until(lambda: run.progress().get(stage, {}).get("shards_done", 0) > before, f"{stage} goes on")
        recovered = time.monotonic()
    code = run.wait()
    if stage not in ("candidates", "judge"):
        recovered = time.monotonic()
    stages = manifest(folder)
    answered = sum(int(s.get("usage", {}).get("calls_engine", 0)) for s in stages.values())
    wanted = sum(
        int(s.get("usage", {}).get("calls_engine", 0) + s.get("usage", {}).get("calls_log", 0)) for s in stages.values()
    )
    total = logged(folder)
    resumed = stages.get("train", {}).get("facts", {}).get("resumed_from")
    how = f"exit {code}, by itself" + (f", training went on from step {resumed}" if resumed else "")
    lost = rows_lost(nodes, folder, *arguments[:-1], "datasets")
    again = f"{max(0, answered - total)} of {total}" + (
        f" ({wanted - answered} from the log)" if wanted > answered else ""
    )
    return Line(f"node killed in {stage}", how, lost, again, recovered - killed)


def kill_head(nodes: RayNodes, folder: Path, prompts: int) -> Line:
    """Kill the head and every node with it in the judge stage, start them anew, and give the same command."""
    arguments = [*SLOW, f"prompts.sources.0.count={prompts}", "--to", "datasets"]
    run = Run(nodes, folder, *arguments)
    run.until(lambda: run.progress().get("judge", {}).get("calls_engine", 0) > prompts, "judge gives rows")
    answered = run.progress()["judge"]["calls_engine"] + manifest(folder)["candidates"]["usage"]["calls_engine"]
    killed = time.monotonic()
    assert nodes.head is not None
    nodes.head.kill()
    for node in nodes.nodes:
        node.kill()
    nodes.nodes.clear()
    code = run.process.poll()
    if code is None:
        run.process.kill()
        run.wait()
    kept = logged(folder)
    nodes.start_head()
    for _ in range(3):
        nodes.add(gpus=1, labels=WORKER)
    again = Run(nodes, folder, *arguments)
    again.until(lambda: again.progress().get("judge", {}).get("status") == "running", "judge goes on", 600)
    recovered = time.monotonic()
    code = again.wait()
    lost = rows_lost(nodes, folder, *arguments)
    repeated = max(0, int(answered) - kept)
    return Line(
        "head killed in judge, the same command again",
        f"exit {code}",
        lost,
        f"{repeated} of {logged(folder)}",
        recovered - killed,
    )


def join(nodes: RayNodes, folder: Path, prompts: int) -> Line:
    """Add a node in the judge stage: more actors without a restart."""
    for node in nodes.nodes[1:]:
        node.kill()
    del nodes.nodes[1:]
    arguments = [*SLOW, f"prompts.sources.0.count={prompts}", "--to", "datasets"]
    run = Run(nodes, folder, *arguments)
    run.until(lambda: run.progress().get("judge", {}).get("calls_engine", 0) > 10, "judge gives rows")
    before = len(actors(nodes))
    joined = time.monotonic()
    nodes.add(gpus=1, labels=WORKER, wait=False)
    run.until(lambda: len(actors(nodes)) > before, "another actor")
    seconds = time.monotonic() - joined
    after = len(actors(nodes))
    code = run.wait()
    lost = rows_lost(nodes, folder, *arguments)
    return Line("node joins in judge", f"exit {code}, judge actors {before} → {after}", lost, "0", seconds)


FAULTS: dict[str, Callable[[RayNodes, Path, int], Line]] = {
    "candidates": lambda nodes, folder, prompts: kill_in("candidates", nodes, folder, prompts),
    "judge": lambda nodes, folder, prompts: kill_in("judge", nodes, folder, prompts),
    "datasets": lambda nodes, folder, prompts: kill_in("datasets", nodes, folder, prompts),
    "train": lambda nodes, folder, prompts: kill_in("train", nodes, folder, prompts),
    "head": kill_head,
    "join": join,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="fault", help=f"of {', '.join(FAULTS)}; default: all")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--keep", help="folder for the run folders; default: one that is removed")
    given = parser.parse_args()
    strangers = [fault for fault in given.faults if fault not in FAULTS]
    if strangers:
        parser.error(f"there is no fault {strangers[0]!r}; there is {', '.join(FAULTS)}")
    print(
        "| fault | what happened | rows lost | calls repeated | seconds to recover |\n|---|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="quorum-faults-") as temporary:
        for fault in given.faults or FAULTS:
            with RayNodes(cpus=2, dashboard=False) as nodes:
                for _ in range(3):
                    nodes.add(gpus=1, labels=WORKER)
                print(FAULTS[fault](nodes, Path(given.keep or temporary) / fault, given.prompts), flush=True)


if __name__ == "__main__":
    main()

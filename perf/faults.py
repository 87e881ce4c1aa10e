"""Faults in the middle of a stage, and what they cost: of nodes on a simulated cluster, and of processes and limits on
one machine. The cluster is a head and three worker nodes, each a raylet of its own with a fake GPU and, where network
namespaces can be had, with an address of its own.

    python perf/faults.py                    # all faults, about three minutes each
    python perf/faults.py judge gcs          # some of them
    python perf/faults.py --keep /tmp/faults # and keep the run folders

Engines, training and processes are real (the pocket world on vLLM's CPU build). After a fault the run is replayed from
its own call log with the engine forbidden, and the replay's tables must have the same bytes: that is how rows are
counted. Calls repeated are those that engines answered, as the workers told it (up to 2 s late where the driver dies),
beyond those that the log holds. (One long file: each fault is read beside its line of the table; what is done to the
processes is in `harms.py`.)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from perf.harms import (  # noqa: E402
    Place,
    adjustable_clock,
    adjustable_memory,
    anywhere,
    few_files,
    fill_temporary_folder,
    kill,
    kill_driver,
    set_clock_back,
    small_temporary_folder,
    stop_all,
    use_memory_up,
)
from ray_pipeline.store.errors import StoreError  # noqa: E402
from ray_pipeline.store.files import Folder  # noqa: E402
from tests.dags.conftest import Quorum, calls_by_role, manifest, tables, wait_until  # noqa: E402
from tests.endpoint import KEY, Answer, Endpoint, said  # noqa: E402
from tests.hosts import hosts_can_be_made  # noqa: E402
from tests.ray_nodes import RayNodes  # noqa: E402

WORKER = {"quorum-role": "worker"}
PROMPTS = 40


@dataclasses.dataclass(frozen=True)
class Work:
    """A workflow, its settings, and the last stage whose tables follow from the call log alone (`--to`)."""

    workflow: str
    config: str
    settings: tuple[str, ...]
    to: str


def slow(models: Sequence[str], *settings: str) -> tuple[str, ...]:
    """Few calls at once and many shards, so that a stage lasts long enough to be hit in its middle.

    Args:
        models: keys of the models in the configuration.
        settings: of the placement of all models.
    """
    given = ("concurrency=1", "shards_in_flight=2", *settings)
    return (
        f"prompts.sources.0.count={PROMPTS}",
        "prompts.num_shards=16",
        *(f"models.{model}.placement.{setting}" for model in models for setting in given),
        "ray.max_stages=1",
        "train.num_workers=1",
        "train.global_batch=8",  # many steps
        "train.use_gpu=false",
        "train.save_steps=2",
    )


#: One judge in every role, so that a stage is named `judge`; the demo has a panel, whose stages share an engine.
ONE_JUDGE = "tests/one_judge.yaml"
DMAPO = Work("dmapo", ONE_JUDGE, slow(("policy", "judge"), "max_actors=1"), "datasets")
FELLOWSHIP = Work(
    "fellowship", "pocket_fellowship", slow(("generator", "reviewer", "judge"), "max_actors=1"), "datasets"
)
BASELINES = Work(
    "baselines",
    "pocket_baselines",
    (
        "models={policy: {model: 'pocket:policy', dtype: float32, max_model_len: 256}, "
        "judge: {model: 'pocket:judge', dtype: float32, max_model_len: 256}}",
        "judge.rubrics=[{name: helpfulness}, {name: factuality}, {name: conciseness}]",
        "critic.model=judge",
        *slow(("policy", "judge"), "max_actors=1"),
        "train.batch_size=8",
        "baselines.seeds=[0]",
    ),
    "datasets",
)
BENCHMARKS = Work(
    "benchmarks",
    "pocket_benchmarks",
    (
        "num_shards=16",
        "ray.max_stages=1",
        "benchmarks.ifeval=null",  # its data is not everywhere
        "benchmarks.draws=200",
        *(f"judges.judge.placement.{setting}" for setting in ("concurrency=1", "shards_in_flight=2", "max_actors=1")),
    ),
    "benchmarks",
)
ON_CLUSTER = dataclasses.replace(
    DMAPO,
    settings=(
        *slow(("policy", "judge"), "num_gpus=1", "max_actors=2"),
        "train.label_selector.quorum-role=worker",
    ),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table; `seconds` from the fault until what it hit was made good (see `node_killed` and others)."""

    fault: str
    happened: str
    rows_lost: int
    repeated: int
    calls: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"| {self.fault} | {self.happened} | {self.rows_lost} | {self.repeated} of {self.calls} "
            f"| {self.seconds:.0f} |"
        )


class Run:
    """A run of the pocket world with its progress and its call log.

    Args:
        train: go on to training, beyond the last stage of `work`.
        place: of its processes.
    """

    def __init__(self, folder: Path, work: Work, train: bool, place: Place) -> None:
        self.folder, self._work, self._place = folder, work, place
        self._to = "train" if train else work.to

    def command(self, folder: Path, to: str, *arguments: str) -> Quorum:
        given = ["run", self._work.workflow, "--config", self._work.config, "--run-dir", str(folder), "--to", to]
        env = {"PYTHONPATH": str(ROOT), **self._place.env}
        return Quorum(*given, *self._work.settings, *arguments, env=env, prefix=self._place.prefix)

    def again(self, *arguments: str) -> Quorum:
        return self.command(self.folder, self._to, *arguments)

    def begin(self, *arguments: str) -> Quorum:
        run = self.again(*arguments)
        wait_until(run, lambda: "to do" in run.output and bool(self.progress()))
        return run

    def progress(self) -> dict[str, dict[str, Any]]:
        try:
            return {stage["name"]: stage for stage in Folder(str(self.folder)).read_json("progress.json")}
        except (FileNotFoundError, StoreError):
            return {}

    def told(self, stage: str, counter: str) -> int:
        return int(self.progress().get(stage, {}).get(counter, 0))

    def answered(self) -> int:
        """Calls that engines have answered in this session."""
        return sum(int(stage["calls_engine"]) for stage in self.progress().values())

    def logged(self) -> int:
        return sum(calls_by_role(self.folder / "calls").values())

    def under_way(self, stage: str) -> set[str]:
        """Shards of the running stage that an actor has begun and nobody has finished."""
        found: set[str] = set()
        for folder in self.folder.glob(f"{stage}-*"):
            found |= {name.name[: len("shard-00000")] for name in folder.glob("_attempts/shard-*")}
            found -= {name.stem for name in folder.glob("_receipts/shard-*.json")}
        return found

    def step(self) -> int:
        """The newest step that a running training has told."""
        for file in self.folder.glob("train-*/progress.json"):
            return int(json.loads(file.read_text())["step"])
        return 0

    def rows_lost(self) -> int:
        """Rows that a replay of the log has and the run has not; where they differ otherwise, all of them."""
        replay = self.folder.with_name(f"{self.folder.name}-replay")
        self.command(replay, self._work.to, f"calls.root={self.folder / 'calls'}", "calls.replay_only=true").ends(0)
        stages = [name for name, stage in manifest(replay)["stages"].items() if stage["status"] == "done"]
        if tables(replay, stages) == tables(self.folder, stages):
            return 0
        whole, here = (
            sum(sum(stage["rows"].values()) for stage in manifest(folder)["stages"].values() if "rows" in stage)
            for folder in (replay, self.folder)
        )
        return whole - here or whole


class Cluster(Run):
    """A run on a cluster. The driver sits on the head: while it starts, there is no other node."""

    def __init__(self, nodes: RayNodes, folder: Path, train: bool = False) -> None:
        super().__init__(folder, ON_CLUSTER, train, Place({**nodes.env, "RAY_ADDRESS": nodes.address}))
        self.nodes = nodes

    def start(self, workers: int) -> Quorum:
        run = self.begin()
        for _ in range(workers):
            self.nodes.add(gpus=1, labels=WORKER)
        return run


def node_killed(stage: str, nodes: RayNodes, folder: Path) -> Line:
    """A worker node that is at work for the stage is killed, and another joins, as with an autoscaler.

    It is made good when all shards that were under way are there, when a columnar stage is done, or when a training has
    taken a new step."""
    cluster = Cluster(nodes, folder, train=stage == "train")
    run = cluster.start(workers=3)
    if stage == "train":
        wait_until(run, lambda: cluster.step() >= 4)
        victim = cluster.nodes.at_work("RayTrainWorker")[0]
    elif stage == "dataset-rows":  # a columnar stage is over in seconds: any node, as soon as it is at work
        wait_until(run, lambda: cluster.progress().get(stage, {}).get("status") == "running")
        victim = nodes.nodes[0]
    else:
        wait_until(run, lambda: cluster.told(stage, "shards_done") >= 3)
        victim = cluster.nodes.at_work("ShardActor")[0]
    hit, step = cluster.under_way(stage), cluster.step()
    killed = time.monotonic()
    victim.kill()
    nodes.nodes.remove(victim)
    nodes.add(gpus=1, labels=WORKER, wait=False)
    if stage == "train":
        wait_until(run, lambda: cluster.step() > step)
    elif hit:
        wait_until(run, lambda: not hit & cluster.under_way(stage))
    else:
        wait_until(run, lambda: cluster.progress().get(stage, {}).get("status") == "done")
    seconds = time.monotonic() - killed
    run.ends(0)
    resumed = manifest(folder)["stages"].get("train", {}).get("facts", {}).get("resumed_from")
    happened = "the run finished without intervention" + (f", training from step {resumed}" if resumed else "")
    return Line(f"node killed in {stage}", happened, cluster.rows_lost(), *repeated(cluster), seconds)


def head_killed(nodes: RayNodes, folder: Path) -> Line:
    """Every node is killed, the head among them; it starts anew, and the same command is given."""
    cluster = Cluster(nodes, folder)
    run = cluster.start(workers=3)
    wait_until(run, lambda: cluster.told("judge", "shards_done") >= 3)
    killed = time.monotonic()
    assert nodes.head is not None
    for node in [nodes.head, *nodes.nodes]:
        node.kill()
    nodes.nodes.clear()
    ended = run.wait(120)
    answered, kept = cluster.answered(), cluster.logged()
    nodes.start_head()
    run = cluster.start(workers=3)
    wait_until(run, lambda: cluster.told("judge", "calls_engine") > 0)
    seconds = time.monotonic() - killed
    run.ends(0)
    happened = f"the command ended with exit code {ended}; rerun, it resumed"
    again = max(0, answered - kept)  # of the first session; the second has its own
    more, calls = repeated(cluster, before=kept)
    return Line("all nodes killed in judge, the head too", happened, cluster.rows_lost(), again + more, calls, seconds)


def node_joins(nodes: RayNodes, folder: Path) -> Line:
    """The stage has one node to work on, and gets another."""
    cluster = Cluster(nodes, folder)
    run = cluster.start(workers=1)
    wait_until(run, lambda: cluster.told("judge", "shards_done") >= 1)
    before, joined = len(cluster.nodes.at_work("ShardActor")), time.monotonic()
    nodes.add(gpus=1, labels=WORKER, wait=False)
    wait_until(run, lambda: len(cluster.nodes.at_work("ShardActor")) > before)
    seconds, after = time.monotonic() - joined, len(cluster.nodes.at_work("ShardActor"))
    run.ends(0)
    happened = f"actors {before} → {after}, no restart"
    return Line("node joins in judge", happened, cluster.rows_lost(), *repeated(cluster), seconds)


def on_one_machine(fault: str, folder: Path) -> Line:
    """Do harm to a run on a local cluster in the middle of a stage, and rerun the command until it has succeeded.

    `seconds` are from the harm until the last stage was done.
    """
    words, work, stage, harm = PROCESSES[fault]
    with PLACES.get(fault, anywhere)() as place:
        run = Run(folder, work, stage == "train", place)
        process = run.begin()
        begun = (lambda: run.step() >= 4) if stage == "train" else (lambda: run.told(stage, "shards_done") >= 3)
        wait_until(process, begun)
        begin = time.monotonic()
        harm(process)
        codes, again = [process.wait(600)], 0
        place.mend()
        while codes[-1] != 0 and len(codes) < 4:
            again += max(0, run.answered() - run.logged())
            codes.append(run.again().wait(600))
        seconds = time.monotonic() - begin
        if codes[-1] != 0:
            happened = f"NOT recovered: exit codes {', '.join(map(str, codes))}"
        elif len(codes) == 1:
            happened = "the run finished without intervention"
        else:
            happened = f"the command ended with exit code {', '.join(map(str, codes[:-1]))}; rerun, it resumed"
        made = calls(folder)
        repeated = again + len(made) - len(set(made))
        where = stage if work is DMAPO else f"{stage} of {work.workflow}"
        return Line(f"{words} in {where}", happened, run.rows_lost(), repeated, len(set(made)), seconds)


def over_the_limit(folder: Path) -> Line:
    """A run at an endpoint that answers many calls at once reaches `--max-cost`, and goes on with a higher one.

    What it may cost: the limit, what was answered until the workers heard of it (1.5 s: they report every half second,
    the driver looks as often, and they ask as often), and the replies of the calls in flight.
    """
    price, limit, at_once, delay = 0.01, 1.5, 16, 0.5
    with Endpoint(lambda body, n: dataclasses.replace(_pocket_reply(body), delay=delay)) as server:
        folder.mkdir(parents=True)
        config = folder / "endpoint.yaml"
        config.write_text(json.dumps(_at_an_endpoint(server.url, price, at_once)))
        work = Work("dmapo", str(config), slow(()), "gate")
        run = Run(folder / "run", work, False, Place({"LOOPBACK_KEY": KEY}))
        begin = time.monotonic()
        process = run.begin("--max-cost", str(limit))
        code = process.wait(600)
        cost, most = len(server.asked) * price, server.most_at_once
        allowed = limit + price * most * (1 + 1.5 / delay)
        run.again("--max-cost", "1000").ends(0)
        seconds = time.monotonic() - begin
        made = calls(run.folder)
        happened = (
            f"the command ended with exit code {code} at a cost of {cost:.2f} ({cost / limit:.0%} of the limit; "
            f"at most {allowed:.2f} with {most} calls in flight); rerun with a higher limit, it resumed"
        )
        assert "--max-cost is" in process.output and cost <= allowed, f"{happened}\n{process.output}"
        repeated = len(server.asked) - len(set(made))
        fault = f"`--max-cost` reached, {most} calls at once"
        return Line(fault, happened, run.rows_lost(), repeated, len(set(made)), seconds)


def _pocket_reply(body: dict[str, Any]) -> Answer:
    """A reply in the form that the request asks for."""
    if "response_format" not in body:
        return said("An answer.")
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    kinds = {"string": "because", "boolean": False, "integer": 8}
    return said(json.dumps({name: field.get("enum", [kinds.get(field["type"])])[-1] for name, field in fields.items()}))


def _at_an_endpoint(url: str, price: float, at_once: int) -> dict[str, Any]:
    """A configuration whose generator and judges are at one endpoint; a call has 15 tokens."""
    a_million = price / 15 * 1e6
    endpoint = {
        "base_url": url, "api_key_env": "LOOPBACK_KEY", "concurrency": at_once,
        "prices": {"input": a_million, "output": a_million},
    }  # fmt: skip
    return {
        "models": {
            "policy": {"model": "pocket:policy", "dtype": "float32"},
            "remote": {"engine": "openai", "model": "remote", "endpoint": endpoint, "canary": False},
        },
        "prompts": {"sources": [{"type": "pocket", "count": PROMPTS, "seed": 0}]},
        "candidates": {"model": "remote", "k": 2},
        "judge": {"model": "remote", "rubrics": [{"name": "helpfulness", "text": "Does it help?"}]},
        "critic": {"model": "remote"},
        "evaluate": {"judge": "remote"},
        "train": {"dtype": "float32"},
    }


def calls(folder: Path) -> list[str]:
    """The keys of all calls in the log, once for each time that they were made."""
    parts = [pq.read_table(part, columns=["call_key"]) for part in (folder / "calls").rglob("*.parquet")]
    return [key for part in parts for key in part["call_key"].to_pylist()]


def repeated(cluster: Cluster, before: int = 0) -> tuple[int, int]:
    """Calls answered in this session beyond those that are new in the log, and all calls in the log."""
    calls = cluster.logged()
    return max(0, cluster.answered() - (calls - before)), calls


#: Fault → (its words, the workflow, the stage that it hits, what is done).
PROCESSES: dict[str, tuple[str, Work, str, Callable[[Quorum], None]]] = {
    "core": ("vLLM's core killed", DMAPO, "judge", kill("VLLM::EngineCore")),
    "actor": ("an engine's actor killed", DMAPO, "judge", kill("ShardActor")),
    "pool": ("the task of a stage killed", DMAPO, "judge", kill("ray::judge")),
    "board": ("the progress board killed", DMAPO, "judge", kill("ray::ProgressBoard")),
    "gcs": ("Ray's control store (GCS) killed", DMAPO, "judge", kill("gcs_server")),
    "raylet": ("the raylet killed", DMAPO, "judge", kill("raylet")),
    "trainer": ("the training worker killed", DMAPO, "train", kill("RayTrainWorker")),
    "stop": ("all processes stopped for 60 s", DMAPO, "judge", stop_all),
    "files": ("256 open files (`ulimit -n`)", DMAPO, "judge", few_files),
    "temp": ("the disk of Ray's temporary files full", DMAPO, "judge", fill_temporary_folder),
    "clock": ("the clock set back by an hour", DMAPO, "judge", set_clock_back),
    "memory": ("all workers killed by Ray's memory monitor", DMAPO, "judge", use_memory_up),
    "loop-core": ("vLLM's core killed", FELLOWSHIP, "review-1", kill("VLLM::EngineCore")),
    "loop-raylet": ("the raylet killed", FELLOWSHIP, "review-1", kill("raylet")),
    "loop-driver": ("the driver killed", FELLOWSHIP, "review-1", kill_driver),
    "baselines": ("the driver killed", BASELINES, "judge", kill_driver),
    "baselines-core": ("vLLM's core killed", BASELINES, "judge", kill("VLLM::EngineCore")),
    "baselines-raylet": ("the raylet killed", BASELINES, "judge", kill("raylet")),
    "benchmarks": ("the driver killed", BENCHMARKS, "bench-judge-judge", kill_driver),
    "benchmarks-core": ("vLLM's core killed", BENCHMARKS, "bench-judge-judge", kill("VLLM::EngineCore")),
    "benchmarks-raylet": ("the raylet killed", BENCHMARKS, "bench-judge-judge", kill("raylet")),
}

#: Where the run of a fault is made, if not anywhere. These need the right to mount, but for the clock.
PLACES: dict[str, Callable[[], contextlib.AbstractContextManager[Place]]] = {
    "temp": small_temporary_folder,
    "clock": adjustable_clock,
    "memory": adjustable_memory,
}

NODES: dict[str, Callable[[RayNodes, Path], Line]] = {
    "candidates": lambda nodes, folder: node_killed("candidates", nodes, folder),
    "judge": lambda nodes, folder: node_killed("judge", nodes, folder),
    "dataset-rows": lambda nodes, folder: node_killed("dataset-rows", nodes, folder),
    "train": lambda nodes, folder: node_killed("train", nodes, folder),
    "head": head_killed,
    "join": node_joins,
}


def main() -> None:
    known = [*NODES, *PROCESSES, "cost"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="fault", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--keep", type=Path, help="folder for the run folders; default: one that is removed")
    given = parser.parse_args()
    strangers = [fault for fault in given.faults if fault not in known]
    if strangers:
        parser.error(f"there is no fault {strangers[0]!r}; there is {', '.join(known)}")
    print("| fault | what happened | rows lost | calls repeated | seconds to recover |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="quorum-faults-") as temporary:
        for fault in given.faults or known:
            folder = (given.keep or Path(temporary)) / fault
            if fault not in NODES:
                print(over_the_limit(folder) if fault == "cost" else on_one_machine(fault, folder), flush=True)
                continue
            with RayNodes(cpus=2, dashboard=False, own_addresses=hosts_can_be_made()) as nodes:
                print(NODES[fault](nodes, folder), flush=True)


if __name__ == "__main__":
    main()
